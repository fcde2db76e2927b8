"""Poisson draws: every record on its own coin, nothing truncated, nothing skipped, the empty draw included."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from dp2vae_fast.engine.keystream import Keystream, Stream
from dp2vae_fast.engine.sampling import PoissonBatches, PoissonDataLoader, PoissonSampler


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
