"""An audit of DP-SGD as it really runs: what one record contributes, what is drawn, and what an attacker learns.

Every figure comes from steps that the user's own optimizer takes on the user's own model and loss
(:mod:`.released`). An audit can find faults; it proves no guarantee.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..accounting import Mechanism, epsilon
from ..optimizer import DPOptimizer
from .crafted import extreme_records, hostile_records
from .one_run import attack
from .randomness import noise_p_values, sampler_p_values, worst
from .released import Released, Subject

FALSE_ALARM = 1e-6
"""Probability that ``noise``, and that ``sampler``, fails although all draws are what they should be."""

ROUNDING = 1e-5
"""Room for the float32 arithmetic of the step from which a single record's sum is read, relative to the bound."""

ADDITION = 1e-3
"""Room for the float32 addition over the records of a batch, relative to the bound."""

_LOWERED = 1e-3  # the clip norm is lowered by this factor too, so that records reach it
_COPIES = (1, 2, 7, 30)
_BESIDE = 16  # records of the batch that another one joins
_NUMBERS = 100_000  # elements of noise, where 100 steps have as many: their standard deviation is known to 0.2 %
_LARGEST = 1 << 24  # numbers that the canaries' gradients may have together
_WORTH = 1.5  # epsilon of the audited run: more can hardly be told from no privacy at all
_STEPS = 200


@dataclass(frozen=True)
class Check:
    """One named check: passed if ``measured`` is at most ``limit`` (at least, where ``at_least``).

    ``can_fail``: whether any outcome would have failed.
    """

    name: str
    measured: float
    limit: float
    explanation: str
    at_least: bool = False
    can_fail: bool = True

    @property
    def passed(self) -> bool:
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON: a figure that is not finite becomes null."""
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}
        return plain | {"passed": self.passed}


def audit_engine(
    make: Callable[[], tuple[nn.Module, Any, DataLoader]],
    records: Sequence[Tensor],
    loss: Callable[..., Tensor],
    *,
    delta: float = 1e-5,
    canaries: int = 200,
    seed: int = 0,
) -> list[Check]:
    """Audit a model that :class:`~.privacy_engine.PrivacyEngine` has made private::

        def make():
            model = Net()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            return PrivacyEngine().make_private(module=model, optimizer=optimizer, data_loader=loader, ...)

        for check in audit_engine(make, (images, labels), lambda model, x, y: F.cross_entropy(model(x), y)):
            print(check.name, check.passed, check.measured, check.limit, check.explanation)

    Args:
        make: the script's own set-up; called once. What it returns is used up by the audit.
        records: some records of the data set, as the fields of a batch, each ``[N, ...]``; at least 16 records.
        loss: ``(module, *fields) -> scalar``, the training loop's own, reduced over the batch as the loop does. It must
            not be random (no dropout), and a batch may be empty.
        delta: at which epsilon is claimed.
        canaries: coins of the one-run bound; it can certify about ln(canaries / 5).

    Returns the checks ``contribution``, ``neighbours``, ``divisor``, ``noise``, ``sampler`` and ``one-run epsilon``.

    Raises:
        ValueError: too few records, fields of different lengths, or a loader without batches.
        TypeError: an inner optimizer whose step does not show the gradient it was given.
    """
    lengths = {len(field) for field in records}
    if len(lengths) != 1 or min(lengths) < _BESIDE:
        raise ValueError(f"records: fields of {sorted(lengths)} rows, expected one number of rows, at least {_BESIDE}")
    module, optimizer, loader = make()
    if isinstance(optimizer, DPOptimizer):  # the audit's batches are of no draw
        optimizer.capture.draws, optimizer.pending.one_draw_at_a_time = set, False
    count = lengths.pop()
    sampler: Any = getattr(loader, "draws", loader.batch_sampler)
    if sampler is None:
        raise ValueError("the data loader has no batch sampler: give it a batch_size, so that its draws can be audited")
    size = len(loader.dataset)  # type: ignore[arg-type]
    hostile = hostile_records(records)
    generator = torch.Generator().manual_seed(seed)
    crafted = extreme_records(records, min(canaries, size), generator)
    pool = [torch.cat(parts) for parts in zip(records, hostile, crafted, strict=True)]
    device = next(module.parameters()).device

    rows = getattr(loader.batch_sampler, "physical_batch_size", None) if getattr(optimizer, "padded", False) else None

    def take_step(indices: Tensor) -> None:
        for start in range(0, max(1, len(indices)), rows or max(1, len(indices))):
            part = indices[start : start + rows] if rows else indices
            batch = [field[part] for field in pool]
            if rows:  # as the loader gives them: filled up with zeros, and announced
                batch = [torch.cat([x, x.new_zeros(rows - len(part), *x.shape[1:])]) for x in batch]
                last = start + rows >= len(indices)
                optimizer.next_physical_batch(torch.arange(rows) < len(part), start == 0, last)
            optimizer.zero_grad()
            total = loss(module, *(x.to(device) for x in batch))
            (total if len(batch[0]) else total.nan_to_num()).backward()  # the mean over nobody
            optimizer.step()

    return audit_subject(
        Subject(
            optimizer,
            take_step,
            ordinary=torch.arange(min(count, 24)),
            hostile=torch.arange(count, count + len(hostile[0])),
            canaries=torch.arange(count + len(hostile[0]), len(pool[0])),
            draws=endless(sampler),
            dataset_size=size,
            sample_rate=getattr(loader, "sample_rate", 1 / len(loader)),
            noise_multiplier=optimizer.noise_multiplier,
            delta=delta,
        ),
        seed=seed,
    )


def audit_subject(subject: Subject, *, seed: int = 0) -> list[Check]:
    """All checks of this module, in the order of their names in :func:`audit_engine`."""
    released = Released(subject)
    return [
        *contributions(subject, released),
        divisor(subject, released),
        noise(subject, released),
        sampler(subject),
        one_run(subject, released, seed),
    ]


def contributions(subject: Subject, released: Released) -> list[Check]:
    """``contribution``: no record alone moves the sum by more than the sensitivity. ``neighbours``: nor does one that
    joins a batch; so no record changes what another one contributes."""
    worst_alone = worst_joining = 0.0
    candidates = torch.cat((subject.ordinary, subject.hostile))
    for factor in (1.0, _LOWERED):
        with released.clipped_to(factor):
            bound = released.sensitivity()
            beside = subject.ordinary[:_BESIDE]
            without = released(beside)
            for record in candidates.split(1):
                worst_alone = _larger(worst_alone, float(released(record).norm()) / bound)
                joined = released(torch.cat((beside, record)))
                worst_joining = _larger(worst_joining, float((joined - without).norm()) / bound)
    room = max(torch.finfo(p.dtype).eps for p in released.parameters)  # a sum is released in the parameters' precision
    said = f"of {len(candidates)} records, {len(subject.hostile)} of them hostile, also with the clip norm a thousandth"
    return [
        Check(
            "contribution", worst_alone, 1 + max(ROUNDING, room), f"largest clipped gradient over sensitivity(), {said}"
        ),
        Check(
            "neighbours",
            worst_joining,
            1 + max(ADDITION, room),
            f"largest change of the clipped sum over sensitivity() as one record joins a batch, {said}",
        ),
    ]


def divisor(subject: Subject, released: Released) -> Check:
    """``divisor``: n copies of a record move the step n times as far as one, whatever the batch's size."""
    records = subject.ordinary.split(1)
    record = next((r for r in records if float(released(r).norm()) > 0), records[0])
    one = released(record)
    scale = float(one.norm())
    deviation = math.inf if scale == 0 else 0.0
    for copies in _COPIES[1:]:
        many = released(record.expand(copies)) / copies
        deviation = _larger(deviation, float((many - one).norm()) / max(scale, 1e-300))
    return Check(
        "divisor",
        deviation,
        0.01,
        f"relative change of one record's part in the step over batches of {', '.join(map(str, _COPIES))} copies",
    )


def noise(subject: Subject, released: Released) -> Check:
    """``noise``: what steps add to the clipped sum is normal, of the claimed size, and nowhere repeated."""
    claimed = released.noise_std()
    if claimed == 0:
        return Check("noise", 0.0, FALSE_ALARM, "noise_multiplier is 0: nothing is private", at_least=True)
    elements = sum(p.numel() for p in released.parameters)
    batches = [subject.ordinary[:0], subject.ordinary[:_BESIDE]]
    exact = [released.by_parameter(batch, noisy=False) for batch in batches]
    steps = []
    for step in range(max(6, min(100, math.ceil(_NUMBERS / elements)))):
        drawn = released.by_parameter(batches[step % 2], noisy=True)
        steps.append([((d - e) / claimed).float() for d, e in zip(drawn, exact[step % 2], strict=True)])
    every = torch.cat([z.flatten() for step in steps for z in step])
    p_values = noise_p_values(steps)
    name, probability = worst(p_values)
    return Check(
        "noise",
        probability,
        FALSE_ALARM,
        f"probability of noise as unlikely as this, of {len(p_values)} tests ({name}); its standard deviation is "
        f"{float(every.double().square().mean().sqrt()):.4f} of the claimed over {len(every)} numbers",
        at_least=True,
    )


def sampler(subject: Subject) -> Check:
    """``sampler``: every record enters every draw on its own coin of the claimed probability."""
    count = max(40, min(400, 20_000_000 // subject.dataset_size))
    draws = [list(next(subject.draws)) for _ in range(count)]
    p_values = sampler_p_values(draws, subject.dataset_size, subject.sample_rate)
    name, probability = worst(p_values)
    mean = sum(map(len, draws)) / count
    return Check(
        "sampler",
        probability,
        FALSE_ALARM,
        f"probability of draws as unlikely as these, of {len(p_values)} tests ({name}); {count} draws of "
        f"{mean:.1f} records on average, {subject.dataset_size * subject.sample_rate:.1f} claimed",
        at_least=True,
    )


def one_run(subject: Subject, released: Released, seed: int = 0) -> Check:
    """``one-run epsilon``: an attacker who sees every step learns no more of the canaries than is claimed.

    The data set is nothing but canaries, each present or not on a fair coin; positions of absent ones are drawn by the
    real sampler and left out. Weights stay as they are from step to step, which DP-SGD's guarantee allows an attacker
    to wish for. As many steps are taken as are worth an epsilon of about 1.5.
    """
    generator = torch.Generator().manual_seed(seed)
    m = min(len(subject.canaries), subject.dataset_size)
    present = torch.randint(2, (m,), generator=generator).bool()
    elements = sum(p.numel() for p in released.parameters)
    some = torch.linspace(0, elements - 1, min(elements, max(1, _LARGEST // m)), dtype=torch.float64).long()
    gradients = torch.stack([released(canary)[some] for canary in subject.canaries[:m].split(1)])
    steps, claimed = _worth(subject.noise_multiplier, subject.sample_rate, subject.delta)
    total = torch.zeros(len(some), dtype=torch.float64)
    for _ in range(steps):
        drawn = torch.tensor([i for i in next(subject.draws) if i < m and present[i]], dtype=torch.int64)
        total += released(subject.canaries[drawn], noisy=True)[some]
    guessed = attack(
        gradients,
        total / steps,
        present,
        rate=subject.sample_rate,
        variance=released.noise_std() ** 2 / steps,
        delta=subject.delta,
    )
    can_fail = guessed.largest_possible > claimed
    useless = "" if can_fail else ", so that this check cannot fail"
    return Check(
        "one-run epsilon",
        guessed.lower_bound,
        claimed,
        f"lower bound at 95 % against the epsilon claimed for {steps} step(s) at delta = {subject.delta:g}: "
        f"{guessed.right} of {guessed.guesses} guesses right about {m} canaries, which can certify at most "
        f"{guessed.largest_possible:.2f}{useless}",
        can_fail=can_fail,
    )


@cache
def _worth(noise_multiplier: float, sample_rate: float, delta: float) -> tuple[int, float]:
    """Steps of the audited run, and the epsilon claimed for them: many, but with an epsilon within ``_WORTH``."""

    def claimed(steps: int, accountant: str = "prv") -> float:
        return epsilon([Mechanism("audited", noise_multiplier, sample_rate, steps)], delta, accountant)

    steps = _STEPS if claimed(1) <= _WORTH else 1
    while steps > 1 and claimed(steps) > _WORTH:
        steps = math.floor(0.7 * steps)
    return steps, min(claimed(steps), claimed(steps, "rdp"))


def endless(sampler: Iterable[Sequence[int]]) -> Iterator[Sequence[int]]:
    """Pass after pass of a sampler."""
    while True:
        yield from sampler


def _larger(one: float, other: float) -> float:
    """The maximum, in which a figure that is not a number counts as infinite."""
    return max(one, math.inf if math.isnan(other) else other)
