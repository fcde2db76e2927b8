"""Taps in a graph made by ``torch.compile``, where hooks run once, while it is traced, and never again.

What hooks must do in every batch is in three opaque ops, which find their :class:`~.capture.Capture` by a number:

``capture_begin``   an outermost call begins on these inputs; returns its ticket, a number
``capture_end``     it ends with these outputs; returns the ticket
``capture_report``  in the backward pass: a layer's input and output gradient; returns a one

A compiler keeps an op for its result only. A report's is the gradient of the taps' anchor, which so counts the reports
of the graph: fewer that ran (two merged into one, a replay without Python) are an error. ``use`` tells apart two that
are equal otherwise. Tickets are outputs of the graph, each made ``after`` the one before, since what only the backward
pass needs may be left to it. And a compiler writes into memory that its graph no longer needs: what is kept is copied.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from ..precision import autocast_dtype, full_precision
from . import guards
from .repeat import Call

if TYPE_CHECKING:
    from .book import Origin
    from .capture import Capture

_LIBRARY = torch.library.Library("dp2vae_fast", "FRAGMENT")
_NOT_IN_CUDA_GRAPHS = (torch.Tag.cudagraph_unsafe,)
_LIBRARY.define(
    "capture_begin(int capture, int module, Tensor after, Tensor[] inputs, str[] names, bool whole, int[] trained, "
    "ScalarType? autocast) -> Tensor",
    tags=_NOT_IN_CUDA_GRAPHS,
)
_LIBRARY.define(
    "capture_end(int capture, Tensor ticket, Tensor[] outputs, int[] tapped) -> Tensor", tags=_NOT_IN_CUDA_GRAPHS
)
_LIBRARY.define(
    "capture_report(int capture, int layer, str[] keys, int use, Tensor ticket, Tensor[] saved, Tensor[] backprops)"
    " -> Tensor",
    tags=_NOT_IN_CUDA_GRAPHS,
)

_CALLS_KEPT = 64  # calls whose backward pass may still come
_MODEL = -1  # in place of a layer's number: the outermost call itself
_numbers = itertools.count()
_captures: weakref.WeakValueDictionary[int, TracedCalls] = weakref.WeakValueDictionary()


@dataclass
class _TracedCall:
    """What is known of an outermost call when its backward pass comes."""

    inputs: list[torch.Size]
    draws: set[Origin]
    first: Call | None  # to be checked against autograd
    before: guards.Look | None  # until the first report: in a compiled graph buffers change at its end


class TracedCalls:
    """The traced side of a capture: what its hooks put into a graph, and what the graph's ops then do."""

    def __init__(self, capture: Capture) -> None:
        self.number = next(_numbers)
        self._capture = capture
        self._calls: dict[int, _TracedCall] = {}
        self._tickets = itertools.count()
        self._latest = torch.tensor(-1)  # ticket
        self._uses = 0  # of this trace
        _captures[self.number] = self

    # While a graph is traced ---------------------------------------------------------------------------------------

    def begin(self, module: int, args: tuple, kwargs: dict) -> Tensor:
        """The ticket of a call of the capture's module number ``module``."""
        self._uses = 0
        values = [*args, *kwargs.values()]
        inputs = [x for x in tree_flatten(values)[0] if isinstance(x, Tensor)]
        device = inputs[0].device.type if inputs else "cpu"
        whole = len(inputs) == len(values) and all(isinstance(x, Tensor) for x in values)
        self._latest = torch.ops.dp2vae_fast.capture_begin(
            self.number, module, self._latest, inputs, list(kwargs), whole, self._trained(), autocast_dtype(device)
        )
        return self._latest

    def tap(self, ticket: Tensor, layer: int, keys: list[str], activations: Tensor, output: Tensor) -> Tensor:
        """``output`` again; its gradient will be reported as that of the capture's layer number ``layer``."""
        return self._on([output], [activations], ticket, layer, keys)[0]

    def end(self, ticket: Tensor, output: Any) -> Any:
        """The call's output again, tapped."""
        leaves, structure = tree_flatten(output)
        tapped = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad]
        if not tapped:
            return None
        outputs = [leaves[i] for i in tapped]
        self._latest = ticket = torch.ops.dp2vae_fast.capture_end(self.number, ticket, outputs, tapped)
        for i, x in zip(tapped, self._on(outputs, [], ticket, _MODEL, []), strict=True):
            leaves[i] = x
        return structure.unflatten(leaves)

    def _on(
        self, outputs: list[Tensor], saved: list[Tensor], ticket: Tensor, layer: int, keys: list[str]
    ) -> tuple[Tensor, ...]:
        self._uses += 1
        anchor = self._capture.taps.anchor.to(outputs[0].device)
        where = (self.number, layer, keys, self._uses)
        return _TracedIdentity.apply(*where, len(outputs), anchor, ticket, *outputs, *saved)

    def _trained(self) -> list[int]:
        """Which of the parameters, in the order of hooks, have gradients."""
        every = [hooks.module._parameters.get(key) for hooks in self._capture.hooks for key in hooks.keys]
        return [i for i, p in enumerate(every) if p is not None and p.requires_grad]

    # While it runs ---------------------------------------------------------------------------------------------------

    def begun(
        self,
        module: int,
        inputs: Sequence[Tensor],
        names: Sequence[str],
        whole: bool,
        trained: Sequence[int],
        autocast: Any,
    ) -> int:
        capture, number = self._capture, next(self._tickets)
        if not capture.attached:
            raise RuntimeError("the model was compiled while it was private, and is no longer: compile it again")
        if list(trained) != self._trained():  # torch 2.11's compiler does not look
            raise RuntimeError(
                "parameters were frozen or thawed since the model was compiled: call torch.compiler.reset() to have it "
                "compiled again"
            )
        if torch._C._current_graph_task_id() != -1:
            raise NotImplementedError(
                "the forward of a compiled model runs again in its backward pass (checkpointing, an activation memory "
                "budget): leave that out, or do not compile it"
            )
        if capture.records is not None:  # take them, which may check them against autograd: here there is none
            with ThreadPoolExecutor(1) as plain:
                plain.submit(capture.begin_batch).result()
        calls, first_batch, first = capture.calls, capture.first_batch, None
        called = capture.hooks[module].module
        if calls.outermost in (None, called):
            calls.count(inputs)
            if first_batch.waiting and not whole:
                first_batch.give_up("a compiled model is called with something else than tensors")
            elif first_batch.waiting:
                positional = len(inputs) - len(names)
                args, kwargs = tuple(inputs[:positional]), dict(zip(names, inputs[positional:], strict=True))
                first = first_batch.repeats.remember(called, args, kwargs, capture.trainable(), autocast)
            else:
                for call in self._calls.values():
                    call.first = None
        before = capture.memory.look(closely=first_batch.waiting)
        self._calls[number] = _TracedCall(calls.shapes, capture.draws(), first, before)
        while len(self._calls) > _CALLS_KEPT:
            del self._calls[next(iter(self._calls))]
        return number

    def ended(self, ticket: int, outputs: Sequence[Tensor], tapped: Sequence[int]) -> None:
        if (first := self._call(ticket).first) is not None:
            first.tapped = list(tapped)
            self._capture.first_batch.repeats.know(first, outputs)

    def reported(
        self, layer: int, keys: Sequence[str], ticket: int, saved: Sequence[Tensor], backprops: Sequence[Tensor]
    ) -> None:
        capture, call = self._capture, self._call(ticket)
        if not capture.taps.wants_report():
            return
        capture.taps.arrived += 1
        before, call.before = call.before, None
        capture.memory.compare(before)
        if layer != _MODEL:
            use = saved[0].clone(), [b.clone() for b in backprops]
            capture.hooks[layer].record_traced(keys, *use, call.inputs, call.draws)
        elif call.first is not None:
            capture.first_batch.arrived(call.first, [b.clone() for b in backprops])

    def _call(self, ticket: int) -> _TracedCall:
        if ticket not in self._calls:
            raise RuntimeError(
                f"the model was called over {_CALLS_KEPT} times before this backward pass: call it sooner"
            )
        return self._calls[ticket]


class _TracedIdentity(torch.autograd.Function):
    """Identity on outputs, whose backward is a ``capture_report``."""

    @staticmethod
    def forward(
        ctx: Any, capture: int, layer: int, keys: list[str], use: int, count: int, anchor: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.where, ctx.count = (capture, layer, keys, use), count
        ctx.save_for_backward(tensors[0], *tensors[1 + count :])
        return tuple(output.detach() for output in tensors[1 : 1 + count])

    @staticmethod
    def backward(ctx: Any, *backprops: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ticket, *saved = ctx.saved_tensors
        one = torch.ops.dp2vae_fast.capture_report(*ctx.where, ticket, saved, list(backprops))
        return (None, None, None, None, None, one, None, *backprops, *(None for _ in saved))


def _find(capture: int) -> TracedCalls:
    if capture not in _captures:
        raise RuntimeError("a graph was compiled of a private model that is gone")
    return _captures[capture]


def _begin(capture: int, module: int, after: Tensor, *call: Any) -> Tensor:
    return torch.tensor(_find(capture).begun(module, *call))


def _end(capture: int, ticket: Tensor, outputs: Sequence[Tensor], tapped: Sequence[int]) -> Tensor:
    _find(capture).ended(int(ticket), outputs, tapped)
    return ticket.clone()


def _report(
    capture: int,
    layer: int,
    keys: Sequence[str],
    use: int,
    ticket: Tensor,
    saved: Sequence[Tensor],
    backprops: Sequence[Tensor],
) -> Tensor:
    with full_precision(backprops):
        _find(capture).reported(layer, keys, int(ticket), saved, backprops)
    return torch.ones((), device=backprops[0].device)


for _name, _kernel, _fake in (
    ("capture_begin", _begin, lambda *_: torch.empty((), dtype=torch.int64)),
    ("capture_end", _end, lambda capture, ticket, *_: torch.empty_like(ticket)),
    ("capture_report", _report, lambda *arguments: torch.empty((), device=arguments[-1][0].device)),
):
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    _LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"dp2vae_fast::{_name}", _fake, lib=_LIBRARY)
