"""What a run spends: Gaussian mechanisms in, epsilon out, composed over all stages by Opacus' accountants.

Neighbouring data sets differ by adding or removing one record. ``"prv"`` (Gopi, Lee and Wutschitz 2021) is
the default and adds its own numerical error of at most 0.01 to epsilon; ``"rdp"`` (Mironov 2017) is looser
and never fails, so it stands in where the arithmetic of PRV does not carry (:func:`epsilon_of`). Opacus' third
accountant, ``"gdp"``, rests on a central limit theorem and is no upper bound: the ``Trainer`` does not offer it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from opacus.accountants import RDPAccountant, create_accountant
from scipy.special import log_ndtr

ACCOUNTANTS = ("prv", "rdp")
_LARGEST_NOISE = 1e6
_TOLERANCE = 1e-3
_PRV_LIMIT = 500.0  # Opacus' PRV works with exp(epsilon): near 709 it saturates and would report too little
_PRV_ROUNDING = 1e-13  # what its power of a Fourier transform may be off by, in units of delta / 1000, for each step
_ORDERS = [*RDPAccountant.DEFAULT_ALPHAS, 64, 80, 96, 128, 192, 256, 384, 512, 768, 1024]  # large ones for small deltas

STAND_IN = (
    f"RDP stands in where PRV's arithmetic does not carry (epsilon above {_PRV_LIMIT:g}; delta below "
    f"{1000 * _PRV_ROUNDING:g}, or below {_PRV_ROUNDING:g} times the number of steps)"
)

History = Sequence[tuple[float, float, int]]
"""Noise multiplier, sample rate and steps, as Opacus' accountants keep them."""


@dataclass(frozen=True)
class Mechanism:
    """One accounted mechanism: a (Poisson-subsampled) Gaussian, ``steps`` times.

    Each step adds noise of standard deviation ``noise_multiplier`` x sensitivity to a sum over records, every
    one of which takes part with probability ``sample_rate``. ``detail`` holds JSON-able parameters for the
    report (sensitivity, clip norm, dimensions); the accountant does not read it.
    """

    name: str
    noise_multiplier: float
    sample_rate: float = 1.0
    steps: int = 1
    detail: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise ValueError(
                f"noise_multiplier of {self.name}: expected a finite number >= 0, got {self.noise_multiplier}"
            )
        if not 0 <= self.sample_rate <= 1:
            raise ValueError(f"sample_rate of {self.name}: expected a probability, got {self.sample_rate}")
        if self.steps != int(self.steps) or self.steps < 0:
            raise ValueError(f"steps of {self.name}: expected an integer >= 0, got {self.steps}")


def epsilon(mechanisms: Sequence[Mechanism], delta: float, accountant: str = "prv") -> float:
    """Smallest epsilon that the accountant certifies at ``delta`` for all mechanisms composed.

    Guarantees: an upper bound on the epsilon of the adaptive composition, under add/remove of one record
    (:func:`epsilon_of`).

    Edge cases: no mechanism, no step or a rate of zero give 0; a mechanism without noise gives infinity.

    Raises:
        ValueError: ``delta`` outside (0, 1), or an unknown accountant.
    """
    if accountant not in ACCOUNTANTS:
        raise ValueError(f"accountant: expected one of {', '.join(ACCOUNTANTS)}, got {accountant!r}")
    return epsilon_of([(m.noise_multiplier, m.sample_rate, int(m.steps)) for m in mechanisms], delta, accountant)


def epsilon_of(history: History, delta: float, accountant: str, **options: Any) -> float:
    """:func:`epsilon` of ``history``, (noise multiplier, sample rate, steps) each, by an accountant of Opacus'.

    Opacus' PRV reports too little where rounding is no longer small beside what it looks for, and RDP's bound is
    returned instead: for epsilon above 500, where PRV fails, and for ``delta`` below 1e-10 or below 1e-13 times the
    number of steps. PRV allows for an error of delta / 1000, and raises a Fourier transform to the power of the steps,
    which leaves about 1e-16 a step in the tail.

    Args:
        options: of the accountant's ``get_epsilon``.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta: expected a number between 0 and 1, got {delta}")
    history = [(float(noise), float(rate), steps) for noise, rate, steps in history if steps and rate]
    if not history:
        return 0.0
    if any(noise == 0 for noise, _, _ in history):
        return math.inf
    if accountant != "prv":
        return _from_opacus(history, delta, accountant, **options)
    certified = math.inf
    if delta >= _PRV_ROUNDING * max(1000, sum(steps for *_, steps in history)):
        certified = _from_opacus(history, delta, "prv", **options)
    return certified if certified <= _PRV_LIMIT else _from_opacus(history, delta, "rdp", alphas=_ORDERS)


def _from_opacus(history: History, delta: float, accountant: str, **options: Any) -> float:
    """Epsilon of Opacus' accountant; infinity where it fails (too little noise for PRV's grid, say)."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # log(1 - q) at q = 1; RDP's remark that more orders would be tighter
        book = create_accountant(accountant)
        book.history = history
        try:
            certified = float(book.get_epsilon(delta, **options))
        except (RuntimeError, ValueError, MemoryError, OverflowError, IndexError):
            return math.inf
    return max(0.0, certified) if not math.isnan(certified) else math.inf


def calibrate_noise_multiplier(
    fixed: Sequence[Mechanism],
    *,
    target_epsilon: float,
    target_delta: float,
    sample_rate: float,
    steps: int,
    accountant: str = "prv",
) -> float:
    """Smallest noise multiplier of a subsampled Gaussian that, composed with ``fixed``, stays within the
    target.

    Found by bisection to one part in a thousand, always from above: ``epsilon(fixed + result) <=
    target_epsilon`` holds as evaluated.

    Edge cases: ``steps`` or ``sample_rate`` of zero need no noise and return 0 (if ``fixed`` alone is within
    the target).

    Raises:
        ValueError: the target is not a positive number, or ``fixed`` alone already exceeds it.
    """

    def spent(noise: float) -> float:
        return epsilon([*fixed, Mechanism("calibrated", noise, sample_rate, steps)], target_delta, accountant)

    noise = smallest_noise(spent, target_epsilon)
    if noise is None:
        already = epsilon(fixed, target_delta, accountant)
        raise ValueError(
            f"target_epsilon = {target_epsilon:g} cannot be reached: the other mechanisms alone spend "
            f"{already:.3g} at delta = {target_delta:g} ({accountant}); raise target_epsilon, or give "
            "stage 1 a smaller share"
        )
    return noise


def smallest_noise(
    spent: Callable[[float], float],
    target_epsilon: float,
    *,
    tolerance: float = _TOLERANCE,
    epsilon_tolerance: float = 0.0,
) -> float | None:
    """The smallest noise multiplier at which ``spent`` is at most ``target_epsilon``, up to a factor of
    ``1 + tolerance``, or one that leaves no more than ``epsilon_tolerance`` of it; None if a million is too little.

    Raises:
        ValueError: the target is not a positive number.
    """
    if not (target_epsilon > 0 and math.isfinite(target_epsilon)):
        raise ValueError(f"target_epsilon: expected a positive number, got {target_epsilon}")
    if spent(0.0) <= target_epsilon:
        return 0.0
    high = 1.0
    while (reached := spent(high)) > target_epsilon:
        high *= 4.0
        if high > _LARGEST_NOISE:
            return None
    low = high / 4.0
    while low > 1e-3 and (less := spent(low)) <= target_epsilon:
        low, high, reached = low / 4.0, low, less
    while high > low * (1 + tolerance) and target_epsilon - reached > epsilon_tolerance:
        middle = math.sqrt(low * high)
        if (less := spent(middle)) <= target_epsilon:
            high, reached = middle, less
        else:
            low = middle
    return high


def gaussian_dp_mu(epsilon: float, delta: float) -> float:
    """The mu of the Gaussian mechanism (noise multiplier 1/mu) that is exactly (epsilon, delta)-DP.

    Solves ``delta = Phi(mu/2 - epsilon/mu) - exp(epsilon) Phi(-mu/2 - epsilon/mu)`` (Balle and Wang 2018; Dong, Roth
    and Su 2019), rounded down. Squares of mu add up under composition, which makes ``mu**2`` the currency to split a
    budget in: mechanism j with ``mu_j = sqrt(share_j) * mu`` gets the noise multiplier ``1 / mu_j``.

    Raises:
        ValueError: ``epsilon`` not positive and finite, or ``delta`` outside (0, 1).
    """
    if not (epsilon > 0 and math.isfinite(epsilon)):
        raise ValueError(f"epsilon: expected a positive number, got {epsilon}")
    if not 0 < delta < 1:
        raise ValueError(f"delta: expected a number between 0 and 1, got {delta}")

    def exceeds(mu: float) -> bool:
        above = log_ndtr(mu / 2 - epsilon / mu)
        below = epsilon + log_ndtr(-mu / 2 - epsilon / mu)
        return above + math.log(-math.expm1(min(below - above, -1e-300))) > math.log(delta)

    low, high = 1e-9, 1.0
    while not exceeds(high):
        high *= 2.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if exceeds(middle) else (middle, high)
    return low
