"""How one budget is split over the mechanisms of both stages.

The currency is ``mu**2`` of Gaussian differential privacy, which adds up under composition: the whole budget is worth
that of the one Gaussian mechanism (noise multiplier 1/mu) to which the accountant gives it, a mechanism with share s
gets ``mu_s = sqrt(s) mu``, and DP-SGD of stage 2 gets what is left, its noise calibrated over everything together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..config import Config, ConfigError, PrivacyConfig
from ..engine.accounting import Mechanism, calibrate_noise_multiplier, epsilon

DP_SGD = "DP-SGD"
"""Name of stage 2's mechanism in the ledger and in the report."""

CLASS_MEANS = "class means"
COVARIANCE = "covariance"
ENCODER_DP_SGD = "DP-SGD of the encoder"

SHARES: dict[str, dict[str, float]] = {
    "linear": {"means": 0.35, "covariance": 0.35},
    "dp": {"means": 0.3, "encoder": 0.35},
    "public": {"means": 0.2},
    "private": {},
}
"""Default share of the budget of each mechanism of stage 1, by encoder mode. Tuned on scikit-learn's digits."""

_NAMES = {"means": CLASS_MEANS, "covariance": COVARIANCE, "encoder": ENCODER_DP_SGD}


@dataclass(frozen=True)
class Budget:
    """Planned mechanisms: stage 1's by the name of their share, and DP-SGD of stage 2."""

    stage1: Mapping[str, Mechanism]
    step: Mechanism


def plan_budget(config: Config, dataset_size: int) -> Budget:
    """Noise multipliers of all mechanisms for ``dataset_size`` training records.

    With ``noise_multiplier`` given, DP-SGD of stage 2 uses it as it is and stage 1's mechanisms get what stands in
    proportion to their shares; a multiplier of 0 takes the noise from all of them.

    Raises :class:`~dp2vae_fast.config.ConfigError`: shares of mechanisms that the encoder mode does not have, or a
    target that cannot be reached.
    """
    privacy = config.privacy
    shares = _shares(privacy)
    rate = privacy.expected_batch_size / dataset_size
    if privacy.noise_multiplier == 0:
        stage1 = {name: _mechanism(name, 0.0, privacy, rate) for name in shares}
        return Budget(stage1, Mechanism(DP_SGD, 0.0, rate, privacy.steps))
    if privacy.noise_multiplier is not None:
        step = Mechanism(DP_SGD, privacy.noise_multiplier, rate, privacy.steps)
        alone = epsilon([step], privacy.target_delta, privacy.accountant)
        mu = _mu(alone, privacy) / math.sqrt(1 - sum(shares.values()))
        return Budget(_stage1(shares, mu, privacy, rate), step)
    stage1 = _stage1(shares, _mu(privacy.target_epsilon or 0.0, privacy), privacy, rate)
    return Budget(stage1, calibrate_step(config, dataset_size, list(stage1.values())))


def _mu(target_epsilon: float, privacy: PrivacyConfig) -> float:
    """mu of the one Gaussian mechanism to which the accountant gives all of ``target_epsilon``."""
    return 1 / _least_noise([], target_epsilon, 1.0, 1, privacy)


def _least_noise(
    spent: Sequence[Mechanism], target_epsilon: float, rate: float, steps: int, privacy: PrivacyConfig
) -> float:
    try:
        return calibrate_noise_multiplier(
            spent,
            target_epsilon=target_epsilon,
            target_delta=privacy.target_delta,
            sample_rate=rate,
            steps=steps,
            accountant=privacy.accountant,
        )
    except ValueError as error:
        if not spent and 0 < target_epsilon < math.inf:  # then no share of anything else is in the way
            raise ConfigError(
                f"target_epsilon = {target_epsilon:g} cannot be reached by any noise at delta = "
                f"{privacy.target_delta:g} ({privacy.accountant}): raise one of them"
            ) from error
        raise ConfigError(str(error)) from error


def calibrate_step(config: Config, dataset_size: int, spent: Sequence[Mechanism]) -> Mechanism:
    """DP-SGD of stage 2 with the least noise that keeps the target together with what has been ``spent``."""
    privacy = config.privacy
    rate = privacy.expected_batch_size / dataset_size
    if privacy.noise_multiplier is not None:
        return Mechanism(DP_SGD, privacy.noise_multiplier, rate, privacy.steps)
    noise = _least_noise(spent, privacy.target_epsilon or 0.0, rate, privacy.steps, privacy)
    return Mechanism(DP_SGD, noise, rate, privacy.steps)


def _shares(privacy: PrivacyConfig) -> dict[str, float]:
    """Shares of the mode's mechanisms: its defaults, or those of the configuration, which then must name them all."""
    default = SHARES[privacy.encoder]
    if not privacy.shares:
        return dict(default)
    if set(privacy.shares) != set(default):
        known = ", ".join(default) or "none"
        raise ConfigError(
            f"shares name {', '.join(privacy.shares)}, but encoder {privacy.encoder} spends on {known}: name just those"
        )
    return dict(privacy.shares)


def _stage1(shares: Mapping[str, float], mu: float, privacy: PrivacyConfig, rate: float) -> dict[str, Mechanism]:
    mechanisms = {}
    for name, share in shares.items():
        noise = 1 / (math.sqrt(share) * mu)
        if name == "encoder":  # spread over the steps: as much epsilon as one Gaussian mechanism of that share
            alone = epsilon([Mechanism(name, noise)], privacy.target_delta, privacy.accountant)
            noise = _least_noise([], alone, rate, privacy.pretrain_steps, privacy)
        mechanisms[name] = _mechanism(name, noise, privacy, rate)
    return mechanisms


def _mechanism(name: str, noise: float, privacy: PrivacyConfig, rate: float) -> Mechanism:
    if name == "encoder":
        return Mechanism(_NAMES[name], noise, rate, privacy.pretrain_steps)
    return Mechanism(_NAMES[name], noise)
