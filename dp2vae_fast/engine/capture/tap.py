"""An identity node in the autograd graph that reports the gradients which pass through it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..precision import full_precision

Report = Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], None]


class _Identity(torch.autograd.Function):
    """Identity on a call's outputs; its backward reports (saved tensors, output gradients) and lets the gradients
    pass."""

    @staticmethod
    def forward(ctx: Any, report: Report, count: int, anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        # `anchor` requires a gradient, so that the node exists even where the call's input needs none.
        ctx.report, ctx.count = report, count
        ctx.save_for_backward(*tensors[count:])
        return tuple(output.detach() for output in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *backprops: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved = ctx.saved_tensors
        with full_precision(backprops):
            ctx.report(saved, backprops)
        return (None, None, None, *backprops, *(None for _ in saved))


class Taps:
    """Puts taps on outputs, and knows a backward pass towards parameters from one towards inputs only.

    Attributes:
        arrived: reports of compiled graphs (:mod:`.traced`), each of which adds a one to the anchor's gradient.
    """

    def __init__(self) -> None:
        self.anchor = torch.zeros((), requires_grad=True)
        self.arrived = 0
        # One a device: to copy the one there is would wait for the device at every tap, and cannot be captured.
        self._anchors = {self.anchor.device: self.anchor}
        self._nodes = [torch.autograd.graph.get_gradient_edge(self.anchor).node]

    def _anchor_on(self, device: torch.device) -> Tensor:
        if device not in self._anchors:
            anchor = self._anchors[device] = torch.zeros((), device=device, requires_grad=True)
            self._nodes.append(torch.autograd.graph.get_gradient_edge(anchor).node)
        return self._anchors[device]

    def on(self, outputs: Sequence[Tensor], saved: Sequence[Tensor], report: Report) -> tuple[Tensor, ...]:
        """``outputs`` again; when a backward pass comes through, ``report(saved, output gradients)`` is called."""
        return _Identity.apply(report, len(outputs), self._anchor_on(outputs[0].device), *outputs, *saved)

    def reaches_parameters(self) -> bool:
        """Inside a backward pass: false under ``torch.autograd.grad`` with respect to inputs alone, which passes
        through the taps too and means no parameter."""
        return any(torch._C._will_engine_execute_node(node) for node in self._nodes)

    def wants_report(self) -> bool:
        """Inside a tap's backward: false in a backward pass that means no parameter.

        Raises:
            NotImplementedError: it is to be differentiated in its turn.
        """
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "create_graph=True (a gradient penalty) needs second derivatives, which have no per-sample "
                "gradient: call the model in eval mode with its parameters frozen, or leave the penalty out"
            )
        return self.reaches_parameters()

    def lost(self) -> bool:
        """Whether more reports were due from compiled graphs than arrived, since the last call."""
        due, self.anchor.grad = self.anchor.grad, None
        arrived, self.arrived = self.arrived, 0
        return due is not None and int(due) > arrived
