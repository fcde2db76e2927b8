"""The drop-in contract, and what one optimizer step guarantees."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings

import opacus
import pytest
import torch
from cases import LAYER_CASES, grads_one_by_one, record_loss
from opacus.layers import DPGRU, DPLSTM, DPRNN, DPMultiheadAttention
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, TensorDataset

from dp2vae_fast import PrivacyEngine, ops
from dp2vae_fast.engine.accounting import gaussian_dp_mu
from dp2vae_fast.engine.capture.capture import Capture
from dp2vae_fast.engine.keystream import Keystream
from dp2vae_fast.engine.precision import sum_rounding
from dp2vae_fast.ops import _op

D = torch.float64


def small_model(dtype: torch.dtype = D, for_opacus: bool = False) -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(
        nn.Linear(6, 36),
        nn.Unflatten(1, (4, 3, 3)),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=not for_opacus),
        nn.ConvTranspose2d(4, 3, 4, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(3, 2, 3, padding=1, padding_mode="zeros" if for_opacus else "reflect"),
    ).to(dtype)


def inputs(n: int, dtype: torch.dtype = D, seed: int = 0) -> Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed), dtype=D).to(dtype)


def privatize(model: nn.Module, make_optimizer, *, engine: PrivacyEngine | None = None, **kwargs):
    settings = dict(
        noise_multiplier=0.0, max_grad_norm=1.0, sample_rate=0.1, expected_batch_size=8, loss_reduction="sum"
    )
    engine = engine or PrivacyEngine()
    return engine.privatize(model, make_optimizer(model.parameters()), **(settings | kwargs))


def clipped_sum(model: nn.Module, batch: Tensor, bound: float) -> list[Tensor]:
    """Oracle: one ordinary backward a record, clipped and added in float64."""
    grads = grads_one_by_one(model, batch)
    norm = torch.stack([g.flatten(1).square().sum(1) for g in grads.values()]).sum(0).sqrt()
    factors = (bound / norm).clamp(max=1)
    return [torch.einsum("n,n...->...", factors, g) for g in grads.values()]


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "rmsprop (no fused update)": lambda p: torch.optim.RMSprop(p, lr=0.01),
}


# The contract ----------------------------------------------------------------------------------------


def loader(n: int = 40, batch_size: int = 8) -> DataLoader:
    return DataLoader(TensorDataset(inputs(n, torch.float32)), batch_size=batch_size)


def test_an_opacus_script_runs_with_one_import_changed():
    model = small_model(torch.float32)
    engine = PrivacyEngine()
    model, optimizer, data_loader = engine.make_private(
        module=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.01),
        data_loader=loader(),
        noise_multiplier=1.1,
        max_grad_norm=1.0,
    )
    before = [p.detach().clone() for p in model.parameters()]
    sizes = []
    for _ in range(3):
        for (batch,) in data_loader:
            sizes.append(len(batch))
            optimizer.zero_grad()
            loss = record_loss(model(batch)).mean() if len(batch) else model(batch).sum()
            loss.backward()
            optimizer.step()
    assert len(sizes) == 15 and len(set(sizes)) > 1  # Poisson draws, one step each
    assert engine.accountant.history == [(1.1, 1 / 5, 15)]
    assert engine.get_epsilon(1e-5) == pytest.approx(_opacus_epsilon(1.1, 1 / 5, 15, 1e-5))
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(name.startswith("_module.") for name in model.state_dict())
    assert all(not hasattr(p, "grad_sample") for p in model.parameters())


def _opacus_epsilon(sigma: float, rate: float, steps: int, delta: float) -> float:
    accountant = opacus.accountants.PRVAccountant()
    accountant.history = [(sigma, rate, steps)]
    return accountant.get_epsilon(delta)


def test_make_private_with_epsilon_meets_its_target():
    model = small_model(torch.float32)
    engine = PrivacyEngine()
    model, optimizer, data_loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=loader(),
        target_epsilon=4.0,
        target_delta=1e-5,
        epochs=2,
        max_grad_norm=1.0,
    )
    for _ in range(2):
        for (batch,) in data_loader:
            model(batch).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert 3.0 < engine.get_epsilon(1e-5) <= 4.0


@pytest.mark.parametrize("target", [0.5, 3.0])
def test_make_private_with_epsilon_at_a_small_delta_keeps_to_the_truth(target: float):
    """All records in each of 2,000 steps, where the truth has a closed form."""
    model = small_model()
    _, optimizer, _ = PrivacyEngine().make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=loader(8),
        target_epsilon=target,
        target_delta=1e-13,
        epochs=2_000,
        max_grad_norm=1.0,
    )
    assert math.sqrt(2_000) / optimizer.noise_multiplier <= gaussian_dp_mu(target, 1e-13)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"target_epsilon": -1.0}, "target_epsilon: expected a positive number"),
        ({"target_epsilon": 1e-9}, "cannot be reached at target_delta = 1e-05"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(options: dict, message: str):
    model = small_model()
    given = {"target_epsilon": 1.0, "target_delta": 1e-5, "epochs": 1} | options
    with pytest.raises(ValueError, match=message):
        PrivacyEngine(accountant="rdp").make_private_with_epsilon(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=loader(),
            max_grad_norm=1.0,
            **given,
        )


def test_the_original_model_is_used_without_wrapping():
    model = small_model(torch.float32)
    engine = PrivacyEngine()
    hooks, optimizer, data_loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=loader(),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        wrap_model=False,
    )
    keys = list(model.state_dict())
    model(next(iter(data_loader))[0]).sum().backward()
    optimizer.step()
    assert not any(key.startswith("_module.") for key in keys)
    hooks.cleanup()
    model(inputs(2, torch.float32)).sum().backward()  # an ordinary model again
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ew", "ghost"])
def test_opacus_own_modes_still_work(mode: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
        before = [p.detach().clone() for p in model.parameters()]
        engine = PrivacyEngine()
        parts = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=loader(),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            grad_sample_mode=mode,
            poisson_sampling=False,
        )
        private, optimizer, data_loader = parts[0], parts[1], parts[-1]
        (batch,) = next(iter(data_loader))
        criterion = parts[2] if mode == "ghost" else nn.CrossEntropyLoss()
        criterion(private(batch), torch.zeros(len(batch), dtype=torch.int64)).backward()
        optimizer.step()
    assert isinstance(optimizer, opacus.optimizers.DPOptimizer) and len(engine.accountant) == 1
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_checkpoints_restore_model_optimizer_and_accountant(tmp_path):
    def fresh():
        model = small_model()
        engine = PrivacyEngine(keystream=Keystream.seeded(3))
        return engine, *privatize(model, OPTIMIZERS["adam"], engine=engine, noise_multiplier=1.0)

    def steps(model, optimizer, count):
        for i in range(count):
            record_loss(model(inputs(8, seed=i))).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    engine, model, optimizer = fresh()
    steps(model, optimizer, 3)
    engine.save_checkpoint(path=tmp_path / "c.pt", module=model, optimizer=optimizer)
    steps(model, optimizer, 2)
    again_engine, again, again_optimizer = fresh()
    again_engine.load_checkpoint(path=tmp_path / "c.pt", module=again, optimizer=again_optimizer)
    assert again_engine.accountant.history == [(1.0, 0.1, 3)]
    steps(again, again_optimizer, 2)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("file", ["path", "stream"])
def test_going_back_to_a_checkpoint_forgets_no_step_that_was_taken(tmp_path, file: str):
    where = tmp_path / "c.pt" if file == "path" else io.BytesIO()
    opened = (lambda: where) if file == "path" else (lambda: io.BytesIO(where.getvalue()))
    engine = PrivacyEngine(accountant="rdp")
    model, optimizer = privatize(small_model(), OPTIMIZERS["sgd"], engine=engine, noise_multiplier=1.0)
    for _ in range(2):
        optimizer.step()
    engine.save_checkpoint(path=where, module=model, optimizer=optimizer)
    saved = [p.detach().clone() for p in model.parameters()]
    optimizer.noise_multiplier = 2.0
    for _ in range(3):
        optimizer.step()
    with pytest.warns(UserWarning, match="counted more steps than the checkpoint"):
        engine.load_checkpoint(path=opened(), module=model, optimizer=optimizer)
    assert engine.accountant.history == [(1.0, 0.1, 2), (2.0, 0.1, 3)]
    assert all(torch.equal(a, b) for a, b in zip(saved, model.parameters(), strict=True))

    other = PrivacyEngine(accountant="rdp")
    other.accountant.history = [(1.0, 0.1, 1)]
    other.load_checkpoint(path=opened(), module=model, optimizer=optimizer)
    assert other.accountant.history == [(1.0, 0.1, 2)]
    other.accountant.history = [(3.0, 0.1, 1)]
    optimizer.step()
    moved = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="load it into a fresh PrivacyEngine"):
        other.load_checkpoint(path=opened(), module=model, optimizer=optimizer)
    assert other.accountant.history == [(3.0, 0.1, 1)]
    assert all(torch.equal(a, b) for a, b in zip(moved, model.parameters(), strict=True))


def test_secure_mode_needs_no_torchcsprng_and_refuses_what_is_not_secret():
    engine = PrivacyEngine(secure_mode=True)
    model, optimizer = privatize(small_model(), OPTIMIZERS["sgd"], engine=engine, noise_multiplier=1.0)
    record_loss(model(inputs(4))).sum().backward()
    optimizer.step()
    assert optimizer.stream.source == "secret"
    with pytest.raises(ValueError, match="secret keystream"):
        PrivacyEngine(secure_mode=True, keystream=Keystream.seeded(0))
    with pytest.raises(ValueError, match="torchcsprng"):
        privatize(small_model(), OPTIMIZERS["sgd"], engine=engine, grad_sample_mode="hooks")
    fresh = small_model(torch.float32)
    with pytest.raises(ValueError, match="secure mode"):
        engine.make_private(
            module=fresh,
            optimizer=torch.optim.SGD(fresh.parameters(), lr=0.1),
            data_loader=loader(),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            noise_generator=torch.Generator(),
        )


def test_a_noise_generator_makes_noise_repeat_and_says_seeded():
    results = []
    for _ in range(2):
        model = small_model()
        generator = torch.Generator().manual_seed(5)
        _, optimizer = privatize(model, OPTIMIZERS["sgd"], noise_multiplier=1.0, noise_generator=generator)
        optimizer.step()
        results.append([p.detach().clone() for p in model.parameters()])
        assert optimizer.stream.source == "seeded"
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def noise_of_steps(optimizer, count: int) -> list[Tensor]:
    """What empty steps of SGD with learning rate 1 move the parameters by."""
    moved = []
    for _ in range(count):
        before = [p.detach().clone() for p in optimizer.params]
        optimizer.step()
        moved.append(torch.cat([(p.detach() - b).flatten() for p, b in zip(optimizer.params, before, strict=True)]))
    return moved


def seeded_again(engine: PrivacyEngine, seed: int = 5, **options):
    generator = torch.Generator().manual_seed(seed)
    plain = nn.Linear(30, 20).to(D)
    return engine.make_private(
        module=plain,
        optimizer=torch.optim.SGD(plain.parameters(), lr=1.0),
        data_loader=DataLoader(TensorDataset(torch.zeros(24, 30, dtype=D)), batch_size=6),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        noise_generator=generator,
        **options,
    )


def no_two_alike(draws: list[Tensor]) -> bool:
    return not any((draws[i] == draws[j]).double().mean() > 0.1 for i in range(len(draws)) for j in range(i))


@pytest.mark.parametrize("clipping", ["flat", "adaptive"])
@pytest.mark.parametrize("made", ["before", "after"])
def test_a_resumed_seeded_run_draws_no_noise_and_no_coins_again(tmp_path, clipping: str, made: str):
    def fresh():
        return PrivacyEngine(accountant="rdp", keystream=Keystream.seeded(77))

    engine = fresh()
    _, first, first_loader = seeded_again(engine, clipping=clipping)  # it goes further than the second
    module, second, second_loader = seeded_again(engine, clipping=clipping)
    coins = list(first_loader.batch_sampler) + list(second_loader.batch_sampler)
    noise = noise_of_steps(first, 5) + noise_of_steps(second, 3)
    engine.save_checkpoint(path=tmp_path / "c.pt", module=module, optimizer=second, checkpoint_dict={"epoch": 1})
    expected = noise_of_steps(first, 3), list(first_loader.batch_sampler)

    engine = fresh()
    private = seeded_again(engine, clipping=clipping) if made == "before" else None
    where = {"module": private[0], "optimizer": private[1]} if private else {"module": copy.deepcopy(module)}
    rest = engine.load_checkpoint(path=tmp_path / "c.pt", **where)
    assert rest["epoch"] == 1 and "keystream_position" not in rest
    _, optimizer, loader = private or seeded_again(engine, clipping=clipping)
    resumed = noise_of_steps(optimizer, 3), list(loader.batch_sampler)
    assert no_two_alike(noise + resumed[0]) and not any(draw in coins for draw in resumed[1] if len(draw) > 2)
    assert resumed[1] == expected[1]
    if clipping == "flat":  # an adaptive bound begins anew, and scales the same noise
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(resumed[0], expected[0], strict=True))


def test_an_old_checkpoint_counts_as_drawn_what_was_accounted(tmp_path):
    engine = PrivacyEngine(accountant="rdp")
    module, optimizer, _ = seeded_again(engine)
    opacus.PrivacyEngine.save_checkpoint(engine, path=tmp_path / "c.pt", module=module, optimizer=optimizer)
    noise = noise_of_steps(optimizer, 3)
    opacus.PrivacyEngine.save_checkpoint(engine, path=tmp_path / "c.pt", module=module, optimizer=optimizer)
    engine = PrivacyEngine(accountant="rdp")
    module, optimizer, _ = seeded_again(engine)
    engine.load_checkpoint(path=tmp_path / "c.pt", module=module, optimizer=optimizer)
    assert no_two_alike(noise + noise_of_steps(optimizer, 3))


def test_optimizers_of_one_engine_share_no_noise_whatever_their_generators():
    """One seed for two models, of one engine: the difference of their updates must not be free of noise."""
    engine = PrivacyEngine(keystream=Keystream.from_generator(torch.Generator().manual_seed(5)))
    noise = [noise for _ in range(2) for noise in noise_of_steps(seeded_again(engine)[1], 2)]
    assert no_two_alike(noise)


def test_noise_that_another_engine_has_drawn_is_said():
    seeded_again(PrivacyEngine(), seed=424242)
    with pytest.warns(UserWarning, match="release one of them at most"):
        seeded_again(PrivacyEngine(), seed=424242)


def test_what_fused_mode_does_not_have_is_refused():
    with pytest.raises(ValueError, match="DifferentiallyPrivateDistributedDataParallel"):
        privatize(small_model(), OPTIMIZERS["sgd"], distributed=True)
    with pytest.raises(ValueError, match="choose 'flat'"):
        privatize(small_model(), OPTIMIZERS["sgd"], clipping="by hand")
    with pytest.raises(TypeError, match="no option 'clip_harder'"):
        privatize(small_model(), OPTIMIZERS["sgd"], clip_harder=True)
    with pytest.raises(TypeError, match=r"'physical_batchsize' .* did you mean 'physical_batch_size'"):
        privatize(small_model(), OPTIMIZERS["sgd"], physical_batchsize=8)
    with pytest.raises(TypeError, match="no option 'stability' with clipping='flat': leave it out"):
        privatize(small_model(), OPTIMIZERS["sgd"], stability=0.1)
    with pytest.raises(TypeError, match="loss_reduction"):  # a mean that is called a sum would break the bound
        PrivacyEngine().privatize(  # type: ignore[call-arg]
            small_model(), None, noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=0.1, expected_batch_size=4
        )


def test_parameter_groups_can_be_added_of_the_private_module_alone():
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)).to(D)
    private, optimizer = privatize(model, lambda _: torch.optim.SGD(model[0].parameters(), lr=0.1))
    optimizer.add_param_group({"params": model[1].parameters(), "lr": 0.2})
    before = [p.detach().clone() for p in model.parameters()]
    private(inputs(4)).square().sum().backward()
    optimizer.step()
    assert not any(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    with pytest.raises(ValueError, match="moved by noise alone"):
        optimizer.add_param_group({"params": nn.Linear(2, 2).weight})


def test_hooks_on_every_optimizers_step_are_called():
    seen = []
    model, optimizer = privatize(small_model(), OPTIMIZERS["sgd"])
    handle = register_optimizer_step_post_hook(lambda *_: seen.append(1))
    try:
        model(inputs(4)).square().sum().backward()
        optimizer.step()
    finally:
        handle.remove()
    assert seen == [1]


def test_orders_of_renyi_divergence_can_be_given():
    model = small_model()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs(32)), batch_size=8)
    _, optimizer, _ = PrivacyEngine(accountant="rdp").make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=loader,
        target_epsilon=3.0,
        target_delta=1e-5,
        epochs=1,
        max_grad_norm=1.0,
        alphas=[16.0],
    )
    best = PrivacyEngine(accountant="rdp").accountant
    best.history = [(optimizer.noise_multiplier, 1 / len(loader), len(loader))]
    assert best.get_epsilon(1e-5, alphas=[16.0]) == pytest.approx(3.0, abs=0.02)
    assert best.get_epsilon(1e-5) < 2.9


def test_a_stranger_optimizer_is_refused():
    engine = PrivacyEngine()
    with pytest.raises(ValueError, match="not those of a module"):
        engine.privatize(
            small_model(),
            torch.optim.SGD(small_model().parameters(), lr=0.1),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            sample_rate=0.1,
            expected_batch_size=4,
            loss_reduction="sum",
        )


# One step --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("bound", [0.05, 1e6])
def test_the_step_is_the_clipped_sum(reduction: str, bound: float):
    model, batch = small_model(), inputs(5)
    want = clipped_sum(model, batch, bound)
    before = [p.detach().clone() for p in model.parameters()]
    private, optimizer = privatize(
        model, lambda p: torch.optim.SGD(p, lr=1.0), max_grad_norm=bound, loss_reduction=reduction
    )
    losses = record_loss(private(batch))
    (losses.sum() if reduction == "sum" else losses.mean()).backward()
    optimizer.step()
    divisor = 1 if reduction == "sum" else 8  # the public expected batch size, not the 5 records of this batch
    for p, old, total in zip(model.parameters(), before, want, strict=True):
        torch.testing.assert_close(old - p, total / divisor, rtol=1e-9, atol=1e-13)


def test_no_record_contributes_more_than_the_bound():
    """Each record alone, of any size: the parameters move by at most C (lr 1, no noise)."""
    for dtype in (torch.float32, D):
        for size in (1e-6, 1.0, 1e4):
            model = small_model(dtype)
            private, optimizer = privatize(model, lambda p: torch.optim.SGD(p, lr=1.0), max_grad_norm=0.7)
            for n in range(6):
                before = [p.detach().clone() for p in model.parameters()]
                (record_loss(private(inputs(1, dtype, seed=n) * size)) * size).sum().backward()
                optimizer.clip_and_accumulate()
                moved = torch.stack([s.double().norm() for s in optimizer._pending_sums()]).norm()
                assert float(moved) <= 0.7, (dtype, size, n)
                optimizer.zero_grad()
                assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_a_record_that_is_not_finite_contributes_exactly_zero(poison: float):
    batch = inputs(5)
    want = clipped_sum(small_model(), batch[[0, 1, 3, 4]], 1.0)
    batch[2] = poison
    private, optimizer = privatize(small_model(), lambda p: torch.optim.SGD(p, lr=1.0))
    record_loss(private(batch)).sum().backward()
    optimizer.clip_and_accumulate()
    for total, expected in zip(optimizer._pending_sums(), want, strict=True):
        torch.testing.assert_close(total, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("case", LAYER_CASES, ids=lambda c: c.name)
def test_an_empty_batch_is_a_noised_and_counted_step(case):
    torch.manual_seed(0)
    model = case.make().to(D)
    engine = PrivacyEngine()
    private, optimizer = privatize(model, lambda p: torch.optim.SGD(p, lr=1.0), engine=engine, noise_multiplier=1.0)
    before = [p.detach().clone() for p in model.parameters()]
    try:
        private(case.inputs(0, D)).sum().backward()
    except IndexError:  # instance norm: the framework's own forward refuses an empty batch
        assert isinstance(model, nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d)
    optimizer.step()
    assert engine.accountant.history == [(1.0, 0.1, 1)]
    for p, old in zip(model.parameters(), before, strict=True):
        assert bool(torch.isfinite(p).all()) and not torch.equal(p, old)


def test_a_step_without_any_backward_is_noised_and_counted():
    model, engine = small_model(), PrivacyEngine()
    _, optimizer = privatize(model, OPTIMIZERS["adam"], engine=engine, noise_multiplier=2.0)
    optimizer.step()
    assert engine.accountant.history == [(2.0, 0.1, 1)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_noise_has_the_stated_deviation(name: str):
    """The private gradient of an empty batch is noise of deviation sigma * C / expected batch size, in every
    parameter."""
    model = nn.Linear(100, 200).to(D)
    sigma, bound, divisor = 1.5, 0.4, 8
    _, optimizer = privatize(
        model,
        OPTIMIZERS[name],
        noise_multiplier=sigma,
        max_grad_norm=bound,
        loss_reduction="mean",
        expected_batch_size=divisor,
        materialize_grad=True,
        engine=PrivacyEngine(keystream=Keystream.seeded(11)),
    )
    optimizer.step()
    deviation = sigma * bound / divisor
    noise = torch.cat([p.grad.flatten() for p in model.parameters()])
    chi = float(noise.square().sum() / deviation**2)
    count = noise.numel()
    assert abs(chi - count) < 5 * (2 * count) ** 0.5  # 5 standard deviations of a chi-square
    assert abs(float(noise.mean())) < 5 * deviation / count**0.5


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_pass_update_equals_the_inner_optimizer(name: str):
    """The same noise and sums, once through the fused update and once through p.grad and the optimizer's own step."""
    models = [small_model(), small_model()]
    runs = [
        privatize(
            model,
            OPTIMIZERS[name],
            noise_multiplier=0.8,
            materialize_grad=materialize,
            engine=PrivacyEngine(keystream=Keystream.seeded(2)),
        )
        for model, materialize in zip(models, (False, True), strict=True)
    ]
    for i in range(6):
        for private, optimizer in runs:
            record_loss(private(inputs(7, seed=i))).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        if i == 2:  # the states are interchangeable
            runs[0][1].load_state_dict(copy.deepcopy(runs[1][1].state_dict()))
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.skipif(bool(_op._native_gap), reason=_op._native_gap)
@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_one_pass_update_takes_weights_with_channels_last(name: str):
    """On the C++ kernels, and to where the two roads lead."""
    torch.manual_seed(1)
    first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 3)).to(memory_format=torch.channels_last)
    models = [first, copy.deepcopy(first)]
    images = torch.randn(5, 3, 7, 7)
    for model, materialize in zip(models, (False, True), strict=True):
        engine = PrivacyEngine(keystream=Keystream.seeded(2))
        private, optimizer = privatize(
            model, OPTIMIZERS[name], noise_multiplier=0.8, materialize_grad=materialize, engine=engine
        )
        for _ in range(3):
            with ops.backend("cpp"):
                private(images).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["momentum", "adam", "amsgrad"])
def test_one_pass_update_follows_frozen_and_unfrozen_parameters(name: str):
    """Several groups, one parameter never trained, a layer that joins later: the two roads agree."""
    models = [small_model(), small_model()]
    for model, materialize in zip(models, (False, True), strict=True):
        model[0].requires_grad_(False)
        model[2].weight.requires_grad_(False)

        def grouped(_, model: nn.Module = model):
            inner = OPTIMIZERS[name](model[:3].parameters())
            inner.add_param_group({"params": list(model[3:].parameters()), "lr": 0.03})
            return inner

        engine = PrivacyEngine(keystream=Keystream.seeded(2))
        private, optimizer = privatize(
            model, grouped, noise_multiplier=0.8, materialize_grad=materialize, engine=engine
        )
        for i in range(6):
            if i == 3:
                model[0].requires_grad_(True)
            record_loss(private(inputs(7, seed=i))).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_hooks_on_the_inner_step_are_called():
    model = small_model()
    inner = torch.optim.Adam(model.parameters())
    calls = []
    inner.register_step_post_hook(lambda *_: calls.append(1))
    _, optimizer = privatize(model, lambda _: inner)
    optimizer.step()
    assert calls == [1]


def test_learning_rate_schedules_apply():
    model = small_model()
    _, optimizer = privatize(model, lambda p: torch.optim.SGD(p, lr=1.0), noise_multiplier=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.0)
    optimizer.step()
    scheduler.step()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("setting", [{"noise_multiplier": v} for v in (-1.0, float("nan"), float("inf"))])
@pytest.mark.parametrize("materialize", [False, True])
def test_a_noise_multiplier_that_is_none_is_refused_at_any_time(setting: dict, materialize: bool):
    with pytest.raises(ValueError, match="noise_multiplier"):
        privatize(small_model(), OPTIMIZERS["sgd"], materialize_grad=materialize, **setting)
    engine = PrivacyEngine()
    _, optimizer = privatize(small_model(), OPTIMIZERS["sgd"], materialize_grad=materialize, engine=engine)
    optimizer.noise_multiplier = setting["noise_multiplier"]
    with pytest.raises(ValueError, match="noise_multiplier"):
        optimizer.step()
    assert engine.accountant.history == []


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bound_that_is_none_is_refused(bound: float):
    with pytest.raises(ValueError, match="max_grad_norm"):
        privatize(small_model(), OPTIMIZERS["sgd"], max_grad_norm=bound)


def test_layers_of_two_precisions():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.narrow, self.wide = nn.Linear(6, 5), nn.Linear(5, 2).to(D)

        def forward(self, x: Tensor) -> Tensor:
            return self.wide(self.narrow(x).to(D))

    private, optimizer = privatize(Mixed(), OPTIMIZERS["adam"], max_grad_norm=0.3, noise_multiplier=1.0)
    for seed in range(20):
        record_loss(private(inputs(1, torch.float32, seed=seed))).sum().backward()
        optimizer.clip_and_accumulate()
        moved = torch.stack([s.double().norm() for s in optimizer._pending_sums()]).norm()
        assert 0.29 < float(moved) <= 0.3
        optimizer.zero_grad()
    optimizer.step()


@pytest.mark.parametrize("kind", [DPRNN, DPGRU, DPLSTM])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("n", [1, 4, 6])  # 6: as many records as features, the axes look the same
def test_recurrent_layers_of_opacus(kind: type[nn.Module], batch_first: bool, n: int):
    torch.manual_seed(0)
    layer, axis = kind(6, 6, batch_first=batch_first).to(D), 0 if batch_first else 1
    batch = torch.randn((n, 5, 6) if batch_first else (5, n, 6), dtype=D)
    want = []
    for record in batch.split(1, dim=axis):
        layer(record)[0].square().sum().backward()
        want.append(layer.l0.hh.weight.grad)
        layer.zero_grad()
    capture = Capture(layer, batch_first=batch_first)
    layer(batch)[0].square().sum().backward()
    (gradient,) = capture.take([layer.l0.hh.weight])
    torch.testing.assert_close(gradient.grad_sample(), torch.stack(want), rtol=1e-9, atol=1e-12)


def test_a_layer_without_a_rule_may_have_its_batch_second():
    """Opacus' attention with its bias_kv, whose own layer has no rule, in its default layout [T, N, E]."""
    torch.manual_seed(0)
    layer, batch, want = DPMultiheadAttention(8, 2, add_bias_kv=True).to(D), torch.randn(5, 3, 8, dtype=D), []
    for record in batch.split(1, dim=1):
        layer(record, record, record)[0].square().sum().backward()
        want.append(layer.seq_bias_k.bias.grad)
        layer.zero_grad()
    capture = Capture(layer, batch_first=False)
    layer(batch, batch, batch)[0].square().sum().backward()
    (gradient,) = capture.take([layer.seq_bias_k.bias])
    torch.testing.assert_close(gradient.grad_sample(), torch.stack(want), rtol=1e-9, atol=1e-12)


# Physical batches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_physical_batches_add_up_to_the_logical_one(reduction: str):
    batch = inputs(10)
    results = []
    for pieces in ([batch], list(batch.split(3))):
        model, engine = small_model(), PrivacyEngine()
        private, optimizer = privatize(
            model, OPTIMIZERS["momentum"], engine=engine, max_grad_norm=0.1, loss_reduction=reduction
        )
        for piece in pieces:
            optimizer.signal_skip_step(do_skip=piece is not pieces[-1])
            losses = record_loss(private(piece))
            (losses.sum() if reduction == "sum" else losses.mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert engine.accountant.history == [(0.0, 0.1, 1)]
        results.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("merged", ["accumulated", "skipped", "split"])
def test_shuffled_batches_that_are_merged_count_as_large_as_they_are(merged: str):
    model, engine = small_model(torch.float32), PrivacyEngine()
    model, optimizer, batches = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=loader(30, 8),  # the last one smaller
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
    )
    for number, (batch,) in enumerate(batches):
        for part in batch.split(4) if merged == "split" else [batch]:
            whole = torch.equal(part[-1], batch[-1])
            record_loss(model(part)).mean().backward()
            if merged != "accumulated":
                optimizer.signal_skip_step(do_skip=number % 2 == 0 or not whole)
            if merged != "accumulated" or number % 2:
                optimizer.step()
                optimizer.zero_grad()
    assert engine.accountant.history == [(1.0, 2 / 4, 2)]


def test_the_batch_memory_manager_splits_batches():
    model = small_model(torch.float32)
    engine = PrivacyEngine()
    model, optimizer, data_loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=loader(40, 20),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    with BatchMemoryManager(data_loader=data_loader, max_physical_batch_size=4, optimizer=optimizer) as small:
        physical = 0
        for (batch,) in small:
            assert len(batch) <= 4
            physical += 1
            optimizer.zero_grad()
            model(batch).sum().backward()
            optimizer.step()
    assert engine.accountant.history == [(1.0, 0.5, 2)] and physical > 2


@pytest.mark.parametrize("poisson", [True, False])
@pytest.mark.parametrize("physical", [1, 3, 4, 100])
@pytest.mark.filterwarnings("ignore:Secure RNG turned off")
def test_the_batch_memory_manager_expects_as_many_batches_as_with_opacus(poisson: bool, physical: int):
    lengths = []
    for engine, mode in ((PrivacyEngine(), "fused"), (opacus.PrivacyEngine(), "hooks")):
        model = nn.Linear(6, 2)
        _, optimizer, data_loader = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=loader(),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=poisson,
            grad_sample_mode=mode,
        )
        manager = BatchMemoryManager(data_loader=data_loader, max_physical_batch_size=physical, optimizer=optimizer)
        with manager as small:
            lengths.append((len(data_loader), len(small)))
    assert lengths[0] == lengths[1]


def test_accumulation_is_refused_under_poisson_sampling_and_adds_otherwise():
    def parts(poisson: bool):
        model = small_model(torch.float32)
        return PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
            data_loader=loader(),
            noise_multiplier=0.0,
            max_grad_norm=0.5,
            loss_reduction="sum",
            poisson_sampling=poisson,
        )

    model, optimizer, _ = parts(poisson=True)
    record_loss(model(inputs(3, torch.float32))).sum().backward()
    with pytest.raises(ValueError, match=r"optimizer\.step"):
        model(inputs(3, torch.float32, seed=1))
    model, optimizer, _ = parts(poisson=False)
    want = clipped_sum(
        small_model(torch.float32), torch.cat([inputs(3, torch.float32), inputs(4, torch.float32, 1)]), 0.5
    )
    before = [p.detach().clone() for p in model.parameters()]
    for batch in (inputs(3, torch.float32), inputs(4, torch.float32, 1)):
        record_loss(model(batch)).sum().backward()
    assert optimizer.accumulated_iterations == 2
    optimizer.step()
    for p, old, total in zip(model.parameters(), before, want, strict=True):
        torch.testing.assert_close(old - p, total, rtol=1e-4, atol=1e-6)


def test_two_draws_in_one_step_are_refused_for_a_loop_of_ones_own():
    """A record may be in both, so the bound would be twice that of one."""
    private, _ = privatize(small_model(), OPTIMIZERS["sgd"])
    record_loss(private(inputs(3))).sum().backward()
    with pytest.raises(ValueError, match=r"optimizer\.step"):
        private(inputs(3, seed=1))


def test_noise_covers_a_bound_lowered_between_physical_batches():
    private, optimizer = privatize(small_model(), OPTIMIZERS["sgd"], max_grad_norm=1.0)
    optimizer.signal_skip_step(do_skip=True)
    record_loss(100 * private(inputs(1))).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.max_grad_norm = 0.1
    optimizer.signal_skip_step(do_skip=False)
    moved = torch.stack([s.norm() for s in optimizer._pending_sums()]).norm()
    rounding = 1 + sum_rounding(optimizer.expected_batch_size, D)
    assert 0.9 < float(moved) <= optimizer.sensitivity() == rounding
    optimizer.step()
    assert optimizer.sensitivity() == 0.1 * rounding


def test_gradients_from_before_are_forgotten():
    """A frozen parameter would be moved by the un-noised gradient that its pre-training left behind."""
    model = small_model()
    record_loss(model(inputs(4))).sum().backward()
    first = model[0].requires_grad_(False)
    before = first.weight.detach().clone()
    _, optimizer = privatize(model, OPTIMIZERS["rmsprop (no fused update)"], noise_multiplier=1.0)
    optimizer.step()
    assert torch.equal(first.weight, before)


def test_trainable_parameters_that_no_optimizer_holds_are_named():
    model = small_model()
    private, optimizer = PrivacyEngine().privatize(
        model,
        torch.optim.SGD(model[4].parameters(), lr=0.1),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        sample_rate=0.1,
        expected_batch_size=8,
        loss_reduction="sum",
    )
    record_loss(private(inputs(3))).sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"'0\.weight'.*freeze them"):
        private(inputs(3))


def test_a_private_model_is_not_pickled():
    private, _ = privatize(small_model(), OPTIMIZERS["sgd"])
    with pytest.raises(TypeError, match="state_dict"):
        pickle.dumps(private)


def test_a_private_model_can_be_copied():
    private, _ = privatize(small_model(), OPTIMIZERS["sgd"])
    twin = copy.deepcopy(private).eval()
    assert torch.equal(twin(inputs(3)), private(inputs(3)))


def test_a_copy_does_not_speak_for_the_original():
    """Cleaning or resetting the copy, as of a moving average of the weights, must not touch what is trained."""
    private, optimizer = privatize(small_model(), lambda p: torch.optim.SGD(p, lr=1.0))
    record_loss(private(inputs(4))).sum().backward()
    twin = copy.deepcopy(private)
    with pytest.raises(ValueError, match="copy of a private"):
        privatize(twin, OPTIMIZERS["sgd"])
    twin.zero_grad()
    plain = twin.to_standard_module()
    before = [p.detach().clone() for p in private.parameters()]
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, private.parameters(), strict=True))
    privatize(plain, OPTIMIZERS["sgd"])


def test_a_wrapped_module_may_be_handed_on():
    """To another engine and with another optimizer, which takes over all that the first one had."""
    private, first = privatize(small_model(), OPTIMIZERS["sgd"])
    again, second = privatize(private, lambda p: torch.optim.SGD(p, lr=1.0), max_grad_norm=0.5)
    assert again is private
    again.allow_grad_accumulation()
    want = clipped_sum(small_model(), torch.cat([inputs(3), inputs(4, seed=1)]), 0.5)
    before = [p.detach().clone() for p in private.parameters()]
    for batch in (inputs(3), inputs(4, seed=1)):
        record_loss(again(batch)).sum().backward()
    second.step()
    assert not first._sums
    for p, old, total in zip(private.parameters(), before, want, strict=True):
        torch.testing.assert_close(old - p, total, rtol=1e-9, atol=1e-13)


def test_a_module_is_made_private_once():
    model = small_model()
    private, _ = privatize(model, OPTIMIZERS["sgd"])
    with pytest.raises(ValueError, match="private already"):
        privatize(model, OPTIMIZERS["sgd"])
    private.cleanup()
    privatize(model, OPTIMIZERS["sgd"])


# Against Opacus --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("dtype", [torch.float32, D], ids=str)
def test_twenty_steps_equal_opacus(name: str, dtype: torch.dtype):
    """No noise, the same batches: the same parameters.

    The loss is scaled so that norms are far above the 1e-6 that Opacus adds to them.
    """
    # Opacus' hooks refuse an in-place ReLU and get padding_mode="reflect" wrong.
    models = [small_model(dtype, for_opacus=True), small_model(dtype, for_opacus=True)]
    runs = [
        privatize(models[0], OPTIMIZERS[name], max_grad_norm=1.0, loss_reduction="mean", count_rounding=False),
        privatize(models[1], OPTIMIZERS[name], max_grad_norm=1.0, loss_reduction="mean", grad_sample_mode="hooks"),
    ]
    for step in range(20):
        for private, optimizer in runs:
            (1e5 * record_loss(private(inputs(9, dtype, seed=step)))).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    ours, theirs = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in models)
    assert (ours - theirs).norm() < (1e-9 if dtype == D else 1e-5) * theirs.norm()


def test_poisson_draws_are_not_allowed_to_accumulate():
    """Not when it is asked for either: a record that is in two of them would count twice."""
    model = small_model(torch.float32)
    private, _, _ = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=loader(),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    with pytest.raises(ValueError, match="does not compose by accumulation"):
        private.allow_grad_accumulation()


def test_noise_covers_a_bound_that_is_lowered_in_place():
    private, optimizer = privatize(small_model(), OPTIMIZERS["sgd"])
    optimizer.max_grad_norm = torch.tensor(1.0)
    optimizer.signal_skip_step(do_skip=True)
    record_loss(100 * private(inputs(1))).sum().backward()
    optimizer.step()
    optimizer.max_grad_norm.mul_(0.1)
    assert optimizer.sensitivity() >= 1.0


@pytest.mark.parametrize(
    "bad", [{"sample_rate": 64 // 1000}, {"sample_rate": 1.5}, {"sample_rate": math.nan}, {"expected_batch_size": 0}]
)
def test_rates_and_sizes_that_cannot_be_are_refused(bad: dict):
    """A rate of 0, as of a division of integers, would be accounted as no cost at all."""
    with pytest.raises(ValueError, match=next(iter(bad))):
        privatize(small_model(), OPTIMIZERS["sgd"], **bad)
