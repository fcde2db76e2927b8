"""Poisson sampling: every record enters every batch with the same public probability, on its own coin.

A draw has a random size. For a user's ``DataLoader`` it becomes one batch of that size (:class:`PoissonSampler`);
for a loop over tensors it becomes physical batches of one fixed shape with a mask (:class:`PoissonBatches`). A
draw is never truncated and never
skipped: an empty one is an empty batch, or one that is all padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from opacus.data_loader import wrap_collate_with_empty
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from .keystream import Stream


@dataclass(frozen=True)
class PhysicalBatch:
    """Part of one Poisson draw, at most ``physical_batch_size`` rows.

    ``indices [B]`` (int64) name records; where ``mask [B]`` is False the row is padding and must have zero weight
    in the loss. ``last``: the draw ends here, and with it the step.
    """

    indices: Tensor
    mask: Tensor
    last: bool


class PoissonBatches:
    """Endless Poisson draws over ``dataset_size`` records, each split into padded physical batches.

    Args:
        stream: where the coins come from; as secret as the noise.
        dataset_size: number of records N.
        sample_rate: probability q with which each record enters a draw, 0 < q <= 1.
        physical_batch_size: rows of a physical batch; a larger draw takes more of them.
    """

    def __init__(self, stream: Stream, *, dataset_size: int, sample_rate: float, physical_batch_size: int) -> None:
        if dataset_size < 1:
            raise ValueError(f"dataset_size is {dataset_size}: there must be at least one record")
        if not 0.0 < sample_rate <= 1.0:
            raise ValueError(f"sample_rate is {sample_rate}: it is a probability in (0, 1]")
        if physical_batch_size < 1:
            raise ValueError(f"physical_batch_size is {physical_batch_size}: it must be at least 1")
        self.stream = stream
        self.dataset_size = dataset_size
        self.sample_rate = sample_rate
        self.physical_batch_size = physical_batch_size

    def __iter__(self) -> PoissonBatches:
        return self

    def __next__(self) -> list[PhysicalBatch]:
        drawn = self.stream.poisson(self.dataset_size, self.sample_rate)
        size = self.physical_batch_size
        count = max(1, math.ceil(len(drawn) / size))
        indices = torch.zeros(count * size, dtype=torch.int64)
        indices[: len(drawn)] = drawn
        mask = torch.arange(count * size) < len(drawn)
        return [
            PhysicalBatch(indices[i : i + size], mask[i : i + size], last=i + size == count * size)
            for i in range(0, count * size, size)
        ]


class PoissonSampler(UniformWithReplacementSampler):
    """Batch sampler: ``steps`` Poisson draws an epoch, each a list of record indices, possibly empty.

    Of Opacus' kind, for which its ``BatchMemoryManager`` knows how many physical batches to expect.

    Args:
        stream, dataset_size, sample_rate: as :class:`PoissonBatches`.
        steps: draws of one pass over the sampler.

    Attributes:
        begin_pass: called at the start of a pass; true if it cut another one short, whose draws must then end.
    """

    begin_pass: Callable[[], bool] | None = None

    def __init__(self, stream: Stream, *, dataset_size: int, sample_rate: float, steps: int) -> None:
        self.stream = stream
        self.num_samples = dataset_size
        self.sample_rate = sample_rate
        self.steps = steps
        self._cut_short = 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        if self.begin_pass is not None and self.begin_pass():
            self._cut_short += 1
        passes = self._cut_short
        for _ in range(self.steps):
            if passes != self._cut_short:
                raise RuntimeError(
                    "another pass over the data loader began while a draw of this one was in several physical batches: "
                    "its rest cannot be told from the next draw. Finish one pass before the next, or use another loader"
                )
            yield self.stream.poisson(self.num_samples, self.sample_rate).tolist()


class PoissonDataLoader(DataLoader):
    """A ``DataLoader`` whose batches are Poisson draws, otherwise as the one it is made from.

    The sampling rate is one over the number of batches of the original loader, and a pass has as many steps as
    that loader had.
    """

    sample_rate: float

    @classmethod
    def from_data_loader(cls, loader: DataLoader, stream: Stream, *, batch_first: bool = True) -> PoissonDataLoader:
        """Replace the sampler of ``loader``; everything else is kept.

        Raises:
            ValueError: an iterable data set, which has no records to draw from; a loader without a batch, or with
                a sampler that leaves records out.
        """
        if isinstance(loader.dataset, IterableDataset):
            raise ValueError(
                "Poisson sampling needs a data set with a length and an index: convert the IterableDataset"
            )
        if len(loader) == 0:
            raise ValueError(
                "the data loader has no batch: the data set is smaller than one batch and drop_last is set"
            )
        size = len(loader.dataset)  # type: ignore[arg-type]
        if loader.batch_sampler is None or len(loader.sampler) != size:  # type: ignore[arg-type]
            raise ValueError(
                f"the data loader does not give all {size} records of its data set, in batches, and Poisson "
                "sampling would draw from all of them: give it a torch.utils.data.Subset and a batch_size"
            )
        collate = wrap_collate_with_empty(collate_fn=loader.collate_fn, batch_first=batch_first)
        collate([loader.dataset[0]])  # it learns what a batch looks like, should the first draw be empty
        rate = 1 / len(loader)
        private = cls(
            loader.dataset,
            batch_sampler=PoissonSampler(stream, dataset_size=size, sample_rate=rate, steps=len(loader)),
            collate_fn=collate,
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=loader.generator,
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.persistent_workers,
        )
        private.sample_rate = rate
        return private
