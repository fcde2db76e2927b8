"""What every layer saw in one backward pass, without its weight gradient: per-sample gradients, until they are taken.

:class:`Capture` sets up the parts and takes them down again. :mod:`.hooks` replace a layer's parameters and tap its
output; :mod:`.calls` follow the call of the whole model around them; :mod:`.book` keeps what the backward pass brings.

What the taps cannot see must not pass in silence:

* a parameter used anywhere else than in its own layer's forward receives an ordinary gradient from autograd, neither
  clipped nor noised: its arrival raises;
* a layer without a rule keeps parameters that autograd differentiates, and the two totals must agree;
* the rows of every layer are counted against the inputs of the outermost call, so that positions or copies folded
  into the batch axis are not taken for records of their own;
* no call in training mode may change a buffer or a parameter, nor anybody until its gradients are taken;
* the first batch's gradients are checked against autograd's own.

:mod:`.guards` and :mod:`.verify` hold these checks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..gradients.gradient import Gradient
from ..gradients.layers import why_not_private
from ..gradients.plan import Plan
from ..gradients.products import add
from . import guards
from .book import Book, Origin
from .calls import Calls
from .hooks import Hooks
from .tap import Taps
from .traced import TracedCalls
from .verify import FirstBatch


class Capture:
    """Hooks on every layer of ``module`` that owns parameters, and the per-sample gradients that they bring.

    Args:
        module: the model; its forward and backward stay the user's.
        batch_first: False where every layer's input and output has the batch as its second axis.
        rows_per_record: consecutive rows of the batch that belong to one record (K samples of a latent, augmentations).
        plan: decides per parameter whether its gradients are formed and kept.
        verify: check the first batch's gradients against autograd's (:mod:`.verify`): one more forward and backward.

    Row i of every layer must be of record ``i // rows_per_record``, and the loss a sum or mean over records: one that
    compares records looks the same to the hooks.

    Raises:
        NotImplementedError: a layer in training mode mixes records (batch normalisation, running statistics).
        ValueError: the module's gradients are captured already.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        batch_first: bool = True,
        rows_per_record: int = 1,
        plan: Plan | None = None,
        verify: bool = True,
    ) -> None:
        self.module = module
        self.batch_first = batch_first
        self.set_rows_per_record(rows_per_record)
        self.plan = plan or Plan()
        self.grad_accumulation_allowed = True
        self.draws: Callable[[], set[Origin]] = set  # those that a forward may be on, where somebody knows
        self.owners: dict[Tensor, Callable[[], None]] = {}  # parameter -> takes its gradients before the next batch
        self._names: dict[Tensor, str] = {p: name for name, p in module.named_parameters()}
        self._guarded: set[Tensor] = set()
        self._handles: list[Any] = []  # what remove() takes off
        axis = 0 if batch_first else 1
        self.taps = Taps()
        self.book = Book()
        self.first_batch = FirstBatch(axis, self.taps, wanted=verify)
        self.traced = TracedCalls(self)
        self.memory = guards.Memory(module)
        self.calls = Calls(axis, self.first_batch, self.traced, self.memory, self.trainable)
        self.hooks: list[Hooks] = []  # one a module, in their order
        if any(Hooks.are_on(layer) for layer in module.modules()):
            raise ValueError("the module is private already: call cleanup() on what make_private returned for it")
        refusals = {
            layer: guards.refuse_in_training(f"layer {name!r} ({type(layer).__name__}) {reason}")
            for name, layer in module.named_modules()
            if (reason := why_not_private(layer))
        }
        for layer, refuse in refusals.items():  # before any hook is on: what is refused stays as it was
            refuse(layer, ())
        for number, (name, layer) in enumerate(module.named_modules()):
            if layer in refusals:
                self._handles.append(layer.register_forward_pre_hook(refusals[layer]))
            self.hooks.append(Hooks(self, number, name, layer))
        self._handles += self.hooks
        self._guard(self._names)

    @property
    def attached(self) -> bool:
        """False once the hooks are off the module."""
        return bool(self._handles)

    def set_rows_per_record(self, rows: int) -> None:
        """Rows of the batch that belong to one record, from the next forward on."""
        if rows < 1:
            raise ValueError(f"rows_per_record is {rows}: give the number of rows of one record, at least 1")
        self.rows_per_record = rows

    def name_of(self, parameter: Tensor) -> str:
        """The parameter's name in the module."""
        return self._names.get(parameter, "?")

    def trainable(self) -> set[Tensor]:
        """The parameters with gradients, at present."""
        return {p for p in self._names if p.requires_grad}

    def _guard(self, parameters: Iterable[Tensor]) -> None:
        """Refuse ordinary gradients of ``parameters``, such as were unfrozen since the last call included."""
        capture = weakref.ref(self)  # garbage collection does not see through hooks on a parameter

        def watching() -> bool:
            return (found := capture()) is not None and not found.calls.at_rest

        for p in parameters:
            if p.requires_grad and p not in self._guarded:
                self._guarded.add(p)
                self._handles += guards.refuse_unseen_use(self.name_of(p), p, watching)

    # The gradients of the batch ------------------------------------------------------------------------------------

    @property
    def records(self) -> int | None:
        """Records of the backward passes since the last :meth:`take` or :meth:`clear`; None if there was none."""
        return self.book.records

    @property
    def origins(self) -> set[Origin]:
        """What the captured gradients come from: this batch, and the draws that its forwards were on."""
        return self.book.origins

    def holds(self, parameters: Iterable[Tensor]) -> bool:
        """Whether gradients of any of ``parameters`` wait to be taken."""
        return self.book.holds(parameters)

    def begin_batch(self) -> None:
        """Where gradients of another batch are in the book, see that they are taken."""
        # A forward outside any backward pass, after one: these are new records. (Inside one it is a checkpoint's
        # recomputation.)
        if self.book.records is not None and torch._C._current_graph_task_id() == -1:
            for close_batch in {self.owners[p] for p in self.book.uses if p in self.owners}:
                close_batch()
            if self.book.records is not None:
                names = ", ".join(repr(self.name_of(p)) for p in self.book.uses)
                raise RuntimeError(
                    f"a second batch began before the first one's gradients were taken (of {names}): call step() or "
                    "zero_grad() of the optimizer that holds these parameters, or freeze them where none does"
                )

    def take(self, parameters: Sequence[Tensor]) -> list[Gradient | None]:
        """Remove and return the gradients of ``parameters``; None for one that no record used.

        Nothing may be made of them that is released before :meth:`check_first_batch` has passed.

        Raises:
            RuntimeError: what they are made from has been overwritten since the backward pass.
            NotImplementedError: a buffer or a parameter was changed since the forward.
        """
        if self.book.records is not None:
            try:
                self.memory.compare_since()
            except NotImplementedError:
                self.drop(parameters)
                raise
        changed = self.book.overwritten()
        if self.taps.lost():
            self.drop(parameters)
            raise RuntimeError(
                "a compiled model's backward pass ran without the gradients of every layer arriving (merged by the "
                "compiler, or replayed): do not compile it"
            )
        if self.first_batch.waiting and self.book.records and not changed:
            self._weigh_first_batch()
        elif not self.first_batch.waiting:
            self.first_batch.wait_for(p for p in parameters if p in self.book.uses and p in self._names)
        found = self.drop(parameters)
        if changed and any(found):
            raise RuntimeError(
                f"the input of layer {changed[0]!r} was modified in place between the backward pass and the step: "
                "step first"
            )
        whole = [None if uses is None else add(uses) for uses in found]
        self.plan.prepare([(self.name_of(p), g) for p, g in zip(parameters, whole, strict=True) if g is not None][::-1])
        return [
            None if g is None else self.plan.realize(self.name_of(p), g) for p, g in zip(parameters, whole, strict=True)
        ]

    def _weigh_first_batch(self) -> None:
        """Prepare the check of the whole book, whichever part of it is asked for."""
        # By a plan of its own: it sees uses one by one, and what it settled would show in later batches whether this
        # one had been the first.
        plan = replace(self.plan, public_shapes=True)
        plan.prepare([(self.name_of(p), g) for p, uses in self.book.uses.items() for g in uses])
        found = (
            (name, p, [plan.realize(name, g) for g in self.book.uses.get(p, [])])
            for p, name in self._names.items()
            if p.requires_grad and p not in self.book.dropped
        )
        self.first_batch.weigh(found, self.book.records or 0, self.rows_per_record)

    def check_first_batch(self) -> None:
        """Compare the gradients last taken with autograd's, where they are to be checked.

        For when they have been used up: the model is run again, and by then their memory is free.

        Raises:
            NotImplementedError: they are not autograd's.
        """
        with self.calls.resting():
            self.first_batch.compare()

    def drop(self, parameters: Sequence[Tensor]) -> list[list[Gradient] | None]:
        """Remove the gradients of ``parameters``, whatever has become of what they are made from."""
        self._guard(parameters)
        found = self.book.drop(parameters)
        if not self.book.uses:
            self.clear()
        return found

    def clear(self) -> None:
        """Forget what was captured."""
        self.book.clear()
        self.taps.lost()  # and begins to count anew
        self.memory.forget()
        self.first_batch.forget()

    def remove(self) -> None:
        """Take every hook off the module again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()

    def __deepcopy__(self, memo: dict) -> Capture:
        """The same: the copy of a captured module carries its hooks, which pass over it."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a private module holds hooks: save its state_dict(), or to_standard_module() after training")
