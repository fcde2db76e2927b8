"""DPOptimizer: clipped sum, noise and the inner optimizer's step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from opacus.optimizers import DPOptimizer as OpacusDPOptimizer
from torch import Tensor
from torch.optim import Optimizer

from .. import ops
from .capture import Capture, full_precision
from .clipping import FlatClipping
from .keystream import Stream
from .update import FusedUpdate


class DPOptimizer(OpacusDPOptimizer):
    """Takes per-sample gradients from a :class:`~.capture.Capture`, clips, sums, adds noise, and steps the inner
    optimizer.

    ``grad = (sum_n c_n g_n + noise_multiplier * sensitivity * z) / expected_batch_size``, z standard normal. The
    sum runs over all physical batches since the last step, in float32 or wider; the division
    (``loss_reduction="mean"`` only) is by the *public* expected batch size.

    Where the inner optimizer is SGD, Adam or AdamW, noise and step happen in one pass and the private gradient is
    never in memory; pass ``materialize_grad=True`` to have it in ``p.grad`` after the step, as Opacus does.

    Guarantees:
        No record contributes more than ``max_grad_norm`` to the sum, over all parameters of this optimizer
        together. A record whose gradient is not finite contributes exactly zero; an empty batch contributes zero,
        and its step is noised and counted.

    Args:
        optimizer: the inner optimizer; its state and param_groups stay its own.
        noise_multiplier: standard deviation of the noise in units of the sensitivity; 0 for none (no privacy).
        max_grad_norm: bound of each record's gradient norm, in units of the gradient of one record's loss.
        expected_batch_size: public divisor; required for ``loss_reduction="mean"``.
        loss_reduction: how the user's loss combines records, "mean" or "sum".
        capture: where per-sample gradients come from.
        stream: where noise comes from.
        clipping: from squared norms to factors; flat clipping unless given.
        materialize_grad: keep the private gradient in ``p.grad`` and call the inner optimizer's own ``step``.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: int | None,
        loss_reduction: str = "mean",
        capture: Capture,
        stream: Stream,
        clipping: FlatClipping | None = None,
        materialize_grad: bool = False,
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size,
            loss_reduction=loss_reduction,
        )
        optimizer.zero_grad(set_to_none=True)  # an un-noised gradient of before would still move a frozen parameter
        self.capture = capture
        self.stream = stream
        self.clipping = clipping or FlatClipping()
        self.update = None if materialize_grad else FusedUpdate.of(optimizer)
        self._sums: dict[Tensor, Tensor] = {}
        self._batches = 0
        self._bound = 0.0
        self._check_settings()
        capture.owners.update(dict.fromkeys(self.params, self._close_batch))

    # What Opacus' loop, schedulers and memory manager call ----------------------------------------------------------

    @property
    def accumulated_iterations(self) -> int:
        """Batches of records (not physical batches) since the last step, one whose gradients are still captured
        included; 1 where there is none."""
        return max(1, self._batches + self.capture.holds(self.params))

    def sensitivity(self) -> float:
        """Bound of one record's contribution to the sum that the noise is added to (add or remove one record).

        While a sum is pending it is the largest bound that a part of it was clipped to, should a schedule lower
        ``max_grad_norm`` between physical batches.
        """
        return max(self._bound, self.clipping.sensitivity(self.max_grad_norm))

    def clip_and_accumulate(self) -> None:
        """Clip the captured gradients and add them to the pending sum."""
        with full_precision(self.params):
            self._clip_and_accumulate()

    def _clip_and_accumulate(self) -> None:
        records = self.capture.records
        gradients = self.capture.take(self.params)
        self._batches += 1
        used = [(p, g) for p, g in zip(self.params, gradients, strict=True) if g is not None]
        if not records or not used:
            return
        scale = records if self.loss_reduction == "mean" else 1  # undo the mean's division by this batch's own size
        factors = self.clipping.factors([g for _, g in used], self.max_grad_norm, scale)
        dropped = factors == 0
        if bool(dropped.any()):  # 0 * inf is NaN: what is dropped must be zero before it is weighted
            used = [(p, g.without(dropped)) for p, g in used]
        self._bound = self.sensitivity()
        for p, g in used:
            weighted = g.weighted_sum(factors)
            pending = self._sums.get(p)
            self._sums[p] = weighted if pending is None else pending.add_(weighted)

    def begin_pass(self) -> bool:
        """A new pass over the data begins. True if that cut a draw short between its physical batches.

        The part of it that is pending is forgotten: with a later draw it would be one step on two draws, in both of
        which a record may be.
        """
        cut_short = self._is_last_step_skipped or bool(self._step_skip_queue)
        if cut_short:
            self._step_skip_queue.clear()
            self._is_last_step_skipped = False
            self.zero_grad()
        return cut_short

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        """Clip and accumulate; unless this step is to be skipped, put the private gradient in ``p.grad`` and count
        the step."""
        if not self._begin_step():
            return False
        self.add_noise()
        self.scale_grad()
        self._forget_sums()
        return True

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; a physical batch that is not its logical batch's last (``signal_skip_step``) is only
        accumulated."""
        if closure is not None:
            with torch.enable_grad():
                closure()
        if self.update is None or not self.update.usable:
            return self.original_optimizer.step() if self.pre_step() else None  # type: ignore[func-returns-value]
        if self._begin_step():
            self.update.step(
                dict(zip(self.params, self._pending_sums(), strict=True)),
                stream=self.stream,
                std=self.noise_multiplier * self.sensitivity(),
                scale=self._scale(),
            )
            self._forget_sums()
        return None

    def add_noise(self) -> None:
        """``p.grad = sum + noise``."""
        sums = self._pending_sums()
        if self.noise_multiplier > 0:
            every = [p for group in self.param_groups for p in group["params"]]
            indices = [i for i, p in enumerate(every) if p.requires_grad]  # as the update in one pass numbers them
            self.stream.add_noise_(sums, self.noise_multiplier * self.sensitivity(), indices)
        for p, total in zip(self.params, sums, strict=True):
            p.grad = total.to(p.dtype)

    def scale_grad(self) -> None:
        """Divide by the expected batch size where the user's loss is a mean."""
        for p in self.params:
            if p.grad is not None:
                p.grad.mul_(self._scale())

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Forget captured gradients; forget the pending sum too unless the last step was a skipped one."""
        self.capture.drop(self.params)
        if not self._is_last_step_skipped:
            self._forget_sums()
        self._batches = 0
        self.original_optimizer.zero_grad(set_to_none)

    # ---------------------------------------------------------------------------------------------------------------

    def _forget_sums(self) -> None:
        self._sums.clear()
        self._batches = 0
        self._bound = 0.0

    def _begin_step(self) -> bool:
        """Close the physical batch. False if the step is to be skipped; otherwise the accountant has counted it."""
        self._check_settings()
        self.clip_and_accumulate()
        if self._check_skip_next_step():
            self._is_last_step_skipped = True
            self._batches = 0  # the rest of this batch is to come
            return False
        self._is_last_step_skipped = False
        if self.step_hook:
            self.step_hook(self)
        return True

    def _check_settings(self) -> None:
        """What a schedule may have set since the last step."""
        if not 0.0 < self.max_grad_norm < math.inf:
            raise ValueError(f"max_grad_norm is {self.max_grad_norm}: it must be positive and finite")
        if not 0.0 <= self.noise_multiplier < math.inf:
            raise ValueError(f"noise_multiplier is {self.noise_multiplier}: it must be finite and not negative")

    def _scale(self) -> float:
        if self.loss_reduction == "sum" or self.expected_batch_size is None:
            return 1.0
        return 1.0 / (self.expected_batch_size * self.accumulated_iterations)

    def _pending_sums(self) -> list[Tensor]:
        return [self._sums[p] if p in self._sums else ops.widen(torch.zeros_like(p)) for p in self.params]

    def _close_batch(self) -> None:
        """A second batch begins before a step: true accumulation, where sampling allows it."""
        if not self.capture.grad_accumulation_allowed:
            raise ValueError(
                "Poisson sampling does not compose by accumulation: call optimizer.step() after every batch "
                "(BatchMemoryManager splits large batches), or pass poisson_sampling=False"
            )
        self.clip_and_accumulate()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a DPOptimizer holds hooks and a secret noise stream: save its state_dict() instead")
