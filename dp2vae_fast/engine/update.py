"""Noise and the inner optimizer's arithmetic in one pass over the parameters, where the optimizer is one we know."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from .. import ops
from .keystream import Stream


class FusedUpdate(ABC):
    """One optimizer step from clipped sums: ``grad = (sum + std z) * scale``, then the optimizer's own arithmetic,
    in place.

    The optimizer's ``param_groups`` and ``state`` are read and written as its own ``step`` would, so its
    state_dict, schedulers and checkpoints stay valid and either road can continue the other.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @staticmethod
    def of(optimizer: Optimizer) -> FusedUpdate | None:
        """The fused update for ``optimizer``, or None where its own ``step`` must run: another class, unusual
        options or dtypes."""
        kind = {SGD: _FusedSGD, Adam: _FusedAdam, AdamW: _FusedAdam}.get(type(optimizer))  # type: ignore[call-overload]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        plain = all(p.dtype in (torch.float32, torch.float64) and p.layout == torch.strided for p in parameters)
        unusual = any(g.get("capturable") or g.get("differentiable") for g in optimizer.param_groups)
        return kind(optimizer) if kind and plain and not unusual else None

    @property
    def usable(self) -> bool:
        """False while hooks on the inner optimizer's ``step`` wait to be called."""
        return not (self.optimizer._optimizer_step_pre_hooks or self.optimizer._optimizer_step_post_hooks)

    def step(self, sums: dict[Tensor, Tensor], *, stream: Stream, std: float, scale: float) -> None:
        """Consume one noise step of ``stream`` for all parameters; the index of a parameter is its place in the
        optimizer."""
        step, first = stream.next_step(), 0
        for group in self.optimizer.param_groups:
            every = group["params"]
            by_age: dict[int, list[int]] = {}  # a parameter unfrozen later is behind the others
            for i, p in enumerate(every):
                if p.requires_grad:
                    by_age.setdefault(self._age(p), []).append(i)
            for members in by_age.values():
                params = [every[i] for i in members]
                self._update(
                    group,
                    params,
                    [ops.lying(sums[p], p) for p in params],
                    key=stream.key_tensor(params[0].device),
                    step=torch.tensor(step, device=params[0].device),
                    mechanism=stream.mechanism,
                    indices=[first + i for i in members],
                    std=std,
                    scale=scale,
                )
            first += len(every)

    @abstractmethod
    def _age(self, parameter: Tensor) -> int:
        """What tells apart parameters that one call of :meth:`_update` cannot take together."""

    @abstractmethod
    def _update(self, group: dict[str, Any], params: list[Tensor], sums: list[Tensor], **noise: Any) -> None:
        """One call of the op. Its arguments are views in the parameters' order in memory, ``sums`` already."""

    def _states(self, params: list[Tensor], key: str) -> list[Tensor]:
        """State tensors ``key`` of ``params`` as they lie, created as zeros where the optimizer has none yet."""
        states = [self.optimizer.state[p] for p in params]
        for p, state in zip(params, states, strict=True):
            if state.get(key) is None:
                state[key] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return [ops.lying(state[key], p) for p, state in zip(params, states, strict=True)]


class _FusedSGD(FusedUpdate):
    def _age(self, parameter: Tensor) -> int:
        return int(self.optimizer.state[parameter].get("momentum_buffer") is not None)

    def _update(self, group: dict[str, Any], params: list[Tensor], sums: list[Tensor], **noise: Any) -> None:
        momentum = group["momentum"]
        first_step = momentum != 0 and self.optimizer.state[params[0]].get("momentum_buffer") is None
        ops.noise_sgd_(
            [ops.lying(p) for p in params],
            sums,
            self._states(params, "momentum_buffer") if momentum != 0 else [],
            lr=float(group["lr"]),
            momentum=momentum,
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            first_step=first_step,
            **noise,
        )


class _FusedAdam(FusedUpdate):
    def _age(self, parameter: Tensor) -> int:
        return int(self.optimizer.state[parameter].get("step", 0))

    def _update(self, group: dict[str, Any], params: list[Tensor], sums: list[Tensor], **noise: Any) -> None:
        states = [self.optimizer.state[p] for p in params]
        for state in states:
            if "step" not in state:
                state["step"] = torch.tensor(0.0, dtype=torch.get_default_dtype())
        torch._foreach_add_([state["step"] for state in states], 1)  # type: ignore[attr-defined]
        ops.noise_adam_(
            [ops.lying(p) for p in params],
            sums,
            self._states(params, "exp_avg"),
            self._states(params, "exp_avg_sq"),
            self._states(params, "max_exp_avg_sq") if group["amsgrad"] else [],
            optimizer_step=int(states[0]["step"]),
            lr=float(group["lr"]),
            beta1=float(group["betas"][0]),
            beta2=float(group["betas"][1]),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled=isinstance(self.optimizer, AdamW) or bool(group.get("decoupled_weight_decay")),
            maximize=group["maximize"],
            **noise,
        )
