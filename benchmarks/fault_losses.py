"""Scenarios: what the loss is, and how it is differentiated."""

from __future__ import annotations

import torch
from fault_harness import (
    Outcome,
    RecordLoss,
    Run,
    Scenario,
    distance_gone,
    judged,
    make_private,
    one_step,
    randn,
    verdict,
)
from torch import Tensor, nn

RECORDS = 6


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def autoencoder() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.ConvTranspose2d(3, 2, 3, padding=1))


def images(*shape: int) -> Tensor:
    return randn(*shape).sigmoid()


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


def of_tokens(reduction: str) -> nn.Module:
    return nn.CrossEntropyLoss(ignore_index=0, reduction=reduction)


def of_sentence(model: nn.Module, sentence: Tensor) -> Tensor:
    return of_tokens("mean")(model(sentence).flatten(0, 1), sentence.flatten())


def token_step(run: Run, batch: Tensor) -> None:
    output = run.module(batch)
    # Opacus' ghost loss is told how many tokens make a record.
    shape = {} if isinstance(run.criterion, nn.Module) else {"shape": output.shape}
    run.criterion(output.flatten(0, 1), batch.flatten(), **shape).backward()
    run.optimizer.step()


def language_model() -> nn.Module:
    return nn.Sequential(nn.Embedding(6, 3), nn.Tanh(), nn.Linear(3, 6))


def padded_sentences() -> Tensor:
    """The first has one word, the others six."""
    words = torch.randint(1, 6, (RECORDS, 6), generator=torch.Generator().manual_seed(0))
    words[0, :5] = 0
    return words


def two_forwards(run: Run, batch: Tensor) -> None:
    run.optimizer.zero_grad()
    run.criterion(run.module(batch) * run.module(batch.flip(1))).backward()
    run.optimizer.step()


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


SCENARIOS = [
    Scenario(
        "nn.MSELoss on images",
        "The mean over records and pixels: the loss of a plain autoencoder.",
        judged(autoencoder, images(RECORDS, 2, 5, 4), criterion=lambda _: nn.MSELoss(), reduction="mean"),
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
        "two forwards, one backward",
        "Two views of each record: siamese networks, critics.",
        judged(
            mlp,
            randn(RECORDS, 4),
            loop=two_forwards,
            loss=lambda model, record: RecordLoss()(model(record) * model(record.flip(1))),
        ),
    ),
    Scenario(
        "cross-entropy with ignore_index, mean",
        "The mean is over all tokens of the batch: one long record more makes all the others lighter.",
        judged(
            language_model,
            padded_sentences(),
            loop=token_step,
            criterion=of_tokens,
            loss=of_sentence,
            reduction="mean",
        ),
        ours="refused",
        fault="the hooks cannot see into the loss: it promises to be a sum or mean over records",
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
