"""The first batch's gradients, checked against autograd's own.

Hooks see what layers are called with; they cannot see what else a model does. So the first batch is run again, with
the hooks at rest and the same random numbers, and differentiated by autograd with the rows of the output's gradient
weighted by random numbers, one a record. The same numbers weight the captured gradients. Where rows change places
inside the model, a layer works on something else than records, or records are mixed, the two differ.

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
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from .gradients import Gradient
from .precision import autocast_as, autocast_dtype
from .tap import Taps

# How far the two may be apart: a part of the norm that a sum of randomly signed gradients has, and a part of the whole
# model's for parameters whose gradient is nothing but rounding.
_AGREEMENT = {torch.float64: (1e-6, 1e-9), torch.float32: (1e-2, 1e-4)}
_COARSE = (0.2, 1e-2)  # float16 and bfloat16, autocast included
_SAME = {torch.float64: 1e-8, torch.float32: 1e-4}  # how equal a second run must be, and otherwise 1e-2
_ENOUGH = 32  # records
_ATTEMPTS = 10  # batches that are checked at most
_KNOWN_BY = 64  # rows of an output that a second run must give again


@dataclass
class Call:
    """One outermost call of the first batch, as it can be run again."""

    module: nn.Module
    args: tuple
    kwargs: dict
    trainable: set[Tensor]
    random: dict[torch.device, Tensor]
    autocast: torch.dtype | None
    tapped: list[int] = field(default_factory=list)  # which leaves of the output
    shapes: list[torch.Size] = field(default_factory=list)  # of these
    outputs: list[Tensor] = field(default_factory=list)  # the first rows of them, to know them again
    backprops: list[Tensor] = field(default_factory=list)


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
    """What is compared: the calls to run again, the weights of their rows, and the sums to be found."""

    calls: list[Call]
    rows: Tensor | None
    records: int
    captured: list[_Captured]


class _CannotRepeat(Exception):
    """Why a call cannot be run again as it was."""


class FirstBatch:
    """Remembers the outermost calls of the first batch that is differentiated, and checks its gradients.

    Attributes:
        waiting: the next batch is to be checked.
        proved: parameters whose gradients have been checked.
    """

    def __init__(self, axis: int, taps: Taps, *, wanted: bool = True) -> None:
        self.axis = axis
        self.waiting = wanted
        self.proved: set[Tensor] = set()
        self._wanted = wanted
        self._attempts = self._records = 0
        self._taps = taps
        self._open: Call | None = None
        self._without_graph: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._calls: list[Call] = []
        self._repeating: Call | None = None
        self._repeated: list[Any] = []
        self._refused = ""
        self._weighed: _Weighed | None = None

    def begin(self, module: nn.Module, args: tuple, kwargs: dict, trainable: set[Tensor]) -> None:
        """An outermost call begins, under which ``trainable`` are the parameters with gradients."""
        self._open = None
        if not torch.is_grad_enabled():
            self._without_graph.add(module)
            return
        # Inside a backward pass it is a checkpoint's recomputation, which counts where nothing was seen the first time.
        if torch._C._current_graph_task_id() != -1 and module not in self._without_graph:
            return
        device = _device((args, kwargs))
        self._open = self.remember(module, args, kwargs, trainable, autocast_dtype(device.type))

    def remember(
        self, module: nn.Module, args: tuple, kwargs: dict, trainable: set[Tensor], autocast: torch.dtype | None
    ) -> Call:
        """A call as it can be run again."""
        random = _random_states(_device((args, kwargs)))
        # Contiguous: PyTorch 2.13 crashes in the backward pass of a GroupNorm that comes first on channels-last images.
        args, kwargs = tree_map(_copy, (args, kwargs))
        return Call(module, args, kwargs, trainable, random, autocast)

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
        self.know(call, [leaves[i] for i in call.tapped])

        def report(_: tuple[Tensor, ...], backprops: tuple[Tensor, ...]) -> None:
            if self._taps.reaches_parameters():
                self.arrived(call, [b.detach() for b in backprops])

        for i, x in zip(call.tapped, self._taps.on([leaves[i] for i in call.tapped], [], report), strict=True):
            leaves[i] = x
        return structure.unflatten(leaves)

    def know(self, call: Call, outputs: Sequence[Tensor]) -> None:
        """What a second run must give again."""
        call.shapes = [x.shape for x in outputs]
        call.outputs = [self._first_rows(x.detach()).clone() for x in outputs]

    def arrived(self, call: Call, backprops: list[Tensor]) -> None:
        """The gradients of a call's outputs."""
        if not self.waiting:
            return
        if call.backprops:  # a second loss on the same forward
            call.backprops = [a + b for a, b in zip(call.backprops, backprops, strict=True)]
        else:
            self._calls.append(call)
            call.backprops = backprops

    def note(self, module: nn.Module, output: Any) -> None:
        """While a call is run again: a container returned ``output``; hooks that came later may still change it."""
        if self._repeating is not None and module is self._repeating.module:
            self._repeated, _ = tree_flatten(output)

    def forget(self) -> None:
        """The batch's gradients were dropped."""
        for call in self._calls:
            call.backprops = []
        self._calls.clear()

    def wait_for(self, parameters: Iterable[Tensor]) -> None:
        """Check another batch where a parameter has gradients now that never were checked."""
        if self._wanted and self._attempts < _ATTEMPTS and not self.proved.issuperset(parameters):
            self.waiting = True

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
            return
        generator = torch.Generator().manual_seed(self._attempts)
        signs = (torch.randint(2, (records,), generator=generator) * 2 - 1) * (
            0.5 + torch.rand(records, generator=generator)
        )
        rows = signs.repeat_interleave(rows_per_record)
        if not all(len(s) > self.axis and s[self.axis] == len(rows) for call in calls for s in call.shapes):
            signs, rows = torch.ones(records), None
            if self._attempts == 0:
                warnings.warn(
                    "only the total of the first batch's gradients is checked against autograd's, as the model returns "
                    "something that has no row a record (a loss of its own?): rows that it reorders or mixes would "
                    "not be noticed",
                    stacklevel=2,
                )
        captured = []
        for name, p, uses in found:
            size = sum((float(torch.stack(g.norm_sq()).sum()) for g in uses), 0.0) ** 0.5
            if not size < math.inf:
                self._attempts += 1
                if self._attempts >= _ATTEMPTS:
                    self.give_up("every batch so far had a record whose gradient is not finite")
                return
            weights, total = signs.to(p.device), None
            for g in uses:
                total = _plus(total, g.weighted_sum(weights).to(_wide(p)))
            captured.append(_Captured(name, p, total, size))
        self._weighed = _Weighed(calls, rows, records, captured)

    def compare(self) -> None:
        """Compare what :meth:`weigh` left, if anything, with autograd's gradients.

        Raises:
            NotImplementedError: a parameter's gradients are not autograd's.
        """
        weighed, self._weighed = self._weighed, None
        if weighed is None:
            return
        parameters = [c.parameter for c in weighed.captured]
        want: list[Tensor | None] = [None] * len(parameters)
        coarse = False
        try:
            for call in weighed.calls:
                for i, gradient in enumerate(self._repeat(call, parameters, weighed.rows)):
                    want[i] = _plus(want[i], None if gradient is None else gradient.to(_wide(gradient)))
                coarse |= call.autocast is not None
        except _CannotRepeat as reason:
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
        self._attempts += 1
        self._records += weighed.records
        enough = self._records >= _ENOUGH and self.proved.issuperset(parameters)
        self.waiting = not enough and self._attempts < _ATTEMPTS

    def _first_rows(self, x: Tensor) -> Tensor:
        return x.narrow(self.axis, 0, min(_KNOWN_BY, x.shape[self.axis])) if x.dim() > self.axis else x

    def _repeat(self, call: Call, parameters: list[Tensor], rows: Tensor | None) -> list[Tensor | None]:
        """Autograd's gradients of ``parameters`` from one call, with its output gradients weighted by ``rows``."""
        used = [p for p in parameters if p in call.trainable]
        if not used:
            return [None] * len(parameters)
        backprops, call.backprops = call.backprops, []
        if rows is not None:
            leading = [1] * self.axis
            backprops = [
                b * rows.to(b.device, b.dtype).reshape(*leading, -1, *[1] * (b.dim() - self.axis - 1))
                for b in backprops
            ]
        found = None
        with torch.random.fork_rng([d for d in call.random if d.type != "cpu"]):
            for differentiate in (_by_grad, _by_backward):
                outputs = self._run_again(call)
                live = [(x, b) for x, b in zip(outputs, backprops, strict=True) if x.requires_grad]
                del outputs
                if (found := differentiate(live, used, call.trainable)) is not None:
                    break
        assert found is not None
        gradients = dict(zip(used, found, strict=True))
        return [gradients.get(p) for p in parameters]

    def _run_again(self, call: Call) -> list[Tensor]:
        """The tapped outputs of a second run, with their graph.

        Raises:
            _CannotRepeat: they are not those of the first.
        """
        name = type(call.module).__name__
        self._repeating, self._repeated = call, []
        try:
            _set_random_states(call.random)
            with torch.enable_grad():
                try:
                    args, kwargs = tree_map(
                        lambda x: x.clone() if isinstance(x, Tensor) else x, (call.args, call.kwargs)
                    )
                    with autocast_as(_device((args, kwargs)).type, call.autocast):
                        call.module(*args, **kwargs)
                except Exception as error:
                    raise _CannotRepeat(f"a second run of {name} raises {error!r}") from error
            outputs = [x for i, x in enumerate(self._repeated) if i in call.tapped and isinstance(x, Tensor)]
        finally:
            self._repeating, self._repeated = None, []
        if len(outputs) != len(call.tapped):
            raise _CannotRepeat(f"a second run of {name} returns something else")
        for again, shape, before in zip(outputs, call.shapes, call.outputs, strict=True):
            size = float(before.abs().max()) if before.numel() else 0.0
            same = 1e-2 if call.autocast else _SAME.get(before.dtype, 1e-2)
            close = again.shape == shape and torch.allclose(
                self._first_rows(again.detach()), before, same, 0.1 * same * size, True
            )
            if not close:
                raise _CannotRepeat(
                    f"a second run of {name} on the same inputs, from the same state of PyTorch's random numbers, "
                    "gives something else"
                )
        return outputs


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """``a + b``, where None is zero."""
    return b if a is None else a if b is None else a + b


def _device(inputs: Any) -> torch.device:
    return next((x.device for x in tree_leaves(inputs) if isinstance(x, Tensor)), torch.device("cpu"))


def _copy(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    return x.detach().clone(memory_format=torch.contiguous_format).requires_grad_(x.requires_grad)


def _by_grad(
    outputs: list[tuple[Tensor, Tensor]], parameters: list[Tensor], trainable: set[Tensor]
) -> Sequence[Tensor | None] | None:
    """None where reentrant checkpointing forbids this way, or may hide a parameter from it."""
    if not outputs:
        return [None] * len(parameters)
    tensors, backprops = zip(*outputs, strict=True)
    try:
        found = torch.autograd.grad(tensors, parameters, backprops, allow_unused=True)
    except RuntimeError as error:
        if "checkpoint" not in str(error).lower():
            raise
        return None
    return found if all(gradient is not None for gradient in found) else None


def _by_backward(
    outputs: list[tuple[Tensor, Tensor]], parameters: list[Tensor], trainable: set[Tensor]
) -> Sequence[Tensor | None]:
    """An ordinary backward pass, which changes no ``.grad`` of the ``trainable`` parameters."""
    tensors, backprops = zip(*outputs, strict=True)
    before = {p: p.grad for p in trainable}
    try:
        for p in trainable:
            p.grad = None
        torch.autograd.backward(tensors, backprops)
        return [p.grad for p in parameters]
    finally:
        for p, gradient in before.items():
            p.grad = gradient


def _random_states(device: torch.device) -> dict[torch.device, Tensor]:
    states = {torch.device("cpu"): torch.get_rng_state()}
    if device.type == "cuda":
        states[device] = torch.cuda.get_rng_state(device)
    return states


def _set_random_states(states: dict[torch.device, Tensor]) -> None:
    for device, state in states.items():
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, device)
