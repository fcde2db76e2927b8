"""What a run spends: against Opacus, against an independent accountant and against closed forms."""

from __future__ import annotations

import math

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from opacus.accountants import PRVAccountant
from scipy.special import ndtr

from dp2vae_fast import PrivacyEngine
from dp2vae_fast.engine import accounting
from dp2vae_fast.engine.accounting import Mechanism, calibrate_noise_multiplier, epsilon, gaussian_dp_mu

DELTA = 1e-5

RUNS = {
    "one Gaussian": [Mechanism("a", 1.0)],
    "much noise": [Mechanism("a", 50.0)],
    "little noise": [Mechanism("a", 0.3)],
    "DP-SGD": [Mechanism("a", 1.0, 0.1, 200)],
    "DP-SGD, large batches": [Mechanism("a", 8.0, 0.9, 30)],
    "DP-SGD, small rate": [Mechanism("a", 0.7, 0.004, 2000)],
    "two stages": [Mechanism("means", 2.0), Mechanism("moment", 5.0), Mechanism("a", 6.0, 0.36, 150)],
    "two DP-SGD": [Mechanism("encoder", 2.0, 0.05, 300), Mechanism("decoder", 1.5, 0.1, 100)],
    "stage 1 dominates": [Mechanism("means", 0.4), Mechanism("a", 4.0, 0.1, 50)],
}


def independent_epsilon(mechanisms: list[Mechanism], delta: float) -> float:
    book = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for m in mechanisms:
        event: dp_accounting.DpEvent = dp_accounting.GaussianDpEvent(m.noise_multiplier)
        if m.sample_rate < 1:
            event = dp_accounting.PoissonSampledDpEvent(m.sample_rate, event)
        book.compose(dp_accounting.SelfComposedDpEvent(event, m.steps))
    return book.get_epsilon(delta)


def exact_delta(mu: float, eps: float) -> float:
    return float(ndtr(mu / 2 - eps / mu) - math.exp(eps) * ndtr(-mu / 2 - eps / mu))


@pytest.mark.parametrize("name", RUNS)
def test_agrees_with_an_independent_accountant_and_never_lies_below_it(name):
    ours, theirs = epsilon(RUNS[name], DELTA), independent_epsilon(RUNS[name], DELTA)
    assert theirs <= ours <= theirs + 0.02  # Opacus adds 0.01 to an estimate that is within 0.01 of the truth


@pytest.mark.parametrize("name", RUNS)
def test_is_what_opacus_gives_for_the_same_history(name):
    book = PRVAccountant()
    book.history = [(m.noise_multiplier, m.sample_rate, m.steps) for m in RUNS[name]]
    assert epsilon(RUNS[name], DELTA) == book.get_epsilon(DELTA)


@pytest.mark.parametrize("name", RUNS)
def test_rdp_is_a_looser_bound(name):
    assert epsilon(RUNS[name], DELTA, "rdp") >= independent_epsilon(RUNS[name], DELTA)


@pytest.mark.parametrize("sigmas", [(1.0,), (3.0, 4.0), (0.5, 2.0, 7.0)])
def test_full_batch_gaussians_compose_as_one(sigmas):
    mu = math.sqrt(sum(s**-2 for s in sigmas))
    ours = epsilon([Mechanism(str(s), s) for s in sigmas], DELTA)
    assert exact_delta(mu, ours) <= DELTA < exact_delta(mu, ours - 0.03)


def test_order_and_grouping_do_not_matter():
    split = [Mechanism("a", 2.0, 0.1, 30), Mechanism("b", 5.0), Mechanism("a", 2.0, 0.1, 70)]
    whole = [Mechanism("b", 5.0), Mechanism("a", 2.0, 0.1, 100)]
    assert epsilon(split, DELTA) == pytest.approx(epsilon(whole, DELTA), abs=2e-3)


def test_nothing_spent_and_no_noise():
    assert epsilon([], DELTA) == 0
    assert epsilon([Mechanism("a", 0.0, 0.1, 0), Mechanism("b", 1.0, 0.0, 10)], DELTA) == 0
    assert epsilon([Mechanism("a", 1.0), Mechanism("b", 0.0)], DELTA) == math.inf


@pytest.mark.parametrize("accountant", ["prv", "rdp", "gdp"])
@pytest.mark.filterwarnings("ignore:GDP accounting")
def test_the_engine_has_spent_nothing_before_a_step_and_everything_without_noise(accountant):
    engine = PrivacyEngine(accountant=accountant)
    assert engine.get_epsilon(DELTA) == 0.0
    engine.accountant.history = [(0.0, 0.1, 1)]
    assert engine.get_epsilon(DELTA) == math.inf
    with pytest.raises(ValueError, match="delta"):
        engine.get_epsilon(0.0)


@pytest.mark.parametrize("delta", [1e-5, 1e-9])
@pytest.mark.parametrize("noise", [0.01, 0.03, 0.04])
def test_hardly_any_noise_is_bounded_from_above_where_prv_overflows(noise, delta):
    ours = epsilon([Mechanism("a", noise)], delta)
    assert gaussian_dp_mu(ours, delta) >= 1 / noise * (1 - 1e-9)
    assert math.isfinite(ours)


@pytest.mark.parametrize(
    ("noise", "steps", "delta"),
    [
        (100.0, 10_000, 1e-12),  # Opacus' PRV: 7.1713 for 7.2385
        (333.0, 10_000, 1e-13),  # 2.0742 for 2.1168
        (1054.0, 100_000, 1e-11),  # 1.9125 for 1.9151
        (10.0, 100, 1e-10),
        (0.03, 1, 1e-8),  # 709.8 for 741.7
        (1.0, 1, 1e-20),
    ],
)
def test_neither_the_trainer_nor_the_engine_reports_less_than_the_truth(noise, steps, delta):
    engine = PrivacyEngine()
    engine.accountant.history = [(noise, 1.0, steps)]
    ours = epsilon([Mechanism("a", noise, 1.0, steps)], delta)
    assert engine.get_epsilon(delta) == ours
    assert gaussian_dp_mu(ours, delta) >= math.sqrt(steps) / noise
    assert gaussian_dp_mu(0.8 * ours, delta) < math.sqrt(steps) / noise  # and not by far more


@pytest.mark.parametrize("steps", [999, 10**6])
def test_prv_is_left_where_rounding_exceeds_the_error_that_it_allows_for(steps, monkeypatch):
    asked = []
    monkeypatch.setattr(accounting, "_from_opacus", lambda *a, **_: asked.append(a[2]) or 1.0)
    least = 1e-13 * max(1000, steps)
    for delta in (least, 0.99 * least):
        accounting.epsilon_of([(1.0, 0.1, steps)], delta, "prv")
    assert asked == ["prv", "rdp"]


@pytest.mark.parametrize(("target", "delta", "steps"), [(7.17, 1e-12, 10_000), (2.07, 1e-13, 10_000), (0.5, 1e-20, 10)])
def test_calibration_at_a_small_delta_keeps_to_the_target(target, delta, steps):
    noise = calibrate_noise_multiplier([], target_epsilon=target, target_delta=delta, sample_rate=1.0, steps=steps)
    assert math.sqrt(steps) / noise <= gaussian_dp_mu(target, delta)


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
@pytest.mark.parametrize(
    ("fixed", "target", "rate", "steps"),
    [
        ([], 1.0, 0.1, 100),
        ([], 10.0, 0.36, 150),
        ([Mechanism("m", 3.0)], 2.0, 0.05, 400),
        ([Mechanism("m", 0.8)], 30.0, 1.0, 3),
    ],
)
def test_calibration_is_tight_and_never_above_the_target(fixed, target, rate, steps, accountant):
    noise = calibrate_noise_multiplier(
        fixed, target_epsilon=target, target_delta=DELTA, sample_rate=rate, steps=steps, accountant=accountant
    )
    assert epsilon([*fixed, Mechanism("sgd", noise, rate, steps)], DELTA, accountant) <= target
    assert epsilon([*fixed, Mechanism("sgd", noise / 1.002, rate, steps)], DELTA, accountant) > target


def test_calibration_of_nothing_needs_no_noise():
    assert calibrate_noise_multiplier([], target_epsilon=1.0, target_delta=DELTA, sample_rate=0.1, steps=0) == 0


def test_impossible_targets_say_why():
    with pytest.raises(ValueError, match="the other mechanisms alone spend 4"):
        calibrate_noise_multiplier(
            [Mechanism("m", 1.0)], target_epsilon=4.0, target_delta=DELTA, sample_rate=0.1, steps=10
        )
    with pytest.raises(ValueError, match="target_epsilon: expected a positive number, got -1"):
        calibrate_noise_multiplier([], target_epsilon=-1.0, target_delta=DELTA, sample_rate=0.1, steps=10)


@pytest.mark.parametrize("eps", [0.1, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("delta", [1e-9, 1e-5, 1e-2])
def test_gaussian_dp_mu_is_exact_and_rounded_down(eps, delta):
    mu = gaussian_dp_mu(eps, delta)
    assert exact_delta(mu * (1 - 1e-6), eps) <= delta <= exact_delta(mu * (1 + 1e-6), eps)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise_multiplier": -1.0}, "noise_multiplier of m"),
        ({"noise_multiplier": math.nan}, "noise_multiplier of m"),
        ({"noise_multiplier": 1.0, "sample_rate": 1.5}, "sample_rate of m"),
        ({"noise_multiplier": 1.0, "steps": -1}, "steps of m"),
        ({"noise_multiplier": 1.0, "steps": 1.5}, "steps of m"),
    ],
)
def test_impossible_mechanisms_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Mechanism("m", **arguments)


def test_delta_and_accountant_are_checked():
    for delta in (0.0, 1.0, -1e-5, math.nan):
        with pytest.raises(ValueError, match="delta"):
            epsilon([Mechanism("m", 1.0)], delta)
        with pytest.raises(ValueError, match="delta"):
            gaussian_dp_mu(1.0, delta)
    with pytest.raises(ValueError, match="gdp"):
        epsilon([Mechanism("m", 1.0)], DELTA, "gdp")
