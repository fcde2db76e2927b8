"""A user's ``DataLoader`` with Poisson sampling: batches of the size that was drawn, or of one fixed shape."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from opacus.data_loader import wrap_collate_with_empty
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
)

from .keystream import Stream
from .sampling import PoissonSampler


def public_rate(loader: DataLoader, dataset_size: int) -> tuple[float, int]:
    """Sampling rate and draws of a pass where the number of records is *declared*, not read.

    Raises:
        ValueError: no record, or a loader without a batch size.
    """
    if dataset_size < 1:
        raise ValueError(f"dataset_size is {dataset_size}: there must be at least one record")
    if loader.batch_size is None:
        raise ValueError("dataset_size needs a data loader with a batch_size: the rate is batch_size / dataset_size")
    expected = min(loader.batch_size * _ranks(loader), dataset_size)
    return expected / dataset_size, math.ceil(dataset_size / expected)


def _ranks(loader: DataLoader) -> int:
    """How many ranks' batches make up one batch: those of a ``DistributedSampler``, or 1."""
    return loader.sampler.num_replicas if isinstance(loader.sampler, DistributedSampler) else 1


def refuse_repetition(loader: DataLoader) -> None:
    """See that a loader without Poisson sampling gives each record once a pass, as far as its sampler tells.

    Raises:
        ValueError: a record may be in a batch several times, each of which would be clipped by itself.
    """
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
    repeats = getattr(sampler, "replacement", False)
    if not isinstance(loader.dataset, IterableDataset):
        repeats = repeats or len(sampler) > len(loader.dataset)  # type: ignore[arg-type]
    if repeats:
        raise ValueError(
            f"the data loader's {type(sampler).__name__} may give a record several times, which then counts as often: "
            "sample without replacement, each record once, or leave poisson_sampling=True"
        )


class PoissonDataLoader(DataLoader):
    """A ``DataLoader`` whose batches are Poisson draws, otherwise as the one it is made from.

    Attributes:
        sample_rate: probability with which each record enters a draw.
        expected_batch_size: records that a draw is expected to have, a public number.
        mask: with a physical batch size, bool ``[physical_batch_size]`` of the batch that was yielded last: False
            where a row is padding.
        on_batch: with a physical batch size, called with ``(mask, first, last)`` before each batch is yielded; a draw
            begins with it, and ends with it.
    """

    sample_rate: float
    expected_batch_size: int
    mask: Tensor | None
    on_batch: Callable[[Tensor, bool, bool], None] | None

    @classmethod
    def from_data_loader(
        cls,
        loader: DataLoader,
        stream: Stream,
        *,
        batch_first: bool = True,
        dataset_size: int | None = None,
        physical_batch_size: int | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> PoissonDataLoader:
        """Replace the sampler of ``loader``; everything else is kept.

        Args:
            dataset_size: public number that stands for that of the records. The sampling rate then is the loader's
                ``batch_size / dataset_size``, a pass ``dataset_size / batch_size`` draws rounded up, and the expected
                batch size the loader's, whatever the data set holds. Without it the rate is one over the number of
                batches of the loader, as Opacus has it, and the number of records is thereby taken as public.
            physical_batch_size: rows of every batch that is yielded. A draw becomes one or more of them, the last one
                padded with zeros; ``on_batch`` tells the optimizer.
            share: ``(rank, ranks)`` where each rank draws from records of its own. Rate, expected batch size and number
                of draws are those of all ranks together, of which a loader with a ``DistributedSampler`` gives one
                rank's part.

        Raises:
            ValueError: an iterable data set, which has no records to draw from; a loader without a batch, or with
                a sampler that leaves records out; sizes below one.
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
        given = len(loader.sampler)  # type: ignore[arg-type]
        if _ranks(loader) == share[1] > 1:
            given = size
        if loader.batch_sampler is None or given != size:
            raise ValueError(
                f"the data loader does not give all {size} records of its data set, in batches, and Poisson "
                "sampling would draw from all of them: give it a torch.utils.data.Subset and a batch_size"
            )
        if not isinstance(loader.sampler, SequentialSampler | RandomSampler | DistributedSampler):
            warnings.warn(
                f"the data loader's {type(loader.sampler).__name__} is replaced by Poisson sampling, which draws every "
                "record with the same probability",
                stacklevel=2,
            )
        rate, steps, expected = 1 / len(loader), len(loader), size // len(loader)
        if dataset_size is not None:
            rate, steps = public_rate(loader, dataset_size)
            expected = round(rate * dataset_size)
        collate = wrap_collate_with_empty(collate_fn=loader.collate_fn, batch_first=batch_first)
        collate([loader.dataset[0]])  # it learns what a batch looks like, should the first draw be empty
        draws = PoissonSampler(stream, dataset_size=size, sample_rate=rate, steps=steps, share=share)
        draws.drawn_on_demand, draws.data = loader.num_workers == 0, loader.dataset
        sampler: Sampler[list[int]] = draws
        if physical_batch_size is not None:
            sampler = PhysicalBatchSampler(draws, physical_batch_size)
            collate = PaddedCollate(collate, physical_batch_size, 0 if batch_first else 1)
        private = cls(
            loader.dataset,
            batch_sampler=sampler,
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
        private.sample_rate, private.expected_batch_size = rate, expected
        private.mask = private.on_batch = private._pass = None
        return private

    @property
    def draws(self) -> PoissonSampler:
        """The sampler of draws."""
        sampler = self.batch_sampler
        return sampler.draws if isinstance(sampler, PhysicalBatchSampler) else sampler  # type: ignore[return-value]

    @property
    def is_padded(self) -> bool:
        """Whether batches have one fixed shape, with padding."""
        return isinstance(self.batch_sampler, PhysicalBatchSampler)

    def __iter__(self) -> Any:
        batches, sampler = super().__iter__(), self.batch_sampler  # which has begun a pass of the sampler
        self._pass = this = object()
        ahead = self.draws.ahead  # with workers, of this pass
        if isinstance(sampler, PhysicalBatchSampler):
            return self._padded_batches(batches, sampler.parts, ahead, sampler.physical_batch_size, this)
        return self._counted(batches, ahead)

    # Workers fetch ahead: what a batch consists of is told when it is yielded, not when it was drawn.

    def _counted(self, batches: Iterator[Any], ahead: deque[int]) -> Iterator[Any]:
        for batch in batches:
            if not self.draws.drawn_on_demand:
                self.draws.next_in_use(ahead.popleft())
            yield batch
        self.draws.in_use = None

    def _padded_batches(
        self, batches: Iterator[Any], parts: deque[Part], ahead: deque[int], rows: int, this: object
    ) -> Iterator[Any]:
        for batch in batches:
            if self._pass is not this:
                raise RuntimeError(
                    "another pass over the data loader has begun, and with it other draws: finish one pass before the "
                    "next, or use another loader"
                )
            part = parts.popleft()
            self.mask = torch.arange(rows) < part.records
            if self.on_batch is not None:
                self.on_batch(self.mask, part.first, part.last)
            if part.first and not self.draws.drawn_on_demand:
                self.draws.next_in_use(ahead.popleft())
            yield batch
        self.draws.in_use = None


class Part(NamedTuple):
    """Of a draw: how many records, and whether it begins and ends with them."""

    records: int
    first: bool
    last: bool


class PhysicalBatchSampler(Sampler[list[int]]):
    """Splits every draw into lists of at most ``physical_batch_size`` record indices; an empty draw is one empty list.

    Attributes:
        parts: of the pass begun last, what was given out and not yet used.
    """

    def __init__(self, draws: PoissonSampler, physical_batch_size: int) -> None:
        if physical_batch_size < 1:
            raise ValueError(f"physical_batch_size is {physical_batch_size}: it must be at least 1")
        self.draws = draws
        self.physical_batch_size = physical_batch_size
        self.parts: deque[Part] = deque()

    def __len__(self) -> int:
        return len(self.draws)

    def __iter__(self) -> Iterator[list[int]]:
        self.parts = deque()
        return self._split(self.parts)

    def _split(self, parts: deque[Part]) -> Iterator[list[int]]:
        for drawn in self.draws:
            starts = range(0, max(1, len(drawn)), self.physical_batch_size)
            for start in starts:
                indices = drawn[start : start + self.physical_batch_size]
                parts.append(Part(len(indices), start == 0, start == starts[-1]))
                yield indices


class PaddedCollate:
    """Collates records and fills the batch with zeros up to ``rows``, in every tensor that has a row a record."""

    def __init__(self, collate: Callable[[list], Any], rows: int, axis: int) -> None:
        self.collate = collate
        self.rows = rows
        self.axis = axis

    def __call__(self, records: list) -> Any:
        def padded(x: Any) -> Any:
            if not isinstance(x, Tensor) or x.dim() == 0:
                return x
            axis = min(self.axis, x.dim() - 1)
            if x.shape[axis] != len(records):
                return x
            missing = list(x.shape)
            missing[axis] = self.rows - len(records)
            return torch.cat([x, x.new_zeros(missing)], axis)

        return tree_map(padded, self.collate(records))
