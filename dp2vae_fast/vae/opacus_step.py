"""The step of ``engine="opacus"``: Opacus' per-sample gradients, clipping and accumulation, with this
package's noise stream.

The reference path. Everything of a step is Opacus' own except where the Gaussian numbers come from, so that
both engines draw the same noise from the same key and differ by rounding only.
"""

from __future__ import annotations

import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import nn
from torch.optim import Optimizer

from ..engine.keystream import Stream


class OpacusOptimizer(DPOptimizer):
    """Opacus' ``DPOptimizer`` with noise from ``stream`` instead of ``torch.normal``."""

    def __init__(self, optimizer: Optimizer, *, stream: Stream, **settings) -> None:
        super().__init__(optimizer, **settings)
        self.stream = stream

    @torch.no_grad()
    def add_noise(self) -> None:
        """``p.grad = clipped sum + noise_multiplier * max_grad_norm * z``."""
        sums = [p.summed_grad for p in self.params]  # pyright: ignore[reportAttributeAccessIssue]
        if self.noise_multiplier > 0:
            self.stream.add_noise_(sums, self.noise_multiplier * self.max_grad_norm)
        for p, total in zip(self.params, sums, strict=True):
            p.grad = total.view_as(p)


def privatize_with_opacus(
    module: nn.Module,
    optimizer: Optimizer,
    *,
    stream: Stream,
    noise_multiplier: float,
    max_grad_norm: float,
    expected_batch_size: int,
) -> tuple[GradSampleModule, OpacusOptimizer]:
    """Wrap ``module`` and ``optimizer`` in Opacus' own classes, for a loss that is a mean over the rows of a
    physical batch."""
    private = OpacusOptimizer(
        optimizer,
        stream=stream,
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        expected_batch_size=expected_batch_size,
        loss_reduction="mean",
    )
    return GradSampleModule(module, loss_reduction="mean"), private
