"""The audit passes what is sound and names what is not: every planted fault fails in its own check."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dp2vae_fast import PrivacyEngine, ops
from dp2vae_fast.engine.audit import FALSE_ALARM, Check, audit_engine
from dp2vae_fast.engine.audit.one_run import attack, epsilon_lower_bound, right_guesses_p_value
from dp2vae_fast.engine.audit.randomness import noise_p_values, sampler_p_values, worst
from dp2vae_fast.engine.keystream import Keystream, Stream
from dp2vae_fast.engine.optimizer import DPOptimizer
from dp2vae_fast.engine.update import FusedUpdate

NAMES = ["contribution", "neighbours", "divisor", "noise", "sampler", "one-run epsilon"]
NOISE = 2.5


def fields(n: int = 200) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(n, 12, generator=generator), torch.randint(4, (n,), generator=generator)


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), y)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.AdamW(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p),
}


def script(optimizer: str = "sgd", change=lambda optimizer: None, **settings):
    """A user's set-up; ``change`` plants a fault in the private optimizer."""

    def make():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 4))
        loader = DataLoader(TensorDataset(*fields()), batch_size=20, shuffle=True)
        defaults = {"noise_multiplier": NOISE, "max_grad_norm": 1.0}
        parts = PrivacyEngine(keystream=Keystream.seeded(5)).make_private(
            module=model, optimizer=OPTIMIZERS[optimizer](model.parameters()), data_loader=loader, **defaults | settings
        )
        change(parts[1])
        return parts

    return make


def audited(make, canaries: int = 80) -> dict[str, Check]:
    checks = audit_engine(make, fields(), loss, canaries=canaries)
    assert [check.name for check in checks] == NAMES
    return {check.name: check for check in checks}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_sound_engine_passes(optimizer):
    checks = audited(script(optimizer))
    assert all(check.passed for check in checks.values()), checks
    assert checks["contribution"].measured > 0.99  # the bound was reached, so doubling it would have shown
    assert checks["one-run epsilon"].limit <= 2
    assert "can certify at most 2." in checks["one-run epsilon"].explanation
    json.dumps([check.to_dict() for check in checks.values()], allow_nan=False)


@pytest.mark.parametrize(
    "settings",
    [
        {"clipping": "per_layer", "max_grad_norm": [1.0, 0.3, 0.5, 0.1]},
        {"clipping": "automatic"},
        {"clipping": "adaptive", "noise_multiplier": 4.0, "unclipped_num_std": 3.0},
        {"physical_batch_size": 8, "dataset_size": 180},
        {"loss_reduction": "sum"},
    ],
    ids=["per layer", "automatic", "adaptive", "padded", "sum"],
)
def test_every_clipping_mode_passes(settings):
    def summed(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(x), y, reduction="sum")

    checks = audit_engine(
        script(**settings), fields(), summed if settings.get("loss_reduction") == "sum" else loss, canaries=40
    )
    assert [check.name for check in checks if not check.passed] == []
    assert checks[0].measured > 0.9


def test_a_bound_that_can_refute_nothing_says_so():
    checks = audited(script(noise_multiplier=0.4))
    assert checks["one-run epsilon"].passed and "cannot fail" in checks["one-run epsilon"].explanation
    assert [name for name, check in checks.items() if not check.can_fail] == ["one-run epsilon"]


def test_opacus_own_engine_is_read_too_and_lets_non_finite_records_through():
    checks = audited(script(grad_sample_mode="hooks"))
    failed = {name for name, check in checks.items() if not check.passed}
    assert failed == {"contribution", "neighbours"} and math.isinf(checks["contribution"].measured)
    assert checks["contribution"].to_dict()["measured"] is None


# Planted faults ----------------------------------------------------------------------------------------------------


def scale_noise(monkeypatch, factor: float) -> None:
    """All noise of the engine, by either road, ``factor`` times as large."""
    step, add = FusedUpdate.step, Stream.add_noise_
    monkeypatch.setattr(
        FusedUpdate, "step", lambda self, sums, *, std, **rest: step(self, sums, std=std * factor, **rest)
    )
    monkeypatch.setattr(Stream, "add_noise_", lambda self, x, std, *rest: add(self, x, std * factor, *rest))


@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop"])
def test_noise_left_out(optimizer, monkeypatch):
    scale_noise(monkeypatch, 0.0)
    checks = audited(script(optimizer), canaries=150)
    assert not checks["noise"].passed and checks["noise"].measured == 0
    assert not checks["one-run epsilon"].passed
    assert checks["one-run epsilon"].measured > 2 > checks["one-run epsilon"].limit
    assert checks["contribution"].passed and checks["sampler"].passed


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_noise_of_a_wrong_size(factor, monkeypatch):
    scale_noise(monkeypatch, factor)
    assert not audited(script())["noise"].passed


def test_noise_that_repeats(monkeypatch):
    monkeypatch.setattr(Stream, "next_step", lambda self: 7)
    assert not audited(script())["noise"].passed


def test_no_noise_asked_for():
    checks = audited(script(noise_multiplier=0.0))
    assert not checks["noise"].passed and "nothing is private" in checks["noise"].explanation


def test_clip_doubled(monkeypatch):
    factors = ops.clip_factors
    monkeypatch.setattr(ops, "clip_factors", lambda *args: 2 * factors(*args))
    checks = audited(script())
    assert not checks["contribution"].passed and checks["contribution"].measured == pytest.approx(2, rel=0.01)


def test_a_record_that_is_not_finite_let_through(monkeypatch):
    factors = ops.clip_factors
    monkeypatch.setattr(ops, "clip_factors", lambda *args: factors(*args).clamp(min=1e-6))
    assert not audited(script())["contribution"].passed


def test_a_sum_that_is_clipped_as_a_whole(monkeypatch):
    """Then what a record contributes depends on the others, though none alone exceeds the bound."""
    factors = ops.clip_factors

    def mixed(*args):
        own = factors(*args)
        return own * (-1) ** len(own)  # a crude dependence on the batch

    monkeypatch.setattr(ops, "clip_factors", mixed)
    checks = audited(script())
    assert checks["contribution"].passed and not checks["neighbours"].passed


def test_divided_by_the_realised_batch(monkeypatch):
    accumulate, records = DPOptimizer.clip_and_accumulate, []

    def counted(self):
        records.append(self.capture.records or 0)
        accumulate(self)

    monkeypatch.setattr(DPOptimizer, "clip_and_accumulate", counted)
    monkeypatch.setattr(DPOptimizer, "_scale", lambda self: 1 / max(1, records[-1]))
    checks = audited(script())
    assert not checks["divisor"].passed and checks["divisor"].measured > 0.9


def test_a_loss_whose_reduction_is_not_the_declared_one():
    """A mean where a sum was declared: the gradient of a record then depends on how many others there are."""
    checks = audited(script(loss_reduction="sum", max_grad_norm=100.0))
    assert not checks["divisor"].passed


def test_a_sampler_that_shuffles():
    checks = audited(script(poisson_sampling=False))
    assert [name for name, check in checks.items() if not check.passed] == ["sampler"]


# What it is made of ------------------------------------------------------------------------------------------------


def coins(n: int, rate: float, draws: int, seed: int = 1) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [np.flatnonzero(random.random(n) < rate).tolist() for _ in range(draws)]


def test_true_coins_pass_and_each_kind_of_false_one_does_not():
    rate, n, count = 0.1, 300, 200
    assert worst(sampler_p_values(coins(n, rate, count), n, rate))[1] > FALSE_ALARM
    random = np.random.default_rng(2)
    fixed = [random.choice(n, int(n * rate), replace=False).tolist() for _ in range(count)]
    passes = [part.tolist() for _ in range(count // 10) for part in np.array_split(random.permutation(n), 10)]
    sticky = [draw for draw in coins(n, rate, count // 2) for _ in range(2)]
    for false, why in (
        (coins(n, 1.1 * rate, count), "mean of draws that a record is in"),
        (fixed, "dispersion of sizes of draws"),
        (passes, "dispersion of sizes of draws"),
        (sticky, "shared"),
        ([[*draw, draw[0]] for draw in fixed], "twice"),
        ([[*draw, n] for draw in fixed], "none of the data set's"),
    ):
        p_values = sampler_p_values(false, n, rate)
        assert worst(p_values)[1] < FALSE_ALARM
        assert any(
            why in name or (why == "shared" and "share" in name) for name, p in p_values.items() if p < FALSE_ALARM
        )


def test_p_values_of_true_draws_are_uniform():
    """Each by its name, over 100 independent repetitions. (Of nothing a p-value is 1, and that of the record that is
    drawn least or most is a bound.)"""
    by_name: dict[str, list[float]] = {}
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        noise = [[torch.randn(n, generator=generator) for n in (50, 7, 1)] for _ in range(4)]
        found = sampler_p_values(coins(100, 0.4, 30, seed + 1), 100, 0.4) | noise_p_values(noise)
        del found["the record that is drawn least or most"]
        for name, value in found.items():
            by_name.setdefault(name, []).append(value)
    uniform = {name: kstest(p, "uniform").pvalue for name, p in by_name.items() if min(p) < 1}
    assert len(uniform) > 100 and worst(uniform)[1] > 1e-3, worst(uniform)


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_one_record_with_a_coin_of_its_own(rate):
    """Never drawn, or twice as often as all others: of 500 and of 64 records."""
    for size in (64, 500):
        draws = coins(size, 0.2, 400, 5)
        assert worst(sampler_p_values(draws, size, 0.2))[1] > FALSE_ALARM
        own = np.random.default_rng(1).random(400) < rate
        draws = [[i for i in draw if i] + ([0] if mine else []) for draw, mine in zip(draws, own, strict=True)]
        name, probability = worst(sampler_p_values(draws, size, 0.2))
        assert probability < FALSE_ALARM and "least or most" in name


NOISE_FAULTS = ["uniform", "shared by two parameters", "shared by steps", "biased", "one silent"]
NOISE_FAULTS += ["key of step plus parameter", "halves alike", "shifted by one"]


@pytest.mark.parametrize("fault", NOISE_FAULTS)
def test_noise_that_is_not_normal_or_not_independent(fault):
    generator = torch.Generator().manual_seed(3)
    steps = [[torch.randn(3000, generator=generator), torch.randn(400, generator=generator)] for _ in range(5)]
    assert worst(noise_p_values(steps))[1] > FALSE_ALARM
    if fault == "uniform":
        steps = [[(12**0.5) * (torch.rand(3000, generator=generator) - 0.5), step[1]] for step in steps]
    elif fault == "shared by two parameters":
        steps[2][1] = steps[2][0][:400]
    elif fault == "shared by steps":
        steps[4][0] = steps[2][0]
    elif fault == "key of step plus parameter":
        streams = [torch.randn(3000, generator=generator) for _ in range(7)]
        steps = [[streams[t], streams[t + 1][:400]] for t in range(5)]
    elif fault == "halves alike":
        steps = [[step[0][:1500].repeat(2), step[1]] for step in steps]
    elif fault == "shifted by one":
        steps = [[step[0], step[0][1:401]] for step in steps]
    elif fault == "biased":
        steps = [[step[0] + 0.1, step[1]] for step in steps]
    else:
        steps = [[step[0], 0 * step[1]] for step in steps]
    assert worst(noise_p_values(steps))[1] < FALSE_ALARM


def test_the_published_example_of_a_lower_bound():
    """Appendix D of arXiv 2305.08846: 75 of 100 guesses right about 1000 canaries, delta = 1e-4, 95 %: 0.673."""
    assert epsilon_lower_bound(1000, 100, 75, 1e-4) == pytest.approx(0.673, abs=1e-3)


def test_a_lower_bound_is_monotone_and_stays_below_its_maximum():
    bounds = [epsilon_lower_bound(200, 100, right, 1e-5) for right in range(40, 101, 5)]
    assert bounds[0] == 0 and bounds == sorted(bounds) and bounds[-1] > 3
    assert epsilon_lower_bound(200, 100, 100, 0.0) >= bounds[-1]  # delta only weakens it
    for m in (100, 1000):
        assert epsilon_lower_bound(m, m, m, 0.0) == pytest.approx(math.log(m / 3), abs=0.02)
    assert right_guesses_p_value(10, 0, 0, 1.0, 1e-5) == 1
    with pytest.raises(ValueError, match="right guesses"):
        right_guesses_p_value(10, 5, 6, 1.0, 0.0)
    with pytest.raises(ValueError, match="delta = 2"):
        right_guesses_p_value(10, 5, 5, 1.0, 2.0)


def test_randomized_response_is_not_refuted_more_often_than_stated():
    """Guesses of exactly (epsilon, 0)-private coins, 400 runs at 95 %: over 39 refutations have probability 1e-4."""
    random, m, true = np.random.default_rng(0), 100, 1.0
    right = random.binomial(m, 1 / (1 + math.exp(-true)), size=400)
    least = next(v for v in range(m + 1) if epsilon_lower_bound(m, m, v, 0.0) > true)
    refuted = int((right >= least).sum())
    assert 1 <= refuted <= 39


def test_the_attack_tells_correlated_canaries_apart_without_noise_and_nothing_under_much():
    generator = torch.Generator().manual_seed(4)
    m, rate = 60, 0.2
    common = torch.randn(1, 90, generator=generator, dtype=torch.float64)
    gradients = nn.functional.normalize(common + 0.3 * torch.randn(m, 90, generator=generator, dtype=torch.float64))
    present = torch.randint(2, (m,), generator=generator).bool()
    exact = rate * present.double() @ gradients
    seen = attack(gradients, exact, present, rate=rate, variance=4.0, delta=1e-5)
    assert seen.right == seen.guesses == m and seen.lower_bound == seen.largest_possible > 2
    noisy = exact + 100 * torch.randn(90, generator=generator, dtype=torch.float64)
    assert attack(gradients, noisy, present, rate=rate, variance=1e4, delta=1e-5).lower_bound < 1


@pytest.mark.parametrize(("records", "message"), [(3, "at least 16"), (None, "one number of rows")])
def test_too_few_records_are_refused_in_one_line(records, message):
    x, y = fields()
    with pytest.raises(ValueError, match=message):
        audit_engine(script(), (x[:records], y[:records] if records else y[:5]), loss)


def test_a_loader_without_batches_is_refused():
    def make():
        module, optimizer, _ = script()()
        return module, optimizer, DataLoader(TensorDataset(*fields()), batch_size=None)

    with pytest.raises(ValueError, match="no batch sampler"):
        audit_engine(make, fields(), loss)


def test_an_optimizer_that_hides_its_gradient_is_refused():
    class Quiet(torch.optim.RMSprop):
        def step(self, closure=None):
            super().step(closure)
            self.zero_grad()

    OPTIMIZERS["quiet"] = lambda p: Quiet(p)
    try:
        with pytest.raises(TypeError, match="cannot read the steps of Quiet"):
            audit_engine(script("quiet"), fields(), loss)
    finally:
        del OPTIMIZERS["quiet"]


def test_padding_that_counts_as_records(monkeypatch):
    """Each row of padding then has a gradient of its own."""
    setup = script(physical_batch_size=40)
    assert all(check.passed for check in audited(setup).values())
    honest = DPOptimizer.next_physical_batch
    monkeypatch.setattr(
        DPOptimizer,
        "next_physical_batch",
        lambda self, mask, *rest: honest(self, torch.ones_like(mask), *rest),
    )
    assert not audited(setup)["contribution"].passed


def test_models_in_bfloat16_pass():
    def make():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 4)).bfloat16()
        return PrivacyEngine(keystream=Keystream.seeded(5)).make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(TensorDataset(*fields()), batch_size=20),
            noise_multiplier=NOISE,
            max_grad_norm=1.0,
        )

    x, y = fields()
    checks = audit_engine(make, (x.bfloat16(), y), lambda model, x, y: loss(model, x, y).float(), canaries=80)
    assert all(check.passed for check in checks), [c for c in checks if not c.passed]
