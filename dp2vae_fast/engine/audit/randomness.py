"""Tests of what was really drawn: noise that should be standard normal, Poisson draws that should be Bernoulli.

Every function returns p-values by name. Each of them, were the draws what they should be, lies below p with probability
p (no large-sample approximation is made), so the smallest of k, times k, is below a stated false-alarm probability no
more often than that.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy import special, stats
from torch import Tensor

_PREFIX = 1 << 16  # elements of a tensor that are correlated with those of another
_SHAPE = 10_000  # numbers of which the shape of the distribution is tested


def noise_p_values(steps: Sequence[Sequence[Tensor]]) -> dict[str, float]:
    """Is this independent standard normal noise?

    Args:
        steps: noise over its claimed standard deviation, one tensor for each parameter, for each of at least two steps.

    Mean and variance of each parameter over all steps; the shape of the distribution; correlation of a parameter with
    itself one, two steps and all the way back, of its halves and of neighbouring numbers, and with every other
    parameter of its step (shifted by one and two numbers, too) and of the step before. Given one of two independent
    normal vectors, their inner product over its norm is exactly normal.
    """
    found: dict[str, float] = {}
    for i in range(len(steps[0])):
        z = torch.cat([step[i].flatten() for step in steps]).double()
        found[f"variance of parameter {i}"] = _chi_square(len(z), float(z.square().sum()))
        found[f"mean of parameter {i}"] = _normal(float(z.sum()) / math.sqrt(len(z)))
    sample = torch.cat([z.flatten()[:_SHAPE] for step in steps for z in step])[:_SHAPE].double().numpy()
    found["shape"] = float(stats.kstest(sample, "norm", method="exact").pvalue)
    for t, step in enumerate(steps):
        for i, z in enumerate(step):
            for back in {1, 2, t} & set(range(1, t + 1)):
                found[f"parameter {i}, steps {t - back} and {t}"] = _correlation(steps[t - back][i], z)
            flat = z.flatten()
            found[f"halves of parameter {i}, step {t}"] = _correlation(flat[: len(flat) // 2], flat[len(flat) // 2 :])
            found[f"neighbours in parameter {i}, step {t}"] = _correlation(flat[::2], flat[1::2])
            for j in range(i):
                found[f"parameters {j} and {i}, step {t}"] = _correlation(step[j], z)
                for shift in (1, 2):
                    found[f"parameters {j} and {i} by {shift}, step {t}"] = _correlation(step[j].flatten()[shift:], z)
                    found[f"parameters {i} and {j} by {shift}, step {t}"] = _correlation(flat[shift:], step[j])
            if t:
                for j in range(len(step)):
                    if j != i:
                        name = f"parameter {j} of step {t - 1} and {i} of step {t}"
                        found[name] = _correlation(steps[t - 1][j], z)
    return found


def sampler_p_values(draws: Sequence[Sequence[int]], dataset_size: int, sample_rate: float) -> dict[str, float]:
    """Does every record enter every draw on its own coin of probability ``sample_rate``?

    Args:
        draws: record indices of each draw, 0 to ``dataset_size`` - 1.

    Sizes of the draws, the number of draws that each record is in, and the number of records that two consecutive
    draws share (given the first of them) are binomial. Each count is turned into an exactly uniform number by a coin of
    this test's own between its two tail probabilities, then into a normal one, and mean and dispersion are tested. A
    sampler of fixed size has no dispersion of sizes; one that shuffles has none of counts, and shares no record. The
    record drawn least or most often has its own tail probability, times the number of records.

    Edge cases: a record twice in one draw, or an index out of range, gives a p-value of 0.
    """
    sizes = np.array([len(draw) for draw in draws])
    sets = [set(draw) for draw in draws]
    within = all(0 <= i < dataset_size for drawn in sets for i in drawn)
    if not within or any(len(drawn) != size for drawn, size in zip(sets, sizes, strict=True)):
        return {"a record twice in a draw, or none of the data set's": 0.0}
    counts = np.bincount(np.concatenate([np.asarray(d, dtype=np.int64) for d in draws]), minlength=dataset_size)
    shared = np.array([len(one & other) for one, other in itertools.pairwise(sets)])
    coins = np.random.default_rng(0)
    found = {}
    for name, observed, trials in (
        ("sizes of draws", sizes, np.full(len(sizes), dataset_size)),
        ("draws that a record is in", counts, np.full(dataset_size, len(draws))),
        ("records that two draws share", shared, sizes[:-1]),
    ):
        z = _normal_scores(observed, trials, sample_rate, coins)
        found[f"mean of {name}"] = _normal(float(z.sum()) / math.sqrt(len(z)))
        found[f"dispersion of {name}"] = _chi_square(len(z), float(np.square(z).sum()))
    tails = np.minimum(
        stats.binom.cdf(counts, len(draws), sample_rate), stats.binom.sf(counts - 1, len(draws), sample_rate)
    )
    found["the record that is drawn least or most"] = min(1.0, 2 * dataset_size * float(tails.min()))
    return found


def worst(p_values: dict[str, float]) -> tuple[str, float]:
    """The most surprising of several p-values and its probability with all of them counted (Bonferroni)."""
    name = min(p_values, key=lambda key: p_values[key])
    return name, min(1.0, len(p_values) * p_values[name])


def _normal_scores(observed: np.ndarray, trials: np.ndarray, rate: float, coins: np.random.Generator) -> np.ndarray:
    """Standard normal numbers from binomial counts: exact, by a uniform choice within each count's step of the
    distribution function."""
    if rate == 1:  # everybody, always
        return np.where(observed == trials, coins.standard_normal(len(observed)), np.inf)
    at, coin = stats.binom.pmf(observed, trials, rate), coins.random(len(observed))
    lower = stats.binom.cdf(observed - 1, trials, rate) + coin * at
    upper = stats.binom.sf(observed, trials, rate) + (1 - coin) * at  # 1 - lower, exact in its own tail
    return np.where(lower < upper, special.ndtri(lower), -special.ndtri(upper))


def _correlation(one: Tensor, other: Tensor) -> float:
    """p-value of the inner product of two tensors, over as many elements as both have."""
    n = min(one.numel(), other.numel(), _PREFIX)
    one, other = one.flatten()[:n].double(), other.flatten()[:n].double()
    scale = float(one.norm())
    return 1.0 if scale == 0 else _normal(float(one @ other) / scale)


def _normal(value: float) -> float:
    """Two-sided p-value of a standard normal number; 0 for one that is not a number."""
    return 0.0 if math.isnan(value) else 2 * float(special.ndtr(-abs(value)))


def _chi_square(degrees: int, value: float) -> float:
    """Twice the probability of the nearer tail of a chi-square number; 0 for one that is not a number."""
    tails = special.chdtr(degrees, value), special.chdtrc(degrees, value)
    return 0.0 if math.isnan(value) else min(1.0, 2 * float(min(tails)))
