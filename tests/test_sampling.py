"""Poisson draws: every record on its own coin, nothing truncated, nothing skipped, the empty draw included."""

from __future__ import annotations

import math

import pytest
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler, TensorDataset

from dp2vae_fast import PrivacyEngine
from dp2vae_fast.engine.keystream import Keystream, Stream
from dp2vae_fast.engine.loader import PoissonDataLoader
from dp2vae_fast.engine.sampling import PoissonBatches, PoissonSampler


def stream(seed: int = 4) -> Stream:
    return Keystream.seeded(seed).stream("Poisson sampling")


class Records(Dataset):
    """Twelve records; ``kind`` says what one looks like."""

    def __init__(self, kind: str, size: int = 12) -> None:
        self.kind, self.size = kind, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int):
        if index >= self.size:
            raise IndexError(index)
        x = torch.full((6,), float(index))
        return {"pair": (x, index), "dict": {"x": x, "y": index}, "tensor": x, "nested": ((x, x), index)}[self.kind]


def tensors(batch) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    return [t for part in (batch.values() if isinstance(batch, dict) else batch) for t in tensors(part)]


@pytest.mark.parametrize("rate", [1e-9, 0.03, 0.5, 1.0])
@pytest.mark.parametrize("size", [1, 7, 64])
def test_physical_batches_hold_the_whole_draw(rate: float, size: int):
    draws, batches = stream(), PoissonBatches(stream(), dataset_size=50, sample_rate=rate, physical_batch_size=size)
    for _ in range(20):
        drawn, physical = draws.poisson(50, rate), next(batches)
        assert torch.equal(torch.cat([b.indices[b.mask] for b in physical]), drawn)
        assert all(len(b.indices) == len(b.mask) == size for b in physical)
        assert [b.last for b in physical] == [False] * (len(physical) - 1) + [True]
        assert len(physical) == max(1, math.ceil(len(drawn) / size))


def test_coins_are_independent_of_each_other_and_of_the_step():
    """Inclusion counts, draw sizes, pairs of records and successive steps, each within 5 standard deviations."""
    n, rate, steps = 40, 0.3, 4000
    sampler = PoissonSampler(stream(), dataset_size=n, sample_rate=rate, steps=steps)
    drawn = torch.zeros(steps, n)
    for row, indices in zip(drawn, sampler, strict=True):
        row[indices] = 1
    deviation = (rate * (1 - rate)) ** 0.5
    assert bool(((drawn.mean(0) - rate).abs() < 5 * deviation / steps**0.5).all())
    variance = drawn.sum(1).var()
    assert abs(float(variance) / (n * deviation**2) - 1) < 5 * (2 / steps) ** 0.5
    centred = (drawn - rate) / deviation
    pairs = (centred.T @ centred / steps).fill_diagonal_(0)
    successive = centred[1:].T @ centred[:-1] / steps
    assert float(pairs.abs().max()) < 5.5 / steps**0.5 and float(successive.abs().max()) < 5.5 / steps**0.5


@pytest.mark.parametrize("kind", ["pair", "dict", "tensor", "nested"])
def test_an_empty_draw_looks_like_any_other_batch(kind: str):
    loader = PoissonDataLoader.from_data_loader(DataLoader(Records(kind), batch_size=1), stream())
    seen = [batch for _ in range(8) for batch in loader]
    assert len(seen) == 96 and {type(b) for b in seen} == {type(seen[0])}
    shapes = [[t.shape for t in tensors(b)] for b in seen]
    assert {s[0][0] for s in shapes} >= {0, 1, 2}
    for shape in shapes:
        assert {s[0] for s in shape} == {shape[0][0]}
        assert [s[1:] for s in shape] == [s[1:] for s in shapes[0]]
    dtypes = [[t.dtype for t in tensors(b)] for b in seen]
    assert all(d == dtypes[0] for d in dtypes)


def test_the_batch_axis_may_be_the_second():
    def collate(records: list) -> Tensor:
        return torch.stack([x for x, _ in records], 1)

    plain = DataLoader(Records("pair"), batch_size=1, collate_fn=collate)
    loader = PoissonDataLoader.from_data_loader(plain, stream(), batch_first=False)
    assert {batch.shape[0] for _ in range(5) for batch in loader} == {6}
    assert 0 in {batch.shape[1] for _ in range(5) for batch in loader}


@pytest.mark.parametrize(("batch_size", "drop_last", "steps"), [(5, False, 3), (5, True, 2), (12, False, 1)])
def test_rate_and_steps_follow_from_the_loader(batch_size: int, drop_last: bool, steps: int):
    plain = DataLoader(Records("pair"), batch_size=batch_size, drop_last=drop_last)
    loader = PoissonDataLoader.from_data_loader(plain, stream())
    assert len(loader) == len(list(loader)) == steps and loader.sample_rate == 1 / steps
    again = PoissonDataLoader.from_data_loader(loader, stream())
    assert len(again) == steps and again.sample_rate == 1 / steps


def test_workers_draw_the_same_batches_once():
    def batches(workers: int) -> list[list[float]]:
        plain = DataLoader(Records("tensor"), batch_size=4, num_workers=workers)
        loader = PoissonDataLoader.from_data_loader(plain, stream())
        return [batch[:, 0].tolist() for _ in range(2) for batch in loader]

    assert batches(0) == batches(2) and batches(0)[:3] != batches(0)[3:]


def test_what_has_no_records_to_draw_is_refused():
    class Endless(IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(ValueError, match="IterableDataset"):
        PoissonDataLoader.from_data_loader(DataLoader(Endless()), stream())
    with pytest.raises(ValueError, match="no batch"):
        PoissonDataLoader.from_data_loader(DataLoader(Records("pair"), batch_size=13, drop_last=True), stream())
    for bad in ({"dataset_size": 0}, {"sample_rate": 0.0}, {"sample_rate": 1.5}, {"physical_batch_size": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            PoissonBatches(stream(), **({"dataset_size": 5, "sample_rate": 0.5, "physical_batch_size": 2} | bad))


def test_a_loader_that_leaves_records_out_is_refused():
    """Poisson sampling would draw them, held-out records included."""
    data = Records("pair")
    for bad in (DataLoader(data, 2, sampler=SubsetRandomSampler(range(6))), DataLoader(data, batch_size=None)):
        with pytest.raises(ValueError, match=r"all 12 records.*Subset"):
            PoissonDataLoader.from_data_loader(bad, stream())


# Steps on the draws ----------------------------------------------------------------------------------


def counting(size: int, batch_size: int, loss_reduction: str = "sum"):
    """One weight whose step is minus the number of records in the sum: records of 1, lr 1, C 1, no noise."""
    model = nn.Linear(1, 1, bias=False)
    return PrivacyEngine(keystream=Keystream.seeded(1)).make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        data_loader=DataLoader(TensorDataset(torch.ones(size, 1)), batch_size=batch_size),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        loss_reduction=loss_reduction,
    )


def step(model: nn.Module, optimizer, batch: Tensor, *, zero_grad: bool = True) -> float:
    """The number of records in this step's sum, divided by the expected number where the loss is a mean."""
    weight = next(model.parameters())
    before = weight.item()
    size = 1 if optimizer.loss_reduction == "sum" else max(1, len(batch))
    (2 * model(batch)).sum().div(size).backward()
    optimizer.step()
    if zero_grad:
        optimizer.zero_grad()
    return before - weight.item()


@pytest.mark.parametrize("size", [98, 49, 93, 107])
def test_the_expected_batch_size_is_exact(size: int):
    """Opacus' int(98 * (1 / 49)) is 1, and for 49 records in batches of one int(49 * (1 / 49)) is 0."""
    for batch_size in (1, 2):
        _, optimizer, loader = counting(size, batch_size, "mean")
        assert optimizer.expected_batch_size == size // len(loader)


@pytest.mark.parametrize("zero_grad", [True, False])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_draw_in_several_physical_batches_is_one_step(zero_grad: bool, reduction: str):
    model, optimizer, loader = counting(12, 6, reduction)
    coins = stream_of(loader)
    sizes = [len(coins.poisson(12, 0.5)) for _ in range(8)]
    moved = []
    for _ in range(4):
        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer) as batches:
            for (batch,) in batches:
                last = not optimizer._check_skip_next_step(pop_next=False)
                change = step(model, optimizer, batch, zero_grad=zero_grad)
                moved += [change] if last else []
                assert last or change == 0
    assert max(sizes) > 4
    assert moved == pytest.approx([size / (1 if reduction == "sum" else 6) for size in sizes], abs=1e-4)


def stream_of(loader: DataLoader) -> Stream:
    """Another stream with the coins of ``loader``, which :func:`counting` made."""
    keystream = Keystream.seeded(1)
    while (twin := keystream.stream("Poisson sampling")).mechanism < loader.batch_sampler.stream.mechanism:
        pass
    return twin


def test_a_pass_cut_short_does_not_run_into_the_next():
    """What a break left of a draw would put a record into one step twice."""
    model, optimizer, loader = counting(8, 8)  # rate 1: every draw is all 8 records
    moved = []
    for stop in (1, 2, 3):
        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=3, optimizer=optimizer) as batches:
            for i, (batch,) in enumerate(batches, 1):
                moved.append(step(model, optimizer, batch))
                if i == stop:
                    break
    assert moved == pytest.approx([0, 0, 0, 0, 0, 8], abs=1e-4)


def test_a_break_before_the_step_leaves_no_signal_behind():
    model, optimizer, loader = counting(8, 8)
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=3, optimizer=optimizer) as batches:
        next(iter(batches))
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=3, optimizer=optimizer) as batches:
        moved = [step(model, optimizer, batch) for (batch,) in batches]
    assert moved == pytest.approx([0, 0, 8], abs=1e-4)


def test_a_second_pass_inside_a_split_draw_ends_the_first():
    model, optimizer, loader = counting(8, 4)
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=1, optimizer=optimizer) as batches:
        first = iter(batches)
        step(model, optimizer, next(first)[0])
        next(iter(loader))
        with pytest.raises(RuntimeError, match="another pass"):
            for _ in range(9):
                next(first)
    optimizer.begin_pass()
    rest = iter(loader)
    for _ in range(2):
        next(iter(loader))  # whole draws may be looked at at any time
        step(model, optimizer, next(rest)[0])
