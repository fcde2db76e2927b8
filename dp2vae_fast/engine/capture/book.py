"""The per-sample gradients of the batch at hand, from its backward pass until they are taken."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import count
from typing import Any

from torch import Tensor

from ..gradients.gradient import Gradient, Kept

Origin = tuple[str, int, int, int | None]
"""Where gradients come from: ``("draw", number of a sampler, number, its records)``, or ``("batch", number of a book,
number, None)``."""


class Book:
    """Parameter -> its gradients, one entry a use of the parameter.

    Guarantees:
        All entries are of the same number of records. What an entry is made from is watched until the book is empty:
        :meth:`overwritten` says where it was changed.

    Attributes:
        uses: the entries.
        dropped: parameters whose gradients of this batch nobody wants.
        records: of the backward passes since the book was empty; None if there was none.
    """

    _numbers = count()  # unlike an id, none comes again when a book is gone

    def __init__(self) -> None:
        self._number = next(self._numbers)
        self.uses: dict[Tensor, list[Gradient]] = {}
        self.dropped: set[Tensor] = set()
        self.records: int | None = None
        self._batch = 0  # how many there were
        self._draws: set[Origin] = set()
        self._held: list[tuple[str, Tensor, int]] = []  # what the entries are made from, and its version

    @property
    def origins(self) -> set[Origin]:
        """What the entries come from: this batch, and the draws that its forwards were on."""
        return {("batch", self._number, self._batch, None), *self._draws}

    def holds(self, parameters: Iterable[Tensor]) -> bool:
        """Whether there are entries of any of ``parameters``."""
        return any(p in self.uses for p in parameters)

    def begin(self) -> None:
        """Another batch, which :attr:`origins` tell from those before."""
        self._batch += 1

    def on(self, draws: set[Origin]) -> None:
        """Entries that follow come from ``draws``."""
        self._draws |= draws

    def count(self, layer: str, records: int) -> None:
        """``layer`` was used on ``records`` records.

        Raises:
            ValueError: another layer was used on more or fewer.
        """
        if self.records not in (None, records):
            raise ValueError(
                f"layer {layer!r} saw {records} records, other layers of the same backward pass {self.records}: "
                "every layer's input must have the batch as its first axis"
            )
        if self.records is None:
            self.begin()
        self.records = records

    def enter(self, parameter: Tensor, gradient: Gradient, layer: str, activations: Any) -> None:
        """One use of ``parameter`` by ``layer``, whose ``activations`` the gradient is made from."""
        if not isinstance(gradient, Kept):
            self._held.append((layer, activations, activations._version))
        self.uses.setdefault(parameter, []).append(gradient)

    def overwritten(self) -> list[str]:
        """The layers whose input has been modified since."""
        return [layer for layer, tensor, version in self._held if tensor._version != version]

    def drop(self, parameters: Sequence[Tensor]) -> list[list[Gradient] | None]:
        """Remove and return the entries of ``parameters``."""
        found = [self.uses.pop(p, None) for p in parameters]
        self.dropped.update(parameters)
        return found

    def clear(self) -> None:
        """Forget the batch."""
        self.uses.clear()
        self.dropped.clear()
        self._draws.clear()
        self._held.clear()
        self.records = None
