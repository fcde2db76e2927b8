"""Noise and the inner optimizer's arithmetic in one pass over the parameters, where the optimizer is one we know."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from .. import ops
from .keystream import Stream


class _Member(NamedTuple):
    """A parameter, its state in the optimizer, its sum (lying in memory as it does), and its place in the optimizer."""

    parameter: Tensor
    state: dict[str, Any]
    total: Tensor
    index: int

    def moment(self, key: str) -> Tensor:
        """State tensor ``key`` as it lies, created as zeros where the optimizer has none yet."""
        if self.state.get(key) is None:
            self.state[key] = torch.zeros_like(self.parameter, memory_format=torch.preserve_format)
        return ops.lying(self.state[key], self.parameter)


class FusedUpdate(ABC):
    """One optimizer step from clipped sums: ``grad = (sum + std z) * scale``, then the optimizer's own arithmetic,
    in place.

    The optimizer's ``param_groups`` and ``state`` are read and written as its own ``step`` would, so its
    state_dict, schedulers and checkpoints stay valid and either way can continue the other.
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
        """False while hooks on the inner optimizer's ``step``, or on that of all optimizers, wait to be called."""
        own = self.optimizer._optimizer_step_pre_hooks or self.optimizer._optimizer_step_post_hooks
        return not (own or _global_optimizer_pre_hooks or _global_optimizer_post_hooks)

    def step(self, sums: Sequence[Tensor], *, stream: Stream, std: float, scale: float) -> None:
        """Consume one noise step of ``stream`` for all trainable parameters, which ``sums`` are of, in the optimizer's
        order; the index of a parameter is its place in the optimizer."""
        step, index, totals = stream.next_step(), 0, iter(sums)
        for group in self.optimizer.param_groups:
            by_age: dict[int, list[_Member]] = {}  # a parameter unfrozen later is behind the others
            for p in group["params"]:
                if p.requires_grad:
                    state = self.optimizer.state[p]
                    member = _Member(p, state, ops.lying(next(totals), p), index)
                    by_age.setdefault(self._age(state), []).append(member)
                index += 1
            for members in by_age.values():
                device = members[0].parameter.device
                self._update(
                    group,
                    members,
                    key=stream.key_tensor(device),
                    step=torch.tensor(step, device=device),
                    mechanism=stream.mechanism,
                    indices=[m.index for m in members],
                    std=std,
                    scale=scale,
                )

    @abstractmethod
    def _age(self, state: dict[str, Any]) -> int:
        """What tells apart parameters that one call of :meth:`_update` cannot take together."""

    @abstractmethod
    def _update(self, group: dict[str, Any], members: list[_Member], **noise: Any) -> None:
        """One call of the op. Its arguments are views in the parameters' order in memory."""


class _FusedSGD(FusedUpdate):
    def _age(self, state: dict[str, Any]) -> int:
        return int(state.get("momentum_buffer") is not None)

    def _update(self, group: dict[str, Any], members: list[_Member], **noise: Any) -> None:
        momentum = group["momentum"]
        first_step = momentum != 0 and members[0].state.get("momentum_buffer") is None
        ops.noise_sgd_(
            [ops.lying(m.parameter) for m in members],
            [m.total for m in members],
            [m.moment("momentum_buffer") for m in members] if momentum != 0 else [],
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
    def _age(self, state: dict[str, Any]) -> int:
        return int(state.get("step", 0))

    def _update(self, group: dict[str, Any], members: list[_Member], **noise: Any) -> None:
        for m in members:
            if "step" not in m.state:
                m.state["step"] = torch.tensor(0.0, dtype=torch.get_default_dtype())
        torch._foreach_add_([m.state["step"] for m in members], 1)  # type: ignore[attr-defined]
        ops.noise_adam_(
            [ops.lying(m.parameter) for m in members],
            [m.total for m in members],
            [m.moment("exp_avg") for m in members],
            [m.moment("exp_avg_sq") for m in members],
            [m.moment("max_exp_avg_sq") for m in members] if group["amsgrad"] else [],
            optimizer_step=int(members[0].state["step"]),
            lr=float(group["lr"]),
            beta1=float(group["betas"][0]),
            beta2=float(group["betas"][1]),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled=isinstance(self.optimizer, AdamW) or bool(group.get("decoupled_weight_decay")),
            maximize=group["maximize"],
            **noise,
        )
