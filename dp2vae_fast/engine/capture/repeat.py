"""Outermost calls of the model that can be run again, and autograd's gradients of a second run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from ..precision import autocast_as

_SAME = {torch.float64: 1e-8, torch.float32: 1e-4}  # how equal a second run must be, and otherwise 1e-2
KNOWN_BY = 64  # rows of an output that a second run must give again


@dataclass
class Call:
    """One outermost call, as it can be run again."""

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
    draws: bool = False  # random numbers
    again: list[Tensor] = field(default_factory=list)  # the outputs of a second run
    drawn: dict[torch.device, Tensor] = field(default_factory=dict)  # the state of random numbers after it


class CannotRepeat(Exception):
    """Why a call cannot be run again as it was."""


class Repeats:
    """Remembers calls and runs them again, while hooks are at rest.

    Args:
        axis: where inputs and outputs have the batch.

    Attributes:
        drawn: the state of random numbers after the last run.
        choice: of records to look at.
    """

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self._repeating: Call | None = None
        self._repeated: list[Any] = []
        self.drawn: dict[torch.device, Tensor] = {}
        self.choice = torch.Generator().manual_seed(0)

    def remember(
        self, module: nn.Module, args: tuple, kwargs: dict, trainable: set[Tensor], autocast: torch.dtype | None
    ) -> Call:
        """A call as it can be run again."""
        random = _random_states(device_of((args, kwargs)))
        # Contiguous: PyTorch 2.13 crashes in the backward pass of a GroupNorm that comes first on channels-last images.
        args, kwargs = tree_map(_copy, (args, kwargs))
        return Call(module, args, kwargs, trainable, random, autocast)

    def know(self, call: Call, outputs: Sequence[Tensor]) -> None:
        """What a second run must give again."""
        call.shapes = [x.shape for x in outputs]
        call.outputs = [self._first_rows(x.detach()).clone() for x in outputs]
        now = _random_states(device_of((call.args, call.kwargs)))
        call.draws = not same_states(call.random, now)

    def note(self, module: nn.Module, output: Any) -> None:
        """While a call is run again: a container returned ``output``; hooks that came later may still change it."""
        if self._repeating is not None and module is self._repeating.module:
            self._repeated, _ = tree_flatten(output)

    def gradients(self, call: Call, parameters: list[Tensor], weights: Tensor | None) -> list[Tensor | None]:
        """Autograd's gradients of ``parameters`` from one call, with its output gradients weighted by record."""
        used = [p for p in parameters if p in call.trainable]
        if not used:
            return [None] * len(parameters)
        backprops, call.backprops = call.backprops, []
        if weights is not None:
            backprops = [self._weighted(b, weights) for b in backprops]
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

    def run(self, call: Call, inputs: tuple[tuple, dict]) -> list[Tensor]:
        """The tapped outputs of a run on ``inputs``, with their graph.

        Raises:
            CannotRepeat: it does not return such outputs.
        """
        name = type(call.module).__name__
        self._repeating, self._repeated = call, []
        try:
            _set_random_states(call.random)
            with torch.enable_grad(), autocast_as(device_of(inputs).type, call.autocast):
                args, kwargs = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs)
                call.module(*args, **kwargs)
            self.drawn = _random_states(device_of(inputs))
            outputs = [x for i, x in enumerate(self._repeated) if i in call.tapped and isinstance(x, Tensor)]
        except Exception as error:
            raise CannotRepeat(f"a second run of {name} raises {error!r}") from error
        finally:
            self._repeating, self._repeated = None, []
        if len(outputs) != len(call.tapped):
            raise CannotRepeat(f"a second run of {name} returns something else")
        return outputs

    def _run_again(self, call: Call) -> list[Tensor]:
        """The same of a run on the call's own inputs.

        Raises:
            CannotRepeat: they are not those of the first.
        """
        outputs = self.run(call, (call.args, call.kwargs))
        for again, shape, before in zip(outputs, call.shapes, call.outputs, strict=True):
            size = float(before.abs().max()) if before.numel() else 0.0
            same = 1e-2 if call.autocast else _SAME.get(before.dtype, 1e-2)
            close = again.shape == shape and torch.allclose(
                self._first_rows(again.detach()), before, same, 0.1 * same * size, True
            )
            if not close:
                raise CannotRepeat(
                    f"a second run of {type(call.module).__name__} on the same inputs, from the same state of "
                    "PyTorch's random numbers, gives something else"
                )
        call.again, call.drawn = [x.detach() for x in outputs], self.drawn
        return outputs

    def _weighted(self, x: Tensor, weights: Tensor) -> Tensor:
        rows = weights.repeat_interleave(x.shape[self.axis] // len(weights)).to(x.device, x.dtype)
        return x * rows.reshape(*[1] * self.axis, -1, *[1] * (x.dim() - self.axis - 1))

    def _first_rows(self, x: Tensor) -> Tensor:
        return x.narrow(self.axis, 0, min(KNOWN_BY, x.shape[self.axis])) if x.dim() > self.axis else x


def device_of(inputs: Any) -> torch.device:
    """That of the first tensor among ``inputs``."""
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


def same_states(before: dict[torch.device, Tensor], after: dict[torch.device, Tensor]) -> bool:
    """Whether no random number was drawn between the two."""
    return all(torch.equal(after[device], state) for device, state in before.items())


def _set_random_states(states: dict[torch.device, Tensor]) -> None:
    for device, state in states.items():
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, device)
