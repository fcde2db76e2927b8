"""One engine, one model, one step: what the engine made of a batch, judged by an oracle in float64.

Noise is off and SGD has a learning rate of 1, so the distance that the parameters move *is* the clipped sum. It is held
against one ordinary backward a record on the plain model; and the step is repeated with each record left out, as the
difference is what that record had to say: never more than the clipping norm C.
"""

from __future__ import annotations

import linecache
import re
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import opacus
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dp2vae_fast

ENGINES = ("opacus hooks", "opacus ghost", "ours")
VERDICTS = ("correct", "wrong", "refused", "crashes", "not possible")


@dataclass(frozen=True)
class Outcome:
    """One of :data:`VERDICTS`, and a figure or the first line of an error."""

    verdict: str
    detail: str = ""


@dataclass(frozen=True)
class Scenario:
    """``run(engine)`` trains a tiny model under one of :data:`ENGINES`.

    ``ours`` is the verdict that this package must have. Where it has not, ``fault`` says why.
    """

    name: str
    why: str
    run: Callable[[str], Outcome]
    ours: str = "correct"
    fault: str = ""


class NotPossible(Exception):
    """The engine, or PyTorch itself, has no way to do what the scenario asks for."""


class HalfDone(Exception):
    """An error came after parameters had changed."""


def outcome(scenario: Scenario, engine: str) -> Outcome:
    """Run one scenario under one engine; nothing that it raises gets out."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return scenario.run(engine)
        except NotPossible as error:
            return Outcome("not possible", str(error))
        except HalfDone as error:
            return Outcome("crashes", str(error))
        except Exception as error:
            return Outcome("refused" if is_refusal(error) else "crashes", first_line(error))


def first_line(error: Exception) -> str:
    """Of its message, without what differs between runs or takes no end."""
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {re.sub(r'0x[0-9a-f]+', '', line)[:150]}"


def is_refusal(error: Exception) -> bool:
    """Whether an engine meant to raise: the error comes from a ``raise`` in its own code."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    rooms = [Path(package.__file__).parent for package in (opacus, dp2vae_fast)]
    raised = linecache.getline(frame.filename, frame.lineno or 0).strip().startswith("raise")
    return raised and any(room in Path(frame.filename).parents for room in rooms)


# One step ------------------------------------------------------------------------------------------------------------


class RecordLoss(nn.Module):
    """A loss of each record whose output gradient differs at every position, as a criterion that every engine takes."""

    def __init__(self, reduction: str = "sum") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, output: Tensor, target: Tensor | None = None) -> Tensor:
        output = output.flatten(1)
        weights = torch.linspace(0.5, 1.5, output.shape[1], dtype=output.dtype)
        losses = (weights * output.sin() + 0.1 * output.square()).sum(1)
        return losses if self.reduction == "none" else getattr(losses, self.reduction)()


@dataclass
class Run:
    """What ``make_private`` returned, and the engine that it came from."""

    module: nn.Module
    optimizer: Any
    criterion: Callable[..., Any]
    loader: DataLoader
    engine: Any


Loop = Callable[[Run, Tensor], None]


def make_private(
    engine: str,
    model: nn.Module,
    records: Tensor,
    *,
    bound: float,
    criterion: nn.Module | None = None,
    batch_size: int | None = None,
    reduction: str = "sum",
    poisson_sampling: bool = False,
    **options: Any,
) -> Run:
    """``make_private`` of the engine named, without noise, with plain SGD; all records are one batch unless
    ``batch_size`` says otherwise."""
    criterion = criterion or RecordLoss(reduction)
    made = options.pop("privacy_engine", None) or (dp2vae_fast if engine == "ours" else opacus).PrivacyEngine()
    if engine != "ours":
        options["grad_sample_mode"] = engine.removeprefix("opacus ")
    parts = made.make_private(
        module=model,
        optimizer=options.pop("optimizer", None) or torch.optim.SGD(model.parameters(), lr=1.0),
        data_loader=DataLoader(TensorDataset(records), batch_size=batch_size or len(records)),
        criterion=criterion,
        noise_multiplier=0.0,
        max_grad_norm=bound,
        loss_reduction=reduction,
        poisson_sampling=poisson_sampling,
        **options,
    )
    return Run(parts[0], parts[1], parts[2] if len(parts) == 4 else criterion, parts[-1], made)


def one_step(run: Run, batch: Tensor) -> None:
    """The training loop of every tutorial."""
    run.optimizer.zero_grad()
    run.criterion(run.module(batch), batch).backward()
    run.optimizer.step()


def snapshot(model: nn.Module) -> list[Tensor]:
    return [p.detach().to(torch.float64, copy=True) for p in model.parameters()]


def distance(before: list[Tensor], after: list[Tensor]) -> Tensor:
    """What was subtracted from all parameters, as one vector."""
    return torch.cat([(a - b).flatten() for a, b in zip(before, after, strict=True)])


def distance_gone(model: nn.Module, train: Callable[[], None]) -> Tensor:
    """How far ``train`` moves the parameters, and that it moves none before it fails."""
    before = snapshot(model)
    try:
        train()
    except Exception as error:
        if bool(distance(before, snapshot(model)).any()):
            raise HalfDone(f"after parameters had changed, {first_line(error)}") from error
        raise
    return distance(before, snapshot(model))


# The oracle ----------------------------------------------------------------------------------------------------------


def record_gradients(model: nn.Module, records: Tensor, loss: Callable[[nn.Module, Tensor], Tensor]) -> list[Tensor]:
    """Each record's gradient over all parameters, as one vector, by one ordinary backward; zero where it is not
    finite."""
    rows = []
    for record in records.split(1):
        model.zero_grad()
        loss(model, record).backward()
        row = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])
        rows.append(row if bool(row.isfinite().all()) else torch.zeros_like(row))
    return rows


def clipped_sum(gradients: list[Tensor], bound: float) -> Tensor:
    return torch.stack([g * min(1.0, bound / max(float(g.norm()), 1e-300)) for g in gradients]).sum(0)


def verdict(
    moved: Callable[[Tensor], Tensor],
    batch: Tensor,
    want: Tensor | None,
    bound: float,
    tolerance: float = 1e-5,
    contributions: str = "without",
) -> Outcome:
    """``correct`` where the batch moves the parameters by the sum that is wanted and no record by more than the
    bound."""
    total, places = moved(batch), range(len(batch))
    if not bool(total.isfinite().all()):
        return Outcome("wrong", f"{int((~total.isfinite()).sum())} of {total.numel()} parameters no longer finite")
    error = 0.0 if want is None else float((total - want).norm() / want.norm())
    each = {
        "without": lambda: [total - moved(batch[[j for j in places if j != i]]) for i in places],
        "alone": lambda: [moved(batch[i : i + 1]) for i in places],
        "unknown": lambda: [torch.zeros(1)],
    }[contributions]()
    largest = float(torch.stack([c.norm() for c in each]).max()) / bound
    found = [] if error <= tolerance else [f"sum off by {percent(error)}"]
    if not largest <= 1 + 1e-4:
        found.append(f"one record contributes {largest:.3f} C")
    return Outcome("wrong", ", ".join(found)) if found else Outcome("correct")


def percent(part: float) -> str:
    return f"{100 * part:.0f} %" if part > 0.1 else f"{100 * part:.2g} %"


def judged(
    make: Callable[[], nn.Module],
    records: Tensor,
    *,
    loop: Loop = one_step,
    reference: Callable[[], nn.Module] | None = None,
    criterion: Callable[[str], nn.Module] = RecordLoss,
    loss: Callable[[nn.Module, Tensor], Tensor] | None = None,
    reduction: str = "sum",
    dtype: torch.dtype = torch.float64,
    tolerance: float = 1e-5,
    tightness: float = 1.0,
    contributions: Literal["without", "alone", "unknown"] = "without",
) -> Callable[[str], Outcome]:
    """A scenario's ``run``: ``loop`` moves the parameters by the clipped sum of one batch, or it does not.

    Args:
        make: builds the plain model; called anew, from the same seed, for every batch.
        records: the batch.
        loop: trains on one batch.
        reference: the oracle's model, where it is not as ``make`` builds it.
        criterion: built from the reduction.
        loss: the oracle's loss of one record; ``criterion(model(record), record)`` unless given.
        dtype: of the model. The oracle is float64 whatever this says.
        tolerance: relative, for the sum.
        tightness: C as a part of the median norm; 1 clips half of the records.
        contributions: of a record: how the batch "without" it differs, or a batch of that record "alone"; or "unknown".
    """
    measure = criterion(reduction)
    loss = loss or (lambda model, record: measure(model(record), record))

    def build(dtype: torch.dtype, make: Callable[[], nn.Module] = make) -> nn.Module:
        torch.manual_seed(0)
        return make().to(dtype)

    def run(engine: str) -> Outcome:
        gradients = record_gradients(build(torch.float64, reference or make), records, loss)
        norms = sorted(float(g.norm()) for g in gradients)
        bound = tightness * norms[len(norms) // 2]
        batch = records.to(dtype) if records.is_floating_point() else records

        def moved(rows: Tensor) -> Tensor:
            model = build(dtype)
            settings = dict(criterion=criterion(reduction), bound=bound, reduction=reduction)
            gone = distance_gone(model, lambda: loop(make_private(engine, model, batch, **settings), rows))
            return gone * (len(batch) if reduction == "mean" else 1)

        return verdict(moved, batch, clipped_sum(gradients, bound), bound, tolerance, contributions)

    return run


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
