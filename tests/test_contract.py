"""The contract of Opacus 1.6 beyond one step: checkpoints, schedules, physical batches, modes, signatures.

What one step of fused mode does, and guarantees, is in ``test_privacy_engine.py``.
"""

from __future__ import annotations

import inspect
import io
import math
from typing import Any

import opacus
import pytest
import torch
from opacus.schedulers import (
    ExponentialGradClip,
    ExponentialNoise,
    LambdaGradClip,
    LambdaNoise,
    StepGradClip,
    StepNoise,
)
from opacus.utils.batch_memory_manager import BatchMemoryManager
from opacus.validators.errors import UnsupportedModuleError
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dp2vae_fast import PrivacyEngine
from dp2vae_fast.engine.keystream import Keystream

pytestmark = pytest.mark.filterwarnings(
    "ignore:Secure RNG turned off", "ignore:.*last_epoch", "ignore:Detected call of"
)

D = torch.float64
N = 24


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(D)


def loader(batch_size: int = 6, n: int = N, **kwargs: Any) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 5, generator=generator, dtype=D)
    y = torch.randint(3, (n,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size, **kwargs)


def adam(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(module.parameters(), lr=0.05)


def private(engine: Any, module: nn.Module, make_optimizer: Any = adam, data: Any = None, **settings: Any) -> Any:
    settings = {"noise_multiplier": 1.0, "max_grad_norm": 0.5, "poisson_sampling": False} | settings
    data = loader() if data is None else data
    return engine.make_private(module=module, optimizer=make_optimizer(module), data_loader=data, **settings)


def train(module: Any, optimizer: Any, data: Any, criterion: Any = None, steps: int | None = None) -> None:
    criterion = criterion or nn.CrossEntropyLoss()
    for step, (x, y) in enumerate(data):
        if step == steps:
            return
        optimizer.zero_grad()
        out = module(x)
        (criterion(out, y) if len(x) else out.sum()).backward()
        optimizer.step()


def seeded(seed: int = 3) -> PrivacyEngine:
    return PrivacyEngine(keystream=Keystream.seeded(seed))


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


# Checkpoints ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [True, False])
@pytest.mark.parametrize("direction", ["from Opacus", "to Opacus", "ours"])
def test_a_checkpoint_of_one_engine_is_one_of_the_other(direction: str, wrap: bool):
    kinds = {"opacus": (opacus.PrivacyEngine, "hooks"), "ours": (seeded, "fused")}
    first, second = {"from Opacus": ("opacus", "ours"), "to Opacus": ("ours", "opacus"), "ours": ("ours", "ours")}[
        direction
    ]

    def parts(kind: str, seed: int, sigma: float) -> tuple[Any, ...]:
        make, mode = kinds[kind]
        engine, plain = make(), model(seed)
        wrapped, optimizer, data = private(
            engine, plain, grad_sample_mode=mode, noise_multiplier=sigma, wrap_model=wrap
        )
        noise = StepNoise(optimizer, step_size=1, gamma=0.9)
        clip = ExponentialGradClip(optimizer, gamma=0.8)
        return engine, wrapped if wrap else plain, optimizer, data, noise, clip

    engine, module, optimizer, data, noise, clip = parts(first, 0, 1.5)
    for _ in range(2):
        train(module, optimizer, data)
        noise.step()
        clip.step()
    with io.BytesIO() as file:
        engine.save_checkpoint(
            path=file,
            module=module,
            optimizer=optimizer,
            noise_scheduler=noise,
            grad_clip_scheduler=clip,
            checkpoint_dict={"epoch": 2},
        )
        file.seek(0)
        engine_2, module_2, optimizer_2, data_2, noise_2, clip_2 = parts(second, 1, 0.7)
        rest = engine_2.load_checkpoint(
            path=file, module=module_2, optimizer=optimizer_2, noise_scheduler=noise_2, grad_clip_scheduler=clip_2
        )
    assert rest["epoch"] == 2
    assert torch.equal(weights(module), weights(module_2))
    assert noise_2.state_dict() == noise.state_dict() and clip_2.state_dict() == clip.state_dict()
    assert engine_2.accountant.state_dict() == engine.accountant.state_dict()
    assert engine_2.get_epsilon(1e-5) == engine.get_epsilon(1e-5)
    states = [optimizer.state_dict()["state"], optimizer_2.state_dict()["state"]]
    for a, b in zip(*(s.values() for s in states), strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    train(module_2, optimizer_2, data_2)  # and it goes on
    assert sum(steps for *_, steps in engine_2.accountant.history) == 12


def test_what_was_trained_without_wrapping_loads_into_the_plain_model():
    plain, reference = model(), model(1)
    keys = list(plain.state_dict())
    _, optimizer, data = private(PrivacyEngine(), plain, wrap_model=False)
    train(plain, optimizer, data)
    assert type(plain) is nn.Sequential and list(plain.state_dict()) == keys
    assert [name for name, _ in plain.named_parameters()] == keys
    reference.load_state_dict(plain.state_dict())
    assert torch.equal(weights(plain), weights(reference))


# Schedules -----------------------------------------------------------------------------------------------------------

SCHEDULES = {
    "exponential noise": (lambda o: ExponentialNoise(o, gamma=0.7), "noise_multiplier"),
    "step noise": (lambda o: StepNoise(o, step_size=2, gamma=0.5), "noise_multiplier"),
    "lambda noise": (lambda o: LambdaNoise(o, noise_lambda=lambda epoch: 1 + epoch), "noise_multiplier"),
    "exponential clip": (lambda o: ExponentialGradClip(o, gamma=0.7), "max_grad_norm"),
    "step clip": (lambda o: StepGradClip(o, step_size=2, gamma=0.5), "max_grad_norm"),
    "lambda clip": (lambda o: LambdaGradClip(o, scheduler_function=lambda epoch: 1 / (1 + epoch)), "max_grad_norm"),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_of_noise_and_bound_are_drawn_and_accounted(name: str):
    """Without a record in the batch, the private gradient is the noise: it must follow what the schedule says."""
    make, attribute = SCHEDULES[name]
    engine = seeded()
    wide = nn.Linear(50, 200).to(D)
    data = DataLoader(TensorDataset(torch.zeros(N, 50, dtype=D)), batch_size=6)
    _, optimizer, _ = private(engine, wide, data=data, materialize_grad=True, loss_reduction="sum")
    _, theirs, _ = private(opacus.PrivacyEngine(), model(), grad_sample_mode="hooks")
    schedule, reference = make(optimizer), make(theirs)
    sigmas = []
    for _ in range(5):
        assert getattr(optimizer, attribute) == getattr(theirs, attribute)
        optimizer.zero_grad()
        optimizer.step()
        sigmas.append(optimizer.noise_multiplier)
        noise = torch.cat([p.grad.flatten() for p in wide.parameters()])
        std = optimizer.noise_multiplier * optimizer.max_grad_norm
        assert abs(float(noise.std()) / std - 1) < 5 / math.sqrt(2 * noise.numel())
        schedule.step()
        reference.step()
    assert [sigma for sigma, _, steps in engine.accountant.history for _ in range(steps)] == sigmas


LR_SCHEDULES = {
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=4),
    "one cycle, betas too": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=8),
    "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, total_iters=2), torch.optim.lr_scheduler.ExponentialLR(o, gamma=0.5)],
        milestones=[2],
    ),
}


@pytest.mark.parametrize("materialize", [False, True])
@pytest.mark.parametrize("name", LR_SCHEDULES)
def test_learning_rate_schedules_move_the_weights_as_on_the_plain_optimizer(name: str, materialize: bool):
    """No noise, one record a step, a bound that is never reached: DP-SGD is training."""
    plain, dp = model(), model()
    data = loader(batch_size=1)
    optimizer = adam(plain)
    module, dp_optimizer, _ = private(
        PrivacyEngine(), dp, data=data, noise_multiplier=0.0, max_grad_norm=1e9, materialize_grad=materialize
    )
    schedules = [LR_SCHEDULES[name](o) for o in (optimizer, dp_optimizer)]
    for _ in range(6):
        train(plain, optimizer, data, steps=2)
        train(module, dp_optimizer, data, steps=2)
        for schedule in schedules:
            schedule.step()
        assert schedules[0].get_last_lr() == schedules[1].get_last_lr()
    torch.testing.assert_close(weights(dp), weights(plain), rtol=1e-9, atol=1e-11)


def test_reduce_on_plateau():
    _, optimizer, _ = private(PrivacyEngine(), model())
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.1)
    for loss in (1.0, 1.0, 1.0):
        schedule.step(loss)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * 0.1**2)


# Physical batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("poisson", [True, False])
@pytest.mark.parametrize("batch_size", [1, 5, 6, 24])  # of 24: 1 draws many an empty batch, 5 leaves a rest
@pytest.mark.parametrize("physical", [1, 4, 6, 100])
def test_the_memory_manager_changes_nothing_but_memory(poisson: bool, batch_size: int, physical: int, reduction: str):
    results, sizes = [], []
    for managed in (False, True):
        engine, plain = seeded(), model()
        module, optimizer, data = private(
            engine, plain, data=loader(batch_size), poisson_sampling=poisson, loss_reduction=reduction
        )
        criterion = nn.CrossEntropyLoss(reduction=reduction)
        if managed:
            with BatchMemoryManager(data_loader=data, max_physical_batch_size=physical, optimizer=optimizer) as small:
                for _ in range(2):
                    sizes += [len(x) for x, _ in _noted(small, module, optimizer, criterion)]
        else:
            for _ in range(2):
                train(module, optimizer, data, criterion)
        draws = 2 * math.ceil(N / batch_size)
        assert engine.accountant.history == [(1.0, 1 / math.ceil(N / batch_size), draws)]
        results.append(weights(plain))
    assert max(sizes) <= physical and (batch_size > 1 or not poisson or 0 in sizes)
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("poisson", [True, False])
@pytest.mark.parametrize("materialize", [True, False])
def test_nothing_is_counted_twice_without_zero_grad(materialize: bool, poisson: bool):
    """Opacus refuses such a loop; here a step takes what was captured, so that it is the same training."""
    results = []
    for zero in (True, False):
        plain = model()
        module, optimizer, data = private(
            seeded(), plain, poisson_sampling=poisson, materialize_grad=materialize, data=loader(8)
        )
        with BatchMemoryManager(data_loader=data, max_physical_batch_size=3, optimizer=optimizer) as small:
            for x, y in small:
                if zero:
                    optimizer.zero_grad()
                nn.CrossEntropyLoss()(module(x), y).backward()
                optimizer.step()
        results.append(weights(plain))
    assert torch.equal(*results)


def _noted(data: Any, module: Any, optimizer: Any, criterion: Any) -> Any:
    """The batches of one pass, each trained on before it is given out."""
    for x, y in data:
        train(module, optimizer, [(x, y)], criterion)
        yield x, y


# Arguments that change what is computed ------------------------------------------------------------------------------


class BatchSecond(nn.Module):
    """``[T, N, 5]`` in, ``[N, 3]`` out, or the same batch first."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.axis = 1 if batch_first else 0  # of time
        self.lift, self.norm, self.head = nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.lift(x)))).mean(self.axis)


@pytest.mark.parametrize("poisson", [True, False])
def test_batch_second_trains_as_batch_first(poisson: bool):
    x = torch.randn(N, 7, 5, dtype=D)
    y = torch.randint(3, (N,))

    def collate(records: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        return torch.stack([a for a, _ in records], dim=1), torch.stack([b for _, b in records])

    results = []
    for batch_first in (True, False):
        plain = BatchSecond(batch_first).to(D)
        data = DataLoader(TensorDataset(x, y), batch_size=6, collate_fn=None if batch_first else collate)
        module, optimizer, data = private(seeded(), plain, data=data, batch_first=batch_first, poisson_sampling=poisson)
        for a, b in data:
            optimizer.zero_grad()
            nn.CrossEntropyLoss()(module(a), b).backward()
            optimizer.step()
        results.append(weights(plain))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


def test_an_empty_draw_has_the_batch_where_it_belongs():
    data = DataLoader(
        TensorDataset(torch.randn(N, 7, 5, dtype=D)),
        batch_size=1,
        collate_fn=lambda records: torch.stack([a for (a,) in records], dim=1),
    )
    _, _, data = private(seeded(), BatchSecond(False).to(D), data=data, batch_first=False, poisson_sampling=True)
    shapes = [tuple(x.shape) for x in data]
    assert (7, 0, 5) in shapes and all(t == 7 and f == 5 for t, _, f in shapes)


@pytest.mark.parametrize("poisson", [True, False])
def test_mean_and_sum_are_the_same_training(poisson: bool):
    """The mean's division by the expected batch size, put into the learning rate of the sum."""
    results = []
    for reduction, lr in (("mean", 0.6), ("sum", 0.1)):
        plain = model()
        module, optimizer, data = private(
            seeded(),
            plain,
            lambda m, lr=lr: torch.optim.SGD(m.parameters(), lr=lr),
            poisson_sampling=poisson,
            loss_reduction=reduction,
        )
        train(module, optimizer, data, nn.CrossEntropyLoss(reduction=reduction))
        results.append(weights(plain))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_a_noise_generator_repeats_a_whole_run():
    results = []
    for seed in (5, 5, 6):
        plain = model()
        generator = torch.Generator().manual_seed(seed)
        module, optimizer, data = private(PrivacyEngine(), plain, noise_generator=generator)
        train(module, optimizer, data)
        results.append(weights(plain))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


# Validation ----------------------------------------------------------------------------------------------------------


def test_compatible_modules():
    engine = PrivacyEngine()
    bad = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))
    nothing: dict[str, Any] = {"optimizer": None, "data_loader": None}
    assert not engine.is_compatible(module=bad, **nothing)
    with pytest.raises(UnsupportedModuleError):
        engine.validate(module=bad, **nothing)
    data = DataLoader(TensorDataset(torch.randn(8, 2, 4, 4), torch.randint(3, (8,))), batch_size=4)
    with pytest.raises(UnsupportedModuleError):
        private(engine, bad, data=data)
    good = PrivacyEngine.get_compatible_module(bad)
    assert isinstance(good[1], nn.GroupNorm) and isinstance(bad[1], nn.BatchNorm2d)
    assert engine.is_compatible(module=good, **nothing)
    engine.validate(module=good, **nothing)
    module, optimizer, data = private(engine, good, data=data)
    train(module, optimizer, data)
    assert engine.accountant.history == [(1.0, 1 / 2, 2)]


def test_an_optimizer_of_other_parameters_is_refused_as_by_opacus():
    with pytest.raises(ValueError, match="Module parameters are different than optimizer Parameters"):
        private(PrivacyEngine(), model(), lambda _: adam(model()))


# Opacus' own modes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poisson", [True, False])
@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
@pytest.mark.parametrize("mode", ["hooks", "functorch", "ew", "ghost"])
def test_opacus_modes_give_opacus_result_bit_for_bit(mode: str, clipping: str, poisson: bool):
    if mode == "ghost" and clipping == "per_layer":
        pytest.skip("Opacus has no per-layer ghost clipping")
    results, histories, kinds = [], [], []
    for make in (opacus.PrivacyEngine, PrivacyEngine):
        engine, plain = make(), model()
        torch.manual_seed(11)  # Poisson coins
        parts = private(
            engine,
            plain,
            criterion=nn.CrossEntropyLoss(),
            poisson_sampling=poisson,
            clipping=clipping,
            max_grad_norm=0.5 if clipping == "flat" else [0.5, 0.4, 0.3, 0.2],
            grad_sample_mode=mode,
            noise_generator=torch.Generator().manual_seed(2),
        )
        train(parts[0], parts[1], parts[-1], parts[2] if mode == "ghost" else None)
        results.append(weights(plain))
        histories.append(engine.accountant.history)
        kinds.append([type(part) for part in parts])
    assert torch.equal(*results) and histories[0] == histories[1] and kinds[0] == kinds[1]


def test_one_engine_serves_both_kinds_of_mode():
    """The account is one, whichever mode a module is trained in."""
    engine = PrivacyEngine()
    data = loader()
    for mode in ("fused", "hooks", "fused"):
        module, optimizer, batches = private(engine, model(), data=data, grad_sample_mode=mode)
        train(module, optimizer, batches)
    assert engine.accountant.history == [(1.0, 1 / 4, 12)]


# Signatures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in vars(opacus.PrivacyEngine) if not n.startswith("_")] + ["__init__"])
def test_every_argument_of_opacus_is_taken(name: str):
    theirs = inspect.signature(getattr(opacus.PrivacyEngine, name)).parameters
    ours = inspect.signature(getattr(PrivacyEngine, name)).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in ours.values())
    for key, parameter in theirs.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            assert open_ended
        elif key not in ours:
            assert open_ended, f"{name}() does not take {key!r}"
        elif key not in ("grad_sample_mode", "criterion"):  # the one default that differs; an object of its own
            assert ours[key].default == parameter.default and ours[key].kind == parameter.kind, key
    required = {key for key, p in ours.items() if p.default is p.empty and p.kind is p.KEYWORD_ONLY}
    assert required <= {key for key, p in theirs.items() if p.default is p.empty}


@pytest.mark.parametrize("mode", ["fused", "hooks", "ghost"])
@pytest.mark.parametrize("target", [False, True])
def test_every_argument_may_be_given(mode: str, target: bool):
    plain = model()
    common: dict[str, Any] = dict(
        module=plain,
        optimizer=adam(plain),
        criterion=nn.CrossEntropyLoss(),
        data_loader=loader(),
        max_grad_norm=1.0,
        batch_first=True,
        loss_reduction="mean",
        poisson_sampling=True,
        clipping="flat",
        noise_generator=None,
        grad_sample_mode=mode,
        wrap_model=True,
    )
    engine = PrivacyEngine(accountant="rdp", secure_mode=False)
    if target:
        parts = engine.make_private_with_epsilon(target_epsilon=5.0, target_delta=1e-5, epochs=1, **common)
    else:
        parts = engine.make_private(noise_multiplier=1.0, rand_on_empty=False, **common)
    assert len(parts) == (4 if mode == "ghost" else 3)
    train(parts[0], parts[1], parts[-1], parts[2] if mode == "ghost" else None)
    with io.BytesIO() as file:
        engine.save_checkpoint(
            path=file,
            module=parts[0],
            optimizer=parts[1],
            noise_scheduler=None,
            grad_clip_scheduler=None,
            checkpoint_dict=None,
            module_state_dict_kwargs={"keep_vars": False},
            torch_save_kwargs={"pickle_protocol": 2},
        )
        file.seek(0)
        engine.load_checkpoint(
            path=file,
            module=parts[0],
            optimizer=parts[1],
            noise_scheduler=None,
            grad_clip_scheduler=None,
            module_load_dict_kwargs={"strict": True},
            torch_load_kwargs={"map_location": "cpu"},
        )


@pytest.mark.parametrize("accountant", ["prv", "rdp", "gdp"])
def test_every_accountant_has_opacus_epsilon(accountant: str):
    epsilons = []
    for engine, mode in (
        (PrivacyEngine(accountant=accountant), "fused"),
        (opacus.PrivacyEngine(accountant=accountant), "hooks"),
    ):
        module, optimizer, data = private(engine, model(), grad_sample_mode=mode)
        train(module, optimizer, data)
        epsilons.append(engine.get_epsilon(1e-5))
    assert epsilons[0] == epsilons[1] > 0
