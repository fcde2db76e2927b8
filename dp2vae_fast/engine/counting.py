"""Tells an accountant of steps; several on one draw as the one mechanism that they are."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple
from weakref import WeakSet

from opacus.accountants import IAccountant

from .accounting import History
from .capture.book import Origin
from .sampling import PoissonSampler


def in_use(samplers: Iterable[PoissonSampler]) -> set[Origin]:
    """The draws whose records the user has been given last."""
    return {("draw", s.number, *s.in_use) for s in samplers if s.in_use is not None}


class Draws:
    """The draws that the batches of a module may be on: those in use of its own loaders, or else of any loader of the
    engines that it has them from."""

    def __init__(self) -> None:
        self.own: list[PoissonSampler] = []
        self.counters: set[StepCounter] = set()

    def add(self, sampler: PoissonSampler, counter: StepCounter) -> None:
        """Another loader's ``sampler``, of the engine that counts by ``counter``; the engines before count its draws
        too, should a batch of it reach their optimizers."""
        self.own.append(sampler)
        self.counters.add(counter)
        for each in self.counters:
            each.samplers.update(self.own)

    def __call__(self) -> set[Origin]:
        return in_use(self.own) or set().union(*(in_use(counter.samplers) for counter in self.counters))

    def data_of(self, number: int) -> int:
        """Tells the data set of the sampler of this ``number`` from others."""
        samplers = {*self.own}.union(*(counter.samplers for counter in self.counters))
        return next((id(s.data) for s in samplers if s.number == number), number)


class _Counted(NamedTuple):
    """A step that the accountant was told of."""

    origins: frozenset[Origin]
    noise_multiplier: float
    sample_rate: float


class StepCounter:
    """Counts the steps of all optimizers of one engine.

    A step on a draw of its own is a subsampled Gaussian mechanism. Several steps on one draw, of one optimizer or of
    several, are not that each: together they are one Gaussian mechanism on that draw, whose noise multiplier is
    ``(sum of z^-2)^(-1/2)``. So a step takes back the ones counted before it that share an origin with it.

    Args:
        accountant: gives the accountant.

    Attributes:
        samplers: of all loaders of the engine, whose draws have their own rate; and of such as other engines have made
            for its modules.
    """

    def __init__(self, accountant: Callable[[], IAccountant]) -> None:
        self.samplers: WeakSet[PoissonSampler] = WeakSet()  # each has a loader, an optimizer and with it a model
        self._accountant = accountant
        self._steps: dict[Origin, _Counted] = {}  # that others may share a draw or a batch with
        self._latest: dict[tuple[str, int], Origin] = {}  # of each loader and model: it may be in use for long
        self._older: deque[Origin] = deque()  # of all of them

    def forget(self) -> None:
        """The history has become another: steps to come share no draw with it."""
        self._steps.clear()
        self._latest.clear()
        self._older.clear()

    def hook(self, sample_rate: float, batch_size: int | None = None) -> Callable[[Any], None]:
        """Step hook of an optimizer whose batches are drawn with ``sample_rate``; of ``batch_size`` records at most,
        where steps that are skipped may have merged several."""

        def count(optimizer: Any) -> None:
            accountant, origins = self._accountant(), set(optimizer.origins)
            merged = optimizer.accumulated_iterations
            if batch_size is not None:
                merged = max(merged, math.ceil(optimizer.pending.records / batch_size))
            # Numbers of this moment: a tensor would go on changing in the history.
            z, rate = float(optimizer.noise_multiplier), min(1.0, float(sample_rate) * merged)
            drawn = [s for s in self.samplers if any(o[:2] == ("draw", s.number) for o in origins)]
            for sampler in drawn:
                sampler.step_counted()
            rate = max([rate, *(s.sample_rate for s in drawn)])
            before = list(accountant.history)
            shared = dict.fromkeys(self._steps[o] for o in origins & self._steps.keys())
            try:
                for counted in shared:
                    if _take_back(accountant.history, counted):
                        origins |= counted.origins & self._steps.keys()
                        other = counted.noise_multiplier
                        z = 0.0 if 0.0 in (z, other) else 1.0 / math.hypot(1.0 / z, 1.0 / other)
                        rate = max(rate, counted.sample_rate)
                accountant.step(noise_multiplier=z, sample_rate=rate)
            except BaseException:
                accountant.history = before
                raise
            self._remember(_Counted(frozenset(origins), z, rate), shared)

        return count

    def _remember(self, step: _Counted, instead_of: Iterable[_Counted]) -> None:
        """``step`` was counted: keep it for the latest draw or batch of each source, and for 128 older ones."""
        for origin in set().union(*(replaced.origins for replaced in instead_of)) - step.origins:
            self._steps.pop(origin, None)
        for origin in step.origins:
            if origin not in self._steps:
                latest = self._latest.setdefault(origin[:2], origin)
                if latest != origin:
                    older, self._latest[origin[:2]] = sorted((latest, origin), key=lambda o: o[2])
                    self._older.append(older)
            self._steps[origin] = step
        while len(self._older) > 128:
            self._steps.pop(self._older.popleft(), None)


def begins_with(history: History, start: History) -> bool:
    """Whether the first steps of ``history`` are those of ``start``."""
    steps, first = ([entry for z, rate, n in h for entry in [(z, rate)] * n] for h in (history, start))
    return steps[: len(first)] == first


def _take_back(history: list[tuple[float, float, int]], counted: _Counted) -> bool:
    """Remove one step from ``history``; false where it is no longer there."""
    for i in reversed(range(len(history))):
        noise_multiplier, rate, steps = history[i]
        if (noise_multiplier, rate) == (counted.noise_multiplier, counted.sample_rate):
            history[i : i + 1] = [(noise_multiplier, rate, steps - 1)] if steps > 1 else []
            return True
    return False
