"""The DP-SGD loop, shared by stage 1's mode ``dp`` and by stage 2: one function, from the coin to the step.

Order matters and is kept in one place: a step is written into the ledger, then its records are drawn, their
gradients clipped and summed, noise added, the optimizer stepped; only then does anybody hear of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from ..engine.accounting import Mechanism
from ..engine.captured import CapturedBatches
from ..engine.gradients.plan import Plan
from ..engine.keystream import Keystream
from ..engine.privacy_engine import PrivacyEngine
from ..engine.sampling import PhysicalBatch, PoissonBatches
from ..runs.ledger import Ledger
from .opacus_step import privatize_with_opacus


@dataclass(frozen=True)
class RecordLosses:
    """One loss a record, summed over its pixels, as large as its gradient is to be clipped; in two halves, so that a
    device computes the second while the first goes on with the next batch, and so that the second can be captured.

    Args:
        fetch: ``(indices [B]) -> tensors [B, ...]``, all on the CPU. It may only look at these records.
        compute: ``(module, *tensors) -> losses [B]``, where the module is; nothing but computing.
    """

    fetch: Callable[[Tensor], tuple[Tensor, ...]]
    compute: Callable[..., Tensor]


@dataclass(frozen=True)
class StepMechanism:
    """DP-SGD as an accounted mechanism: the subsampled Gaussian, ``steps`` times.

    Every record enters a step with probability ``expected_batch_size / dataset_size``; its gradient is
    clipped to ``max_grad_norm`` over all trainable parameters together; the sum gets noise of standard
    deviation ``noise_multiplier`` times its sensitivity and is divided by ``expected_batch_size``, a public
    constant.
    """

    name: str
    noise_multiplier: float
    max_grad_norm: float
    expected_batch_size: int
    dataset_size: int
    steps: int
    rows_per_record: int = 1

    @property
    def sample_rate(self) -> float:
        return self.expected_batch_size / self.dataset_size

    @property
    def mechanism(self) -> Mechanism:
        """What the accountant composes."""
        return Mechanism(self.name, self.noise_multiplier, self.sample_rate, self.steps)


@dataclass(frozen=True)
class StepInfo:
    """What one step tells its observer. ``loss`` (a mean, still on the device) is not noised: for the
    curator's eyes only."""

    step: int
    loss: Tensor
    records: int


def make_optimizer(
    name: str, module: nn.Module, learning_rate: float, momentum: float = 0.0, weight_decay: float = 0.0
) -> Optimizer:
    """``sgd``, ``adam`` or ``adamw`` over the trainable parameters of ``module``."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    if name == "sgd":
        return SGD(trainable, lr=learning_rate, momentum=momentum, weight_decay=weight_decay)
    return {"adam": Adam, "adamw": AdamW}[name](trainable, lr=learning_rate, weight_decay=weight_decay)


def dp_sgd(
    module: nn.Module,
    optimizer: Optimizer,
    record_losses: RecordLosses,
    dp: StepMechanism,
    *,
    keystream: Keystream,
    ledger: Ledger,
    engine: str = "fused",
    physical_batch_size: int = 256,
    plan: Plan | None = None,
    compile: str = "none",
    first_step: int = 0,
    on_step: Callable[[StepInfo], None] | None = None,
) -> None:
    """Train ``module`` in place by DP-SGD, from step ``first_step`` up to ``dp.steps``.

    Args:
        record_losses: see :class:`RecordLosses`.
        keystream: noise and coins. Step s uses the s-th position of both, whoever has run the steps before.
        ledger: is told of a step before anything of it is drawn.
        engine: ``"fused"``, or ``"opacus"`` for the same loop through Opacus' own per-sample gradients.
        physical_batch_size: rows in memory at a time. It changes neither what is drawn nor what is accounted; the
            result changes by rounding, and where ``fetch`` draws by place, by what each row gets.
        plan: how the fused engine takes per-sample gradients; changes the result by rounding.
        compile: ``"graph"`` captures physical batches as a CUDA graph (:mod:`..engine.captured`), or says why not.
        first_step: how many steps count as spent already.
        on_step: hears of every finished step; what it raises ends the loop between two steps.
    """
    coins = keystream.stream(f"{dp.name}/coins")
    batches = PoissonBatches(
        coins,
        dataset_size=dp.dataset_size,
        sample_rate=dp.sample_rate,
        physical_batch_size=physical_batch_size,
    )
    private_module, private_optimizer = privatize(module, optimizer, dp, keystream, engine, plan)
    coins.advance_to(0, coin_step=first_step)
    private_optimizer.stream.advance_to(first_step)
    device = next(module.parameters()).device
    captured = None
    if compile == "graph":
        captured = CapturedBatches(private_optimizer, partial(record_losses.compute, private_module))

    private_module.train()
    try:
        for step in range(first_step, dp.steps):
            ledger.reserve(dp.mechanism, step + 1, last=dp.steps)
            draw = next(batches)
            loss, records = step_on(private_module, private_optimizer, record_losses, draw, device, captured)
            if on_step is not None:
                on_step(StepInfo(step + 1, loss / max(records, 1), records))
    finally:
        private_module.to_standard_module()


def step_on(
    private_module: nn.Module,
    private_optimizer: Any,
    record_losses: RecordLosses,
    draw: Iterable[PhysicalBatch],
    device: torch.device,
    captured: CapturedBatches | None = None,
) -> tuple[Tensor, int]:
    """One step on one draw, from its first forward to the optimizer's step: the sum of its losses (for the curator's
    eyes only) and the number of its records. Nothing here waits for the device."""
    loss, records = torch.zeros((), device=device), 0
    for physical in draw:
        fetched = record_losses.fetch(physical.indices)
        if device.type == "cuda":  # copies from pinned memory go on by themselves
            fetched = tuple(x.pin_memory() for x in fetched)
        if captured is not None:
            losses = captured(*fetched, mask=physical.mask)
        else:
            losses = record_losses.compute(private_module, *(x.to(device, non_blocking=True) for x in fetched))
            losses = torch.where(physical.mask.to(device), losses, 0.0)
            losses.mean().backward()
        private_optimizer.signal_skip_step(do_skip=not physical.last)
        private_optimizer.step()
        private_optimizer.zero_grad(set_to_none=True)
        loss += losses.detach().sum()
        records += int(physical.mask.sum())
    return loss, records


def privatize(
    module: nn.Module,
    optimizer: Optimizer,
    dp: StepMechanism,
    keystream: Keystream,
    engine: str,
    plan: Plan | None = None,
) -> tuple[Any, Any]:
    """The two engines differ here and nowhere else. The mean's divisor is the physical batch size, which is a
    constant."""
    if engine == "opacus":
        if dp.rows_per_record != 1:
            raise NotImplementedError(
                'engine="opacus" takes one row a record: use engine="fused" for several samples a record'
            )
        return privatize_with_opacus(
            module,
            optimizer,
            stream=keystream.stream(f"{dp.name}/noise"),
            noise_multiplier=dp.noise_multiplier,
            max_grad_norm=dp.max_grad_norm,
            expected_batch_size=dp.expected_batch_size,
        )
    return PrivacyEngine(keystream=keystream).privatize(
        module,
        optimizer,
        noise_multiplier=dp.noise_multiplier,
        max_grad_norm=dp.max_grad_norm,
        sample_rate=dp.sample_rate,
        expected_batch_size=dp.expected_batch_size,
        loss_reduction="mean",
        rows_per_record=dp.rows_per_record,
        plan=plan,
    )
