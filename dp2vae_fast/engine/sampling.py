"""Poisson sampling: every record enters every batch with the same public probability, on its own coin.

A draw has a random size. For a loop over tensors it becomes physical batches of one fixed shape with a mask
(:class:`PoissonBatches`); for a user's ``DataLoader``, see :mod:`.loader`. A draw is never truncated and never
skipped: an empty one is an empty batch, or one that is all padding.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

import torch
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch import Tensor

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
        return self.split(self.stream.poisson(self.dataset_size, self.sample_rate))

    def split(self, drawn: Tensor) -> list[PhysicalBatch]:
        """The physical batches of one draw, at least one: ``drawn`` are the indices of its records."""
        size = self.physical_batch_size
        rows = max(1, math.ceil(len(drawn) / size)) * size
        indices = torch.zeros(rows, dtype=torch.int64)
        indices[: len(drawn)] = drawn
        mask = torch.arange(rows) < len(drawn)
        return [
            PhysicalBatch(indices[i : i + size], mask[i : i + size], last=i + size == rows)
            for i in range(0, rows, size)
        ]


class PoissonSampler(UniformWithReplacementSampler):
    """Batch sampler: ``steps`` Poisson draws an epoch, each a list of record indices, possibly empty.

    Of Opacus' kind, for which its ``BatchMemoryManager`` knows how many physical batches to expect.

    Args:
        stream, dataset_size, sample_rate: as :class:`PoissonBatches`.
        steps: draws of one pass over the sampler.
        share: ``(rank, ranks)``: only every ``ranks``-th record, from ``rank`` on, is this sampler's to draw.

    Attributes:
        number: of this sampler alone.
        begin_pass: called at the start of a pass; true if it cut another one short, whose draws must then end.
        in_use: number and size of the draw whose records the user has been given last; None where nobody says.
        drawn_on_demand: draws are made when they are asked for, not ahead.
        ahead: of the pass begun last, the sizes of draws that were made ahead and not used yet.
        data: the data set whose records these are; the sampler itself unless somebody says.
    """

    _numbers = count()  # unlike an id, none comes again when a sampler is gone
    begin_pass: Callable[[], bool] | None = None
    in_use: tuple[int, int] | None = None
    drawn_on_demand: bool = False

    def __init__(
        self, stream: Stream, *, dataset_size: int, sample_rate: float, steps: int, share: tuple[int, int] = (0, 1)
    ) -> None:
        self.number = next(self._numbers)
        self.data: object = self
        self.stream = stream
        self.share = share
        self.num_samples = len(range(share[0], dataset_size, share[1]))
        self.sample_rate = sample_rate
        self.steps = steps
        self.ahead: deque[int] = deque()
        self._cut_short = 0
        self._used = self._begun = self._stepped = 0  # draws; before this pass; the latest that had a step
        self._left_out = False  # one of this pass, after others, had none

    def next_in_use(self, size: int) -> None:
        """The user is given the records of another draw, this many."""
        self._left_out |= self._begun < self._stepped < self._used
        self._used += 1
        self.in_use = self._used, size

    def step_counted(self) -> None:
        """There is a step on the draw in use.

        Raises:
            ValueError: on a draw of this pass before it, and after others, there was none.
        """
        self._stepped = self._used
        if self._left_out:
            self._left_out = False
            raise ValueError(
                "a batch before this one had no step, which tells of its records where they decide on that (an "
                "empty one, a loss that is not finite): call step() on every batch, without backward() on an empty one"
            )

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        if self.begin_pass is not None and self.begin_pass():
            self._cut_short += 1
        passes, self.in_use = self._cut_short, None
        self._begun, self._left_out = self._used, False
        ahead = self.ahead = deque()
        for _ in range(self.steps):
            if passes != self._cut_short:
                raise RuntimeError(
                    "another pass over the data loader began while a draw of this one was in several physical batches: "
                    "its rest cannot be told from the next draw. Finish one pass before the next, or use another loader"
                )
            drawn = self.stream.poisson(self.num_samples, self.sample_rate)
            if self.drawn_on_demand:
                self.next_in_use(len(drawn))
            else:
                ahead.append(len(drawn))
            yield (drawn * self.share[1] + self.share[0]).tolist()
