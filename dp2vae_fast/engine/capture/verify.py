"""The first batch's gradients, checked against autograd's own.

Hooks see what layers are called with; they cannot see what else a model does. So the first batch is run again, with
the hooks at rest and the same random numbers, and differentiated by autograd with the rows of the output's gradient
weighted by random numbers, one a record. The same numbers weight the captured gradients. Where rows change places
inside the model, a layer works on something else than records, or records are mixed, the two differ. What mixes records
without a gradient (a batch's mean taken from the inputs) is seen by its outputs, when others are changed
(:mod:`.mixing`).

A batch of few records, or one that leaves a parameter without a gradient (a last layer that starts at zero), proves
little; then the next is checked too.

What this cannot see is outside the model: a loss that compares records gives each row a gradient that depends on the
others, before the model's part begins. And what it takes for a fault is a loss on something that the model does not
return (an attribute, a user's hook): autograd then finds less than was captured.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ..gradients.gradient import Gradient
from ..precision import autocast_dtype
from .mixing import what_mixes
from .repeat import Call, CannotRepeat, Repeats, device_of
from .tap import Taps

# How far the two may be apart: a part of the norm that a sum of randomly signed gradients has, and a part of the whole
# model's for parameters whose gradient is nothing but rounding.
_AGREEMENT = {torch.float64: (1e-6, 1e-9), torch.float32: (1e-2, 1e-4)}
_COARSE = (0.2, 1e-2)  # float16 and bfloat16, autocast included
_ENOUGH = 32  # records
_ATTEMPTS = 10  # batches that are checked at most


@dataclass(frozen=True)
class _Captured:
    """A parameter's captured gradients: their weighted sum, None where there are none, and the length of all of them
    together."""

    name: str
    parameter: Tensor
    total: Tensor | None
    size: float


@dataclass(frozen=True)
class _Weighed:
    """What is compared: the calls to run again, the weights of their records, and the sums to be found."""

    calls: list[Call]
    weights: Tensor | None
    records: int
    rows_per_record: int
    captured: list[_Captured]


class FirstBatch:
    """Remembers the outermost calls of the first batch that is differentiated, and checks its gradients.

    Attributes:
        repeats: runs them again.
        waiting: the next batch is to be checked.
        proved: parameters whose gradients have been checked.
    """

    def __init__(self, axis: int, taps: Taps, *, wanted: bool = True) -> None:
        self.repeats = Repeats(axis)
        self.waiting = wanted
        self.proved: set[Tensor] = set()
        self._wanted = wanted
        self._attempts = self._records = 0
        self._taps = taps
        self._open: Call | None = None
        self._without_graph: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._calls: list[Call] = []
        self._refused = ""
        self._weighed: _Weighed | None = None
        self._seen = False  # a gradient of something that the model returned
        self._tried: set[Tensor] = set()  # parameters with gradients in batches that were checked

    def begin(self, module: nn.Module, args: tuple, kwargs: dict, trainable: set[Tensor]) -> None:
        """An outermost call begins, under which ``trainable`` are the parameters with gradients."""
        self._open = None
        if not torch.is_grad_enabled():
            self._without_graph.add(module)
            return
        # Inside a backward pass it is a checkpoint's recomputation, which counts where nothing was seen the first time.
        if torch._C._current_graph_task_id() != -1 and module not in self._without_graph:
            return
        autocast = autocast_dtype(device_of((args, kwargs)).type)
        self._open = self.repeats.remember(module, args, kwargs, trainable, autocast)

    def end(self, output: Any) -> Any:
        """The outermost call ends; its output again, tapped."""
        call, self._open = self._open, None
        if call is None or output is None:
            return None
        leaves, structure = tree_flatten(output)
        call.tapped = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad]
        if not call.tapped:
            if opaque := [x for x in leaves if not isinstance(x, Tensor | int | float | str | None)]:
                self.give_up(f"{type(call.module).__name__} returns a {type(opaque[0]).__name__}")
            return None
        self.repeats.know(call, [leaves[i] for i in call.tapped])

        def report(_: tuple[Tensor, ...], backprops: tuple[Tensor, ...]) -> None:
            if self._taps.reaches_parameters():
                self.arrived(call, [b.detach() for b in backprops])

        for i, x in zip(call.tapped, self._taps.on([leaves[i] for i in call.tapped], [], report), strict=True):
            leaves[i] = x
        return structure.unflatten(leaves)

    def arrived(self, call: Call, backprops: list[Tensor]) -> None:
        """The gradients of a call's outputs."""
        if not self.waiting:
            return
        self._seen = True
        if call.backprops:  # a second loss on the same forward
            call.backprops = [a + b for a, b in zip(call.backprops, backprops, strict=True)]
        else:
            self._calls.append(call)
            call.backprops = backprops

    def forget(self) -> None:
        """The batch's gradients were dropped."""
        for call in self._calls:
            call.backprops = []
        self._calls.clear()

    def wait_for(self, parameters: Iterable[Tensor]) -> None:
        """Check another batch where a parameter has gradients now that never were checked."""
        parameters = set(parameters)
        if not self._wanted or self.proved.issuperset(parameters):
            return
        if not self._tried.issuperset(parameters):  # it had no part in the attempts so far
            self._attempts = 0
        self.waiting = self._attempts < _ATTEMPTS

    def turn_off(self) -> None:
        """Check nothing from now on."""
        self.waiting = self._wanted = False

    def give_up(self, reason: str) -> None:
        """Check nothing from now on, and say why."""
        self.turn_off()
        warnings.warn(
            f"the first batch's gradients could not be checked against autograd's: {reason}. Pass "
            "verify_first_step=False once you have checked them yourself",
            stacklevel=2,
        )

    def weigh(
        self, found: Iterable[tuple[str, Tensor, Sequence[Gradient]]], records: int, rows_per_record: int
    ) -> None:
        """Sum the captured gradients with a random weight a record, for :meth:`compare`, when their memory is free.

        A batch with a record whose gradient is not finite is left to the next one.

        Args:
            found: name, parameter, its captured gradients, one entry a use, of all trainable parameters.
            records: N of the batch, at least 1.
        """
        if self._refused:  # and somebody went on
            raise NotImplementedError(self._refused)
        self._weighed = None
        calls, self._calls = self._calls, []
        if not calls:
            if not self._seen:
                self._refused = (
                    "the loss depends on nothing that the model returned (but on an attribute, or what a hook took?), "
                    "so the gradients cannot be checked against autograd's: return it, or pass verify_first_step=False"
                )
                raise NotImplementedError(self._refused)
            return
        whole = self._every_output_has_rows(calls, records)
        weights = self._random_weights(records) if whole else torch.ones(records)
        captured = [_summed(name, p, uses, weights.to(p.device)) for name, p, uses in found]
        if all(c.size < math.inf for c in captured):
            self._weighed = _Weighed(calls, weights if whole else None, records, rows_per_record, captured)
            return
        self._attempts += 1
        if self._attempts >= _ATTEMPTS:
            self.give_up("every batch so far had a record whose gradient is not finite")

    def _every_output_has_rows(self, calls: list[Call], records: int) -> bool:
        """Whether each has a row a record, or several; the user is warned where one has not.

        Raises:
            NotImplementedError: none of a call's outputs has, and they are no losses.
        """
        axis, whole = self.repeats.axis, True
        for shapes in (call.shapes for call in calls):
            whole &= all(_has_rows(shape, axis, records) for shape in shapes)
            # Of a model whose layers have the batch second, an output may have it first.
            known = any(_has_rows(shape, place, records) for shape in shapes for place in {0, axis})
            if known or all(len(shape) <= axis or shape.numel() == 1 for shape in shapes):
                continue  # the others may be losses, or states with the batch on another axis
            other = next(shape for shape in shapes if len(shape) > axis)
            self._refused = (
                f"the model returns a tensor of shape {tuple(other)}, while its layers saw {records} records: what "
                "they saw may be no records (prompts, classes), or rows are mixed. Return rows of records, in "
                "their order, and freeze layers that work on something else"
            )
            raise NotImplementedError(self._refused)
        if not whole and self._attempts == 0:
            warnings.warn(
                "only the total of the first batch's gradients is checked against autograd's, as the model returns "
                "something that has no row a record (a loss of its own?): rows that it reorders or mixes would "
                "not be noticed",
                stacklevel=3,
            )
        return whole

    def _random_weights(self, records: int) -> Tensor:
        """One a record, of random sign and between 0.5 and 1.5 in size."""
        generator = torch.Generator().manual_seed(self._attempts)
        signs = torch.randint(2, (records,), generator=generator) * 2 - 1
        return signs * (0.5 + torch.rand(records, generator=generator))

    def compare(self) -> None:
        """Compare what :meth:`weigh` left, if anything, with autograd's gradients.

        Raises:
            NotImplementedError: a parameter's gradients are not autograd's, or records are mixed without one.
        """
        weighed, self._weighed = self._weighed, None
        if weighed is None:
            return
        parameters = [c.parameter for c in weighed.captured]
        want: list[Tensor | None] = [None] * len(parameters)
        coarse = False
        try:
            for call in weighed.calls:
                for i, gradient in enumerate(self.repeats.gradients(call, parameters, weighed.weights)):
                    want[i] = _plus(want[i], None if gradient is None else gradient.to(_wide(gradient)))
                coarse |= call.autocast is not None
        except CannotRepeat as reason:
            self.give_up(str(reason))
            return
        whole = math.hypot(*(c.size for c in weighed.captured))
        for captured, total in zip(weighed.captured, want, strict=True):
            p = captured.parameter
            share, floor = _COARSE if coarse else _AGREEMENT.get(p.dtype, _COARSE)
            off = _plus(captured.total, None if total is None else -total)
            distance = 0.0 if off is None else float(off.norm())
            if not distance <= share * captured.size + floor * whole:
                self._refused = (
                    f"the captured gradients of parameter {captured.name!r} are not autograd's (off by {distance:.3g} "
                    f"of {captured.size:.3g}): the model reorders its rows, mixes records, uses the parameter where no "
                    "hook sees it, or one of its layers works on something else than records. Let every layer have the "
                    "batch as its first axis, register a rule with register_layer_rule, or freeze the parameter. (A "
                    "loss on something that the model does not return looks the same: return it, or pass "
                    "verify_first_step=False)"
                )
                raise NotImplementedError(self._refused)
            if captured.size > floor * whole:
                self.proved.add(p)
        for call in weighed.calls:
            if mixed := what_mixes(self.repeats, call, weighed.records, weighed.rows_per_record):
                self._refused = (
                    f"the model mixes records: {type(call.module).__name__} returns {mixed}. Let every record's "
                    "output depend on that record alone: normalise by public constants, or within a record "
                    "(GroupNorm, LayerNorm). (An input as long as the batch that holds no records, a mask of "
                    "positions, looks the same: make it a buffer)"
                )
                raise NotImplementedError(self._refused)
        self._tried.update(c.parameter for c in weighed.captured if c.total is not None)
        self._attempts += 1
        self._records += weighed.records
        enough = self._records >= _ENOUGH and self.proved.issuperset(parameters)
        self.waiting = not enough and self._attempts < _ATTEMPTS


def _summed(name: str, parameter: Tensor, uses: Sequence[Gradient], weights: Tensor) -> _Captured:
    size = sum((float(torch.stack(g.norm_sq()).sum()) for g in uses), 0.0) ** 0.5
    total = None
    for g in uses:
        total = _plus(total, g.weighted_sum(weights).to(_wide(parameter)))
    return _Captured(name, parameter, total, size)


def _has_rows(shape: torch.Size, axis: int, records: int) -> bool:
    """Whether there may be a row a record along ``axis``, or several."""
    return len(shape) > axis and shape[axis] > 0 == shape[axis] % records


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """``a + b``, where None is zero."""
    return b if a is None else a if b is None else a + b
