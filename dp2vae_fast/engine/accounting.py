"""What a run spends: Gaussian mechanisms in, epsilon out, composed over all stages by Opacus' accountants.

Neighbouring data sets differ by adding or removing one record. ``"prv"`` (Gopi, Lee and Wutschitz 2021) is
the default and adds its own numerical error of at most 0.01 to epsilon; ``"rdp"`` (Mironov 2017) is looser
and never fails. Opacus' third accountant, ``"gdp"``, rests on a central limit theorem and is no upper bound,
so it is not offered.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from opacus.accountants import create_accountant
from scipy.special import log_ndtr

ACCOUNTANTS = ("prv", "rdp")
_LARGEST_NOISE = 1e6
_TOLERANCE = 1e-3
_PRV_LIMIT = 500.0  # Opacus' PRV works with exp(epsilon): near 709 it saturates and would report too little


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

    Guarantees: an upper bound on the epsilon of the adaptive composition, under add/remove of one record.
    Where PRV's arithmetic gives up (above epsilon = 500), the looser RDP bound is returned instead.

    Edge cases: no mechanism, no step or a rate of zero give 0; a mechanism without noise gives infinity.

    Raises:
        ValueError: ``delta`` outside (0, 1), or an unknown accountant.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta: expected a number between 0 and 1, got {delta}")
    if accountant not in ACCOUNTANTS:
        raise ValueError(f"accountant: expected one of {', '.join(ACCOUNTANTS)}, got {accountant!r}")
    history = [(m.noise_multiplier, m.sample_rate, int(m.steps)) for m in mechanisms if m.steps and m.sample_rate]
    if not history:
        return 0.0
    if any(noise == 0 for noise, _, _ in history):
        return math.inf
    certified = _from_opacus(history, delta, accountant)
    if accountant == "prv" and certified > _PRV_LIMIT:
        certified = _from_opacus(history, delta, "rdp")
    return certified if certified >= 0 else 0.0


def _from_opacus(history: list[tuple[float, float, int]], delta: float, accountant: str) -> float:
    """Epsilon of Opacus' accountant; infinity where it fails (too little noise for PRV's grid, say)."""
    book = create_accountant(accountant)
    book.history = history
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # log(1 - q) at q = 1; RDP's remark that more orders would be tighter
        try:
            certified = float(book.get_epsilon(delta))
        except (RuntimeError, ValueError, MemoryError, OverflowError):
            return math.inf
    return certified if not math.isnan(certified) else math.inf


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
    if not (target_epsilon > 0 and math.isfinite(target_epsilon)):
        raise ValueError(f"target_epsilon: expected a positive number, got {target_epsilon}")

    def spent(noise: float) -> float:
        return epsilon([*fixed, Mechanism("calibrated", noise, sample_rate, steps)], target_delta, accountant)

    if spent(0.0) <= target_epsilon:
        return 0.0
    high = 1.0
    while spent(high) > target_epsilon:
        high *= 4.0
        if high > _LARGEST_NOISE:
            already = epsilon(fixed, target_delta, accountant)
            raise ValueError(
                f"target_epsilon = {target_epsilon:g} cannot be reached: the other mechanisms alone spend "
                f"{already:.3g} at delta = {target_delta:g} ({accountant}); raise target_epsilon, or give "
                "stage 1 a smaller share"
            )
    low = high / 4.0
    while low > 1e-3 and spent(low) <= target_epsilon:
        low, high = low / 4.0, low
    while high > low * (1 + _TOLERANCE):
        middle = math.sqrt(low * high)
        if spent(middle) <= target_epsilon:
            high = middle
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
