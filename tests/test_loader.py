"""Padded batches of one fixed shape, and a sampling rate from a declared number of records."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import grads_one_by_one, record_loss
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset, WeightedRandomSampler

from dp2vae_fast import PrivacyEngine
from dp2vae_fast.engine.keystream import Keystream
from dp2vae_fast.engine.loader import PoissonDataLoader

D = torch.float64
N = 40


def records() -> Tensor:
    return torch.randn(N, 4, dtype=D, generator=torch.Generator().manual_seed(0)) + 2


def private(physical: int | None, *, seed: int = 3, batch_size: int = 8, workers: int = 0, **kwargs):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).to(D)
    settings = dict(noise_multiplier=0.0, max_grad_norm=0.5, loss_reduction="sum", physical_batch_size=physical)
    parts = PrivacyEngine(keystream=Keystream.seeded(seed)).make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(records(), torch.arange(N)), batch_size=batch_size, num_workers=workers),
        **(settings | kwargs),
    )
    return model, *parts


def parameters_after(physical: int | None, reduction: str = "sum", passes: int = 2, **kwargs) -> Tensor:
    model, module, optimizer, loader = private(physical, loss_reduction=reduction, **kwargs)
    for _ in range(passes):
        for inputs, _ in loader:
            optimizer.zero_grad()
            losses = record_loss(module(inputs))
            (losses.sum() if reduction == "sum" else losses.mean()).backward()
            optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("physical", [1, 3, 64])
def test_the_physical_batch_size_changes_nothing(physical: int, reduction: str):
    """Small ones split draws, large ones pad them; an ordinary loop, and the loss of padding is not masked."""
    want = parameters_after(None, reduction)
    torch.testing.assert_close(parameters_after(physical, reduction), want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_batch_has_its_shape_and_its_mask(workers: int):
    _, _, optimizer, loader = private(3, workers=workers)
    drawn, sizes, steps = [], [], 0
    for inputs, labels in loader:
        assert inputs.shape == (3, 4) and labels.shape == (3,)
        assert torch.equal(inputs[~loader.mask], torch.zeros(int((~loader.mask).sum()), 4, dtype=D))
        torch.testing.assert_close(inputs[loader.mask], records()[labels[loader.mask]])
        drawn += labels[loader.mask].tolist()
        if not optimizer._is_part_of_a_batch():
            sizes.append(len(drawn))
            assert len(set(drawn)) == len(drawn)  # a record is in a draw once
            drawn, steps = [], steps + 1
    assert steps == 5 and not drawn and len(set(sizes)) > 1


def test_an_empty_draw_is_a_batch_of_padding_and_a_counted_step():
    model, module, optimizer, loader = private(2, batch_size=1, noise_multiplier=1.0)
    empty = 0
    for inputs, _ in loader:
        before = model[0].weight.detach().clone()
        optimizer.zero_grad()
        record_loss(module(inputs)).sum().backward()
        optimizer.step()
        if not loader.mask.any():
            empty += 1
            assert not torch.equal(before, model[0].weight)
    assert empty > 3


def test_padding_is_no_record_even_where_it_is_not_finite():
    """log(0) of a padded image: its gradient is infinite, and contributes nothing."""

    class Log(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2, dtype=D)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.abs().log())

    model = Log()
    twin = copy.deepcopy(model)
    before = [p.detach().clone() for p in model.parameters()]
    module, optimizer, loader = PrivacyEngine(keystream=Keystream.seeded(3)).make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        data_loader=DataLoader(TensorDataset(records()), batch_size=8),
        noise_multiplier=0.0,
        max_grad_norm=1e9,
        loss_reduction="sum",
        physical_batch_size=30,
    )
    (inputs,) = next(iter(loader))
    exact = grads_one_by_one(twin, inputs[loader.mask])
    record_loss(module(inputs)).sum().backward()
    optimizer.step()
    for (name, p), old in zip(model.named_parameters(), before, strict=True):
        torch.testing.assert_close(old - p, exact[name].sum(0), rtol=1e-9, atol=1e-12)


def test_a_sampler_of_ones_own_is_replaced_and_that_is_said():
    weighted = WeightedRandomSampler([1.0] * N, N)
    with pytest.warns(UserWarning, match="WeightedRandomSampler is replaced by Poisson sampling"):
        PoissonDataLoader.from_data_loader(
            DataLoader(TensorDataset(records()), batch_size=8, sampler=weighted), Keystream.seeded(1).stream("coins")
        )


def test_padding_without_its_mask_is_refused():
    _, module, optimizer, loader = private(3)
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer) as split:
        for inputs, _ in split:
            record_loss(module(inputs)).sum().backward()
            with pytest.raises(RuntimeError, match="padding would count as records"):
                optimizer.step()
            break


def test_a_pass_cut_short_leaves_no_half_draw():
    _, module, optimizer, loader = private(1)
    for inputs, _ in loader:
        record_loss(module(inputs)).sum().backward()
        optimizer.step()
        if optimizer._is_last_step_skipped:
            break
    next(iter(loader))
    assert not optimizer._sums


# Declared sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [10, 50])
def test_rate_steps_and_divisor_follow_from_the_declared_size_alone(size: int):
    """One record more or less in the data set changes none of them."""
    for held in (N, N - 1):
        data = TensorDataset(records()[:held])
        loader = PoissonDataLoader.from_data_loader(
            DataLoader(data, batch_size=8), Keystream.seeded(0).stream("coins"), dataset_size=size
        )
        assert loader.sample_rate == 8 / size and loader.expected_batch_size == 8
        assert len(loader) == -(-size // 8)


def test_the_accountant_hears_of_the_declared_rate():
    _, module, optimizer, loader = private(None, dataset_size=100, noise_multiplier=1.0)
    for inputs, _ in loader:
        record_loss(module(inputs)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.expected_batch_size == 8
    assert len(loader) == 13


def test_epsilon_of_a_declared_size_is_met():
    engine = PrivacyEngine()
    model = nn.Linear(4, 1)
    _, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(torch.randn(90, 4)), batch_size=10),
        target_epsilon=2.0,
        target_delta=1e-5,
        epochs=2,
        max_grad_norm=1.0,
        dataset_size=100,
    )
    for _ in range(2 * len(loader)):
        optimizer.step_hook(optimizer)
    assert engine.accountant.history[0][1:] == (0.1, 20)
    assert 1.8 < engine.get_epsilon(1e-5) <= 2.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset_size": 0}, "at least one record"),
        ({"physical_batch_size": 0}, "at least 1"),
        ({"physical_batch_size": 4, "poisson_sampling": False}, "Poisson sampling"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        private(options.pop("physical_batch_size", None), **options)


# Without Poisson sampling ----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["with replacement", "in a batch sampler", "in two rounds"])
def test_a_sampler_that_repeats_records_is_refused(how: str):
    """Each time that a record is in the batch it would be clipped by itself."""
    weighted = WeightedRandomSampler([1.0] * N, N)
    batches: dict = {
        "with replacement": {"batch_size": 8, "sampler": weighted},
        "in a batch sampler": {"batch_sampler": BatchSampler(weighted, 8, drop_last=False)},
        "in two rounds": {"batch_size": 8, "sampler": RandomSampler(range(N), num_samples=2 * N)},
    }
    model = nn.Linear(4, 2)
    with pytest.raises(ValueError, match=r"Sampler may give a record several times.*without replacement"):
        PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(TensorDataset(records()), **batches[how]),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=False,
        )
