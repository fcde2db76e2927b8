"""Scenarios: what a training loop does with losses, batches, optimizers and the loader."""

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
    distance,
    distance_gone,
    judged,
    make_private,
    one_step,
    randn,
    record_gradients,
    snapshot,
    verdict,
)
from torch import Tensor, nn

import dp2vae_fast

RECORDS = 6


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def autoencoder() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.ConvTranspose2d(3, 2, 3, padding=1))


def poisoned(value: float) -> Tensor:
    records = randn(RECORDS, 4)
    records[2, 1] = value
    return records


def images(*shape: int) -> Tensor:
    return randn(*shape).sigmoid()


# Losses --------------------------------------------------------------------------------------------------------------


class Contrastive(RecordLoss):
    """Tells each record from all others of its batch."""

    def forward(self, output: Tensor, target: Tensor | None = None) -> Tensor:
        return nn.functional.cross_entropy(output @ output.T, torch.arange(len(output)), reduction=self.reduction)


def compared(engine: str) -> Outcome:
    """There is no gradient of one record; but what one more record changes must stay within C."""
    records, bound = randn(RECORDS, 4), 0.05

    def moved(rows: Tensor) -> Tensor:
        model = mlp()
        settings = dict(criterion=Contrastive(), bound=bound)
        return distance_gone(model, lambda: one_step(make_private(engine, model, records, **settings), rows))

    return verdict(moved, records, None, bound)


def fooled(model: nn.Module, batch: Tensor) -> Tensor:
    """Each record moved a little against the model, which is the fast gradient sign method."""
    batch = batch.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(RecordLoss()(model(batch)), batch)
    return (batch + 0.1 * gradient.sign()).detach()


def two_losses(run: Run, batch: Tensor) -> None:
    run.optimizer.zero_grad()
    output = run.module(batch)
    (run.criterion(output) + run.criterion(2 * output)).backward()
    run.optimizer.step()


def two_backwards(run: Run, batch: Tensor) -> None:
    run.optimizer.zero_grad()
    output = run.module(batch)
    first, second = run.criterion(output), run.criterion(2 * output)
    if isinstance(first, Tensor):
        first.backward(retain_graph=True)
    else:  # Opacus' ghost loss takes no such argument
        first.backward()
    second.backward()
    run.optimizer.step()


def both(model: nn.Module, record: Tensor) -> Tensor:
    output = model(record)
    return RecordLoss()(output) + RecordLoss()(2 * output)


def slope(model: nn.Module, batch: Tensor) -> Tensor:
    """Squared norm of the input gradient of each record, to be differentiated itself."""
    batch = batch.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(model(batch).sin().sum(), batch, create_graph=True)
    return gradient.square().sum(1, keepdim=True)


def penalised(run: Run, batch: Tensor) -> None:
    run.optimizer.zero_grad()
    run.criterion(slope(run.module, batch)).backward()
    run.optimizer.step()


LOSSES = [
    Scenario(
        "nn.MSELoss on images",
        "The mean over records and pixels: the loss of a plain autoencoder.",
        judged(autoencoder, images(RECORDS, 2, 5, 4), criterion=lambda _: nn.MSELoss(), reduction="mean"),
    ),
    Scenario(
        "nn.MSELoss on images as wide as the batch",
        "One factor a record, and one a column, have the same shape.",
        judged(autoencoder, images(RECORDS, 2, 5, RECORDS), criterion=lambda _: nn.MSELoss(), reduction="mean"),
    ),
    Scenario(
        "nn.BCEWithLogitsLoss on images",
        "Of a variational autoencoder on black and white.",
        judged(autoencoder, images(RECORDS, 2, 5, 4), criterion=lambda _: nn.BCEWithLogitsLoss(), reduction="mean"),
    ),
    Scenario(
        "sum of two losses of one forward",
        "Reconstruction and regulariser.",
        judged(mlp, randn(RECORDS, 4), loop=two_losses, loss=both),
    ),
    Scenario(
        "two backward passes of one forward",
        "The same two losses, each on its own: the gradients add up.",
        judged(mlp, randn(RECORDS, 4), loop=two_backwards, loss=both),
    ),
    Scenario(
        "adversarial training",
        "A gradient of the input first, then training on what it leads to.",
        judged(
            mlp,
            randn(RECORDS, 4),
            loop=lambda run, batch: one_step(run, fooled(run.module, batch)),
            loss=lambda model, record: RecordLoss()(model(fooled(model, record))),
        ),
    ),
    Scenario(
        "a loss that compares records",
        "Contrastive learning: one record more changes the gradients of all the others.",
        compared,
        ours="refused",
        fault="the hooks cannot see into the loss: it promises to be a sum or mean over records",
    ),
    Scenario(
        "gradient penalty",
        "The loss holds an input gradient, and is differentiated through it.",
        judged(
            mlp,
            randn(RECORDS, 4),
            loop=penalised,
            loss=lambda model, record: RecordLoss()(slope(model, record)),
        ),
        ours="refused",
    ),
]


# Batches -------------------------------------------------------------------------------------------------------------


def accumulated(run: Run, batch: Tensor) -> None:
    run.optimizer.zero_grad()
    for part in batch.split((len(batch) + 1) // 2):
        run.criterion(run.module(part)).backward()
    run.optimizer.step()


def two_draws(engine: str) -> Outcome:
    """Two Poisson draws before one step: a record may be in both."""
    model, record = mlp(), randn(1, 4)
    (gradient,) = record_gradients(model, record, lambda m, r: RecordLoss()(m(r)))
    bound = float(gradient.norm()) / 2
    run = make_private(engine, model, record, bound=bound, poisson_sampling=True)
    before = snapshot(model)
    for _ in range(2):
        run.criterion(run.module(record)).backward()
    run.optimizer.step()
    share = float(distance(before, snapshot(model)).norm()) / bound
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
    before = snapshot(model)
    run = make_private(engine, model, records, bound=bound, optimizer=torch.optim.SGD(model[0].parameters(), lr=1.0))
    second = make_private(
        engine,
        run.module,
        records,
        bound=bound,
        optimizer=torch.optim.SGD(model[2].parameters(), lr=1.0),
        privacy_engine=run.engine,
    )
    run.optimizer.zero_grad()
    second.optimizer.zero_grad()
    second.criterion(second.module(records)).backward()
    run.optimizer.step()
    second.optimizer.step()
    moved = distance(before, snapshot(model))
    cut = sum(p.numel() for p in model[0].parameters())
    apart = torch.cat([clipped_sum([r[:cut] for r in rows], bound), clipped_sum([r[cut:] for r in rows], bound)])
    errors = [float((moved - want).norm() / want.norm()) for want in (apart, clipped_sum(rows, bound))]
    steps = sum(entry[2] for entry in run.engine.accountant.history)
    if min(errors) > 1e-5:
        return Outcome("wrong", f"sum off by {100 * min(errors):.2g} %")
    return Outcome("correct") if steps == 2 else Outcome("wrong", f"{steps} of 2 steps counted")


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
        raise NotPossible(f"needs torchcsprng, which no current torch can install ({error})") from error
    model = mlp()
    run = make_private(engine, model, randn(RECORDS, 4), bound=1.0, privacy_engine=made)
    one_step(run, randn(RECORDS, 4))
    return Outcome("correct")


REST = [
    Scenario("two optimizers, one engine", "Encoder and decoder, each with its own.", two_optimizers),
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

SCENARIOS = [*LOSSES, *BATCHES, *REST]
