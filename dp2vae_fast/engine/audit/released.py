"""What is audited, and how the sum that a step released is read from it.

Everything is read from the steps that the user's own optimizer takes on the user's own model and loss; no step is
imitated. The inner optimizer is set so that the private gradient can be told from what it has changed, and the weights
are put back after every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from opacus.optimizers import DPOptimizer as OpacusDPOptimizer
from torch import Tensor, nn
from torch.optim import SGD, Adam


@dataclass(frozen=True)
class Subject:
    """What is audited.

    Args:
        optimizer: the private optimizer, ours or Opacus' own. It takes the audit's steps: let nothing else use it.
        take_step: one real training step on the records at these indices (int64 ``[B]``, perhaps empty), from the
            forward pass to ``optimizer.step()``. The gradient of a record must not depend on its place in the batch.
        ordinary, hostile, canaries: indices of records as they are, of records made to exceed the bound, and of records
            whose gradients differ as much as they can.
        draws: the sampler: record indices of one draw after the other.
        dataset_size, sample_rate, noise_multiplier, delta: what is claimed.
    """

    optimizer: OpacusDPOptimizer
    take_step: Callable[[Tensor], None]
    ordinary: Tensor
    hostile: Tensor
    canaries: Tensor
    draws: Iterator[Sequence[int]]
    dataset_size: int
    sample_rate: float
    noise_multiplier: float
    delta: float = 1e-5


class Released:
    """Reads from a step of the real optimizer the sum that it released, in units of one record's gradient."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.optimizer = subject.optimizer
        self.inner = self.optimizer.original_optimizer
        self.parameters: list[nn.Parameter] = list(self.optimizer.params)
        mean = self.optimizer.loss_reduction == "mean"
        self.divisor = float(self.optimizer.expected_batch_size or 1) if mean else 1.0
        for group in self.inner.param_groups:  # post-processing of the private gradient: set so that it can be undone
            group |= {k: v for k, v in (("momentum", 0), ("nesterov", False), ("weight_decay", 0)) if k in group}
            group |= {"maximize": False} if "maximize" in group else {}
            if isinstance(self.inner, SGD):
                group["lr"] = 2.0**20  # the weights are nothing beside such an update

    def sensitivity(self) -> float:
        """The bound that the noise is calibrated on, as the clip norm stands."""
        own = getattr(self.optimizer, "sensitivity", None)
        return float(own() if own is not None else self.optimizer.max_grad_norm)

    def noise_std(self) -> float:
        """Standard deviation that the noise in the sum must have, for what is claimed of the step as a whole."""
        multiplier = self.subject.noise_multiplier
        clipping = getattr(self.optimizer, "clipping", None)
        if clipping is not None:  # a mode may spend a part of the noise elsewhere
            multiplier = clipping.gradient_noise_multiplier(multiplier)
        return multiplier * self.sensitivity()

    @contextmanager
    def clipped_to(self, factor: float) -> Iterator[None]:
        """The clip norm times ``factor``, for a while."""
        optimizer: Any = self.optimizer
        before = optimizer.max_grad_norm
        optimizer.max_grad_norm = [b * factor for b in before] if isinstance(before, list) else before * factor
        try:
            yield
        finally:
            optimizer.max_grad_norm = before

    @torch.no_grad()
    def by_parameter(self, indices: Tensor, *, noisy: bool) -> list[Tensor]:
        """The released sum of one step on the records at ``indices``, float64, a tensor for each parameter."""
        weights = [p.detach().clone() for p in self.parameters]
        multiplier, bound = self.optimizer.noise_multiplier, self.optimizer.max_grad_norm
        self.inner.state.clear()
        self.optimizer.noise_multiplier = multiplier if noisy else 0.0
        try:
            with torch.enable_grad():
                self.subject.take_step(indices)
            return [self._gradient(p, w) * self.divisor for p, w in zip(self.parameters, weights, strict=True)]
        finally:
            self.optimizer.noise_multiplier, self.optimizer.max_grad_norm = multiplier, bound
            for p, w in zip(self.parameters, weights, strict=True):
                p.copy_(w)

    def __call__(self, indices: Tensor, *, noisy: bool = False) -> Tensor:
        """The same as one vector ``[D]``."""
        return torch.cat([g.flatten() for g in self.by_parameter(indices, noisy=noisy)])

    def _gradient(self, parameter: Tensor, before: Tensor) -> Tensor:
        group = next(g for g in self.inner.param_groups if any(p is parameter for p in g["params"]))
        if isinstance(self.inner, Adam):  # AdamW too
            moment = self.inner.state[parameter].get("exp_avg")
            moment = torch.zeros_like(before) if moment is None else moment
            return moment.double() / (1 - float(group["betas"][0]))
        if isinstance(self.inner, SGD):
            return (before.double() - parameter.double()) / float(group["lr"])
        if parameter.grad is None:
            raise TypeError(f"the audit cannot read the steps of {type(self.inner).__name__}: give it SGD or Adam")
        return parameter.grad.double()
