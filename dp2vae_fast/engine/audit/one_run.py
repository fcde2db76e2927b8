"""A lower bound on epsilon from one run with many canaries.

Steinke, Nasr and Jagielski, "Privacy Auditing with One (1) Training Run" (2023, arXiv 2305.08846): each of m canaries
is put into the data on a fair coin of its own; from what was released an attacker guesses the coins, or abstains. Under
(epsilon, delta)-DP no more than a binomial number of guesses is right, up to a term in delta. Many right guesses
therefore refute a claim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy import special
from torch import Tensor


def right_guesses_p_value(m: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Largest probability, under (epsilon, delta)-DP, that at least ``right`` of ``guesses`` guesses are right.

    ``P[B >= v] + 2 m delta max_{1 <= i <= v} P[v - i <= B < v] / i`` with B ~ Binomial(guesses, e^eps / (1 + e^eps)), v
    the right guesses, m the canaries: independent fair coins decide which of them are present.

    Raises:
        ValueError: not 0 <= right <= guesses <= m, a negative epsilon, or delta outside [0, 1].
    """
    if not 0 <= right <= guesses <= m:
        raise ValueError(f"{right} right guesses of {guesses} about {m} canaries: expected 0 <= right <= guesses <= m")
    if not (epsilon >= 0 and 0 <= delta <= 1):
        raise ValueError(f"epsilon = {epsilon}, delta = {delta}: expected epsilon >= 0 and 0 <= delta <= 1")
    if right == 0:
        return 1.0
    chance = 1 / (1 + math.exp(-epsilon))
    i = np.arange(1, right + 1)
    below = special.bdtr(right - 1, guesses, chance) - np.where(
        i < right, special.bdtr(np.maximum(right - i - 1, 0), guesses, chance), 0.0
    )
    return min(1.0, float(special.bdtrc(right - 1, guesses, chance) + 2 * m * delta * (below / i).max()))


def epsilon_lower_bound(m: int, guesses: int, right: int, delta: float, confidence: float = 0.95) -> float:
    """The epsilon that ``right`` right guesses refute: with probability ``confidence`` or more, the true one is not
    below. 0 where nothing is refuted; rounded down to a millionth.

    Even with all m right it is no more than about ``ln(m / 3)`` at 95 %.
    """
    low, high = 0.0, 1.0
    if right_guesses_p_value(m, guesses, right, low, delta) >= 1 - confidence:
        return 0.0
    while right_guesses_p_value(m, guesses, right, high, delta) < 1 - confidence:
        low, high = high, 2 * high
        if high > 64:  # e^-64 has left the floating-point numbers
            return low
    while high - low > 1e-6:
        middle = (low + high) / 2
        if right_guesses_p_value(m, guesses, right, middle, delta) < 1 - confidence:
            low = middle
        else:
            high = middle
    return low


@dataclass(frozen=True)
class Guessed:
    """What an attack came to: the best bound of several attempts, each at a confidence that counts all of them."""

    lower_bound: float
    largest_possible: float
    right: int
    guesses: int


def attack(
    gradients: Tensor, mean_sum: Tensor, present: Tensor, *, rate: float, variance: float, delta: float
) -> Guessed:
    """Guess which canaries were in the run from the mean of its noisy sums.

    Args:
        gradients: clipped gradients of the m canaries, float64 ``[m, D]``.
        mean_sum: mean over the steps of the released sums, ``[D]``.
        present: the coins, bool ``[m]``.
        rate: sampling rate of a step.
        variance: claimed variance of the noise in each element of ``mean_sum``.

    The score is the best linear estimate of the coins, ``(G G^T + lambda)^-1 G (mean / rate - G^T 1/2)``, which tells
    canaries apart whose gradients are not orthogonal, for lambda from the claimed noise and for next to none (should
    noise have been left out). The clearest scores are guessed by their sign, from an eighth of them to all.
    """
    m = len(gradients)
    gram = gradients @ gradients.T
    target = gradients @ mean_sum / rate - gram.sum(1) / 2
    identity = torch.eye(m, dtype=gram.dtype)
    floor = 1e-10 * float(gram.diagonal().mean()) + 1e-300
    ridges = (max(4 * variance / rate**2, floor), floor)
    amounts = sorted({max(1, m // part) for part in (8, 4, 2, 1)})
    confidence = 1 - 0.05 / (len(ridges) * len(amounts))
    attempts = []
    for ridge in ridges:
        scores = torch.linalg.solve(gram + ridge * identity, target)
        correct = ((scores > 0) == present)[scores.abs().argsort(descending=True)]
        for guesses in amounts:
            right = int(correct[:guesses].sum())
            attempts.append((epsilon_lower_bound(m, guesses, right, delta, confidence), right, guesses))
    bound, right, guesses = max(attempts)
    return Guessed(bound, epsilon_lower_bound(m, m, m, delta, confidence), right, guesses)
