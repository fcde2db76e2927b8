"""Scenarios: what a training loop does with batches, optimizers and the loader."""

from __future__ import annotations

import opacus
import torch
from fault_harness import (
    NotPossible,
    Outcome,
    RecordLoss,
    Run,
    Scenario,
    clipped_sum,
    distance_gone,
    judged,
    make_private,
    one_step,
    percent,
    randn,
    record_gradients,
)
from fault_losses import mlp
from opacus.accountants import RDPAccountant
from torch import Tensor, nn

import dp2vae_fast

RECORDS = 6


def poisoned(value: float) -> Tensor:
    records = randn(RECORDS, 4)
    records[2, 1] = value
    return records


# Batches -------------------------------------------------------------------------------------------------------------


def accumulated(run: Run, batch: Tensor) -> None:
    run.optimizer.zero_grad()
    for part in batch.split((len(batch) + 1) // 2):
        run.criterion(run.module(part)).backward()
    run.optimizer.step()


def forward_alone(run: Run, batch: Tensor) -> None:
    run.module(2 * batch[:4])
    one_step(run, batch)


def clipped_again(run: Run, batch: Tensor) -> None:
    run.optimizer.zero_grad()
    run.criterion(run.module(batch)).backward()
    torch.nn.utils.clip_grad_norm_(run.module.parameters(), 1e-3)
    run.optimizer.step()


def two_draws(engine: str) -> Outcome:
    """Two Poisson draws before one step: a record may be in both."""
    model, record = mlp(), randn(1, 4)
    (gradient,) = record_gradients(model, record, lambda m, r: RecordLoss()(m(r)))
    bound = float(gradient.norm()) / 2

    def train() -> None:
        run = make_private(engine, model, record, bound=bound, poisson_sampling=True)
        for _ in range(2):
            run.criterion(run.module(record)).backward()
        run.optimizer.step()

    share = float(distance_gone(model, train).norm()) / bound
    return Outcome("wrong", f"one record contributes {share:.3f} C" if share > 1.0001 else "a draw lost")


BATCHES = [
    *(
        Scenario(
            f"one record of {value} in the batch",
            "A broken file: its gradient is not finite, and must not take all parameters with it.",
            judged(mlp, poisoned(value)),
        )
        for value in (float("inf"), float("nan"))
    ),
    Scenario(
        "a forward without a backward before the step",
        "To look at outputs in training mode: nothing of it may stay behind.",
        judged(mlp, randn(RECORDS, 4), loop=forward_alone),
    ),
    Scenario(
        "clip_grad_norm_ left in the loop",
        "Of ordinary training: it has nothing to clip, as private gradients come into being in the step.",
        judged(mlp, randn(RECORDS, 4), loop=clipped_again),
    ),
    Scenario(
        "two batches before a step",
        "Gradient accumulation, without Poisson sampling.",
        judged(mlp, randn(RECORDS, 4), loop=accumulated),
    ),
    Scenario(
        "two Poisson draws before a step",
        "A record may be in both, and then contributes twice: to be refused.",
        two_draws,
        ours="refused",
    ),
]

# Optimizers ----------------------------------------------------------------------------------------------------------


def two_optimizers(engine: str) -> Outcome:
    """One optimizer a layer, both from one PrivacyEngine: each clips its own parameters, or both clip the whole."""
    records, bound = randn(RECORDS, 4), 0.5
    model = mlp()
    rows = record_gradients(model, records, lambda m, r: RecordLoss()(m(r)))

    def train() -> None:
        first, last = (torch.optim.SGD(layer.parameters(), lr=1.0) for layer in (model[0], model[2]))
        run = make_private(engine, model, records, bound=bound, optimizer=first)
        also = dict(optimizer=last, privacy_engine=run.engine)
        second = make_private(engine, run.module, records, bound=bound, **also)
        run.optimizer.zero_grad()
        second.optimizer.zero_grad()
        second.criterion(second.module(records)).backward()
        run.optimizer.step()
        second.optimizer.step()

    moved = distance_gone(model, train)
    cut = sum(p.numel() for p in model[0].parameters())
    apart = torch.cat([clipped_sum([r[:cut] for r in rows], bound), clipped_sum([r[cut:] for r in rows], bound)])
    errors = [float((moved - want).norm() / want.norm()) for want in (apart, clipped_sum(rows, bound))]
    return Outcome("wrong", f"sum off by {percent(min(errors))}") if min(errors) > 1e-5 else Outcome("correct")


# The loader ----------------------------------------------------------------------------------------------------------


def _poisson(engine: str, records: int, batch_size: int) -> Run:
    return make_private(
        engine, nn.Linear(1, 1), torch.zeros(records, 1), bound=1.0, batch_size=batch_size, poisson_sampling=True
    )


def lengths(engine: str) -> Outcome:
    """make_private's loader must have as many steps as the one it is made from, for every length below 5,000."""
    lost = [n for n in range(1, 5000) if len(_poisson(engine, n, 1).loader) != n]
    return Outcome("wrong", f"a step lost for {len(lost):,} of 4,999 lengths") if lost else Outcome("correct")


def expected_batch_sizes(engine: str) -> Outcome:
    """Eight records a batch, for every number of batches below 1,000: the divisor must be eight."""
    wrong = [n for n in range(1, 1000) if _poisson(engine, 8 * n, 8).optimizer.expected_batch_size != 8]
    return Outcome("wrong", f"7 instead of 8 for {len(wrong):,} of 999 lengths") if wrong else Outcome("correct")


def steps_on_one_draw(engine: str) -> Outcome:
    """Three steps on each of ten Poisson draws: epsilon at 1e-5 of what is counted, and of the three together."""
    made = (dp2vae_fast if engine == "ours" else opacus).PrivacyEngine(accountant="rdp")
    records = randn(40, 4)
    run = make_private(engine, mlp(), records, bound=1.0, batch_size=4, poisson_sampling=True, privacy_engine=made)
    run.optimizer.noise_multiplier = 1.5
    joint = RDPAccountant()
    for (batch,) in run.loader:
        for _ in range(3):
            one_step(run, batch)
        joint.step(noise_multiplier=1.5 / 3**0.5, sample_rate=0.1)
    counted, spent = made.get_epsilon(1e-5), joint.get_epsilon(1e-5)
    return Outcome("correct") if counted > 0.99 * spent else Outcome("wrong", f"epsilon {counted:.2f} for {spent:.2f}")


def made_up_records(engine: str) -> Outcome:
    """40 Poisson draws from 40 records of value 7, with rand_on_empty."""
    run = make_private(
        engine,
        nn.Linear(1, 1),
        torch.full((40, 1), 7.0),
        bound=1.0,
        batch_size=1,
        poisson_sampling=True,
        rand_on_empty=True,
    )
    strange = sum(int((batch != 7).sum()) for (batch,) in run.loader)
    return Outcome("wrong", f"{strange} made-up records in 40 draws") if strange else Outcome("correct")


def secure(engine: str) -> Outcome:
    """secure_mode=True, one step."""
    try:
        made = (dp2vae_fast if engine == "ours" else opacus).PrivacyEngine(secure_mode=True)
    except ImportError as error:
        raise NotPossible("needs torchcsprng, which cannot be installed with a current torch") from error
    model = mlp()
    run = make_private(engine, model, randn(RECORDS, 4), bound=1.0, privacy_engine=made)
    one_step(run, randn(RECORDS, 4))
    return Outcome("correct")


REST = [
    Scenario("two optimizers, one engine", "Encoder and decoder, each with its own.", two_optimizers),
    Scenario(
        "several steps on one draw",
        "A loop inside the loop: the steps share their sample, so each has no amplification of its own.",
        steps_on_one_draw,
    ),
    Scenario("number of steps of a pass", "int(1 / (1 / n)) is not always n.", lengths),
    Scenario("expected batch size", "int(N * (1 / n)) is not always N / n.", expected_batch_sizes),
    Scenario(
        "rand_on_empty",
        "A record that does not exist, in place of none, trains the model.",
        made_up_records,
        ours="refused",
    ),
    Scenario("secure_mode", "Noise and coins from a cryptographic generator.", secure),
]

SCENARIOS = [*BATCHES, *REST]
