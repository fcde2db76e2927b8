"""Which call is the outermost one: what holds for a whole call of the model is seen to where that begins and ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .guards import Look, Memory
from .traced import TracedCalls
from .verify import FirstBatch


class Calls:
    """Follows calls of a module and its parts; of an outermost one it knows the rows, sees that it changes no memory,
    lets the first batch remember it, and puts its beginning and end into a graph that is traced.

    Args:
        axis: where inputs have the batch.
        trainable: tells the parameters with gradients.

    Attributes:
        outermost: the root or container whose call no other surrounds; None outside it, and in that of a mere layer.
        shapes: of the outermost call's inputs that have rows.
        ticket: of the call that is traced.
        at_rest: the model or a layer is run again, for a check; hooks let it pass.
    """

    def __init__(
        self,
        axis: int,
        first_batch: FirstBatch,
        traced: TracedCalls,
        memory: Memory,
        trainable: Callable[[], set[Tensor]],
    ) -> None:
        self.axis = axis
        self.first_batch = first_batch
        self.traced = traced
        self.memory = memory
        self.trainable = trainable
        self.outermost: nn.Module | None = None
        self.shapes: list[torch.Size] = []
        self.ticket: Tensor | None = None
        self.at_rest = False
        self._ticket_of: nn.Module | None = None
        self._before: Look | None = None  # the outermost call

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Hooks let pass what runs inside."""
        self.at_rest = True
        try:
            yield
        finally:
            self.at_rest = False

    def open(self, number: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A call of the root or a container begins, which is the module of this ``number``."""
        if self.outermost is None:
            self.outermost = module
        self.begin(number, module, args, kwargs)

    def close(self, module: nn.Module, output: Any) -> Any:
        """It ends: its output again, if that was tapped."""
        if self.outermost is module and not self.at_rest:
            self.outermost = None
        return self.end(module, output)

    def begin(self, number: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A call begins: one that was opened, or that of a mere layer."""
        outermost = self.outermost in (None, module)
        if torch.compiler.is_compiling():
            if (outermost or self.ticket is None) and torch.is_grad_enabled():
                self.ticket, self._ticket_of = self.traced.begin(number, args, kwargs), module
            return
        if not outermost:
            return
        self.ticket = None
        if self.outermost is module:
            plain = not kwargs and all(type(x) is Tensor for x in args)
            self.count(args if plain else tree_leaves((args, kwargs)))
        self._before = self.memory.look(closely=self.first_batch.waiting)
        if self.first_batch.waiting:
            self.first_batch.begin(module, args, kwargs, self.trainable())

    def end(self, module: nn.Module, output: Any) -> Any:
        """It ends, as in :meth:`close`."""
        if self.at_rest:
            return self.first_batch.repeats.note(module, output)
        if self.outermost is None:
            self.shapes = []
            if not torch.compiler.is_compiling():
                before, self._before = self._before, None
                self.memory.compare(before)
        if self.ticket is not None:
            if module is not self._ticket_of:
                return None
            ticket, self.ticket = self.ticket, None
            return self.traced.end(ticket, output)
        return self.first_batch.end(output) if self.first_batch.waiting and self.outermost is None else None

    def count(self, inputs: Iterable[Any]) -> None:
        """The outermost call is on ``inputs``, and on what objects among them hold."""
        tensors = [y for x in inputs for y in ((x,) if isinstance(x, Tensor) else _held(x))]
        self.shapes = [x.shape for x in tensors if x.dim() > self.axis]


def _held(x: Any) -> list[Tensor]:
    """The tensors that a batch of a class of the user's own holds, or none."""
    own = {} if isinstance(x, nn.Module) else getattr(x, "__dict__", {})
    return [y for y in tree_leaves(dict(own)) if isinstance(y, Tensor)]
