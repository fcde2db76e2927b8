"""Batches of one shape as one CUDA graph: forward, backward, norms, clip factors and weighted sums, launched at once.

Small models take longer to launch than to run. Noise and the optimizer's own step stay outside: they are few launches
(one for all parameters with the CUDA module), and their counters stay where they are accounted.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .clipping import AdaptiveClipping
from .optimizer import DPOptimizer
from .precision import full_precision

_ALIKE = 3  # batches of one kind in a row, after which it is captured: libraries and kernels have been set up by then


class _Graph:
    """``function()`` captured; :meth:`replay` returns what it returned, the same tensors computed anew."""

    def __init__(self, function: Callable[[], Any]) -> None:
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            function()  # what is set up once a stream
        here.wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._result = function()

    def replay(self) -> Any:
        self._graph.replay()
        return self._result


def _why_no_graph(device: torch.device) -> str:
    return "" if device.type == "cuda" else f"there are no graphs on {device.type}"


class CapturedBatches:
    """Call it in place of the model, the loss and ``backward()``; ``step()`` and ``zero_grad()`` follow as ever.

    ::

        model, optimizer, loader = engine.make_private(..., physical_batch_size=256)  # batches of one shape
        batches = CapturedBatches(optimizer, lambda x, y: F.cross_entropy(model(x), y, reduction="none"))
        for x, y in loader:
            losses = batches(x, y)
            optimizer.step()
            optimizer.zero_grad()

    After a few batches of one kind the next is captured, and later ones are replayed. Another shape, another bound of
    the clipping, a parameter that is frozen or moved: these are captured anew. What cannot be captured runs as it would
    without, and a warning says why.

    Args:
        optimizer: what ``make_private`` returned.
        losses: ``(*inputs) -> losses [N]``, one loss a record. Its Python runs when a batch is captured and not when it
            is replayed, so it must do nothing but compute on its inputs.

    Guarantees:
        Sensitivity, noise and accounting are those of :class:`~.optimizer.DPOptimizer`, and a record's clip factor does
        not depend on whether its batch is replayed. From here on the optimizer takes no norm again in float64 where
        rounding is large beside it, as nobody can look at a captured one: such a record is clipped shorter than it
        would be otherwise, never longer.
    """

    def __init__(self, optimizer: DPOptimizer, losses: Callable[..., Tensor]) -> None:
        self.optimizer = optimizer
        self._losses = losses
        self._device = optimizer.params[0].device
        self._kind: Any = None  # of the last batch
        self._alike = 0  # batches of that kind in a row
        self._graph: _Graph | None = None  # of such a batch
        self._static: list[Tensor] = []  # that it reads: inputs and mask
        self._reason = _why_no_graph(self._device)  # why nothing is captured
        if isinstance(optimizer.clipping, AdaptiveClipping):
            self._reason = "adaptive clipping has another bound at every step"
        if self._reason:
            warnings.warn(f"batches are not captured: {self._reason}", stacklevel=2)
        else:
            optimizer.clipping.second_look = False

    @property
    def captured(self) -> bool:
        """Whether the last batch was replayed, or captured to be."""
        return self._graph is not None

    @property
    def reason(self) -> str:
        """Why nothing is captured; empty where nothing speaks against it."""
        return self._reason

    def __call__(self, *inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Forward, backward, and the clipped sum of one batch.

        Args:
            inputs: for ``losses``, which gets them on the device of the parameters.
            mask: bool ``[N]``, False where a row is padding; the data loader's own where ``make_private`` was given a
                ``physical_batch_size``.

        Returns:
            The losses ``[N]``, without their graph, zero where a row is padding. Not noised: for the curator only.
        """
        mask = self.optimizer.mask if mask is None else mask
        if self._reason or self.optimizer.capture.first_batch.waiting:
            return self._eagerly(inputs, mask)
        kind = self._kind_of(inputs, mask)
        if kind != self._kind:
            self._kind, self._alike, self._graph = kind, 0, None
        if self._graph is None:
            self._alike += 1
            if self._alike <= _ALIKE or not self._capture(inputs, mask):
                return self._eagerly(inputs, mask)
        assert self._graph is not None
        given = list(inputs) if mask is None else [*inputs, mask]
        for static, new in zip(self._static, given, strict=True):
            static.copy_(new, non_blocking=True)
        losses, sums = self._graph.replay()
        records = len(losses) if mask is None else int(mask.sum())
        self.optimizer.add_replayed([(p, total.clone()) for p, total in sums.items()], records)
        return losses.clone()

    def _kind_of(self, inputs: tuple[Tensor, ...], mask: Tensor | None) -> Any:
        """What is captured with a batch, and must be the same for its graph to be of use."""
        tensors = [(x.shape, x.stride(), x.dtype) for x in inputs]
        parameters = [(p.data_ptr(), p.requires_grad) for p in self.optimizer.params]
        module = self.optimizer.capture.module
        modes = [m.training for m in module.modules()]
        autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        return tensors, mask is None, self.optimizer.max_grad_norm, parameters, modes, autocast

    def _capture(self, inputs: tuple[Tensor, ...], mask: Tensor | None) -> bool:
        """Capture a batch like this one; False if that fails, and then nothing ever will be."""
        static = [x.to(self._device, copy=True) for x in inputs]
        static_mask = None if mask is None else mask.to(self._device, copy=True)
        self._static = [*static, *([] if static_mask is None else [static_mask])]
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # weights as they were cast before would be captured with it
        try:
            self._graph = _Graph(lambda: self._sums_of(static, static_mask))
        except RuntimeError as error:
            self._reason = f"capturing failed ({str(error).strip().splitlines()[0]})"
            warnings.warn(f"batches are not captured: {self._reason}", stacklevel=3)
        finally:
            torch.set_autocast_cache_enabled(cached)
            self.optimizer.capture.drop(self.optimizer.params)
        return not self._reason

    def _eagerly(self, inputs: Sequence[Tensor], mask: Tensor | None) -> Tensor:
        losses = self._losses(*(x.to(self._device, non_blocking=True) for x in inputs))
        if mask is not None:
            losses = torch.where(mask.to(self._device), losses, 0.0)
        (losses.mean() if self.optimizer.loss_reduction == "mean" else losses.sum()).backward()
        return losses.detach()

    def _sums_of(self, inputs: Sequence[Tensor], mask: Tensor | None) -> tuple[Tensor, dict[Tensor, Tensor]]:
        """Losses and clipped sums, with nobody looking at a value."""
        optimizer, losses = self.optimizer, self._eagerly(inputs, mask)
        records = optimizer.capture.records or 0
        with full_precision(optimizer.params):
            gradients = optimizer.capture.take(optimizer.params)
            used = {p: g for p, g in zip(optimizer.params, gradients, strict=True) if g is not None}
            return losses, dict(optimizer.clipped_sums(used, records, mask)) if used else {}
