"""What the pending sum of an optimizer comes from: under Poisson sampling one draw, and each of its records once."""

from __future__ import annotations

from collections.abc import Callable

from .capture.book import Origin
from .sampling import PoissonSampler

_TWO_LOADERS = (
    "records of two data loaders over one data set in one step, of which one record could be in both: call step() on "
    "each batch, and draw from one loader"
)


class Pending:
    """Where the gradients since the last step come from, and of how many records they are.

    Attributes:
        origins: batches and draws.
        batches: physical ones that were added up.
        records: of all of them.
        one_draw_at_a_time: every batch is of the draw that a loader was asked for last.
        data_of: tells the data sets of samplers apart, by the samplers' numbers.
        sampler: of the optimizer's own loader, where it has one.
    """

    def __init__(self) -> None:
        self.origins: set[Origin] = set()
        self.batches = self.records = 0
        self.one_draw_at_a_time = False
        self.data_of: Callable[[int], int] = int
        self.sampler: PoissonSampler | None = None

    def add(self, origins: set[Origin], records: int) -> None:
        """A batch of ``records`` records comes to what is pending."""
        self.origins |= origins
        self.batches, self.records = self.batches + 1, self.records + records

    def clear(self) -> None:
        """There was a step, or the sum is forgotten."""
        self.origins, self.batches, self.records = set(), 0, 0

    def check(self, *, signalled: bool) -> None:
        """Not more than one draw, nor more of it than there is.

        Args:
            signalled: a memory manager has told of the batch. Where its workers fetch ahead no draw is in use.

        Raises:
            ValueError: a record could be in the sum twice, or in one that is counted as a draw that it is not of.
        """
        draws = self._draws()
        if self.one_draw_at_a_time and not draws and not signalled:
            raise ValueError(
                "this batch is of no draw in use: the pass over the data loader that make_private returned was over "
                "when the model saw it, or it is from elsewhere. Use each batch before the next is fetched"
            )
        if len({sampler for _, sampler, *_ in draws}) < len(draws):
            raise ValueError(
                "records of two Poisson draws in one step, of which one record could be in both: call step() on each "
                "batch before the next is used"
            )
        sizes = self._sizes()
        if draws and self.records > (most := sum(map(max, sizes))):
            if len(sizes) < len(draws):  # of one data set: a batch is of one of them
                raise ValueError(_TWO_LOADERS)
            self._refuse_more_than(most)

    def check_drawn_ahead(self) -> None:
        """The same of a draw that is known by its size alone, as under a memory manager whose workers fetch ahead: a
        signal has told that it ends.

        Raises:
            ValueError: as in :meth:`check`.
        """
        if self.sampler is not None and self.sampler.in_use is None and self.sampler.ahead:
            most = self.sampler.ahead.popleft()
            if self.records > most:
                self._refuse_more_than(most)

    def _refuse_more_than(self, most: int) -> None:
        raise ValueError(
            f"{self.records} gradients in one step on a draw of {most} records, which would count several times, "
            "or are not of records: give the model all rows of a record at once (rows_per_record), and each batch "
            "before the next is fetched"
        )

    def check_whole(self) -> None:
        """Of draws that were not in parts, gradients of all their records came.

        Raises:
            ValueError: of fewer: several records were taken for one, or rows for records.
        """
        totals, sizes = {0}, self._sizes()
        if not sizes:
            return
        for of_data in sizes:
            totals |= {total + size for total in totals for size in of_data}
        if self.records not in totals:
            raise ValueError(
                f"{self.records} gradients in a step on a draw of {max(totals)} records, several of which would count "
                "as one (a batch in parts, one backward pass; rows that are no records): call the model once on all "
                "records, and leave one out by a loss of zero"
            )

    def _sizes(self) -> list[list[int]]:
        """Of the draws over each data set."""
        draws = self._draws()
        if len(draws) < 2:
            return [[size or 0] for *_, size in draws]
        sizes: dict[int, list[int]] = {}
        for _, sampler, _, size in draws:
            sizes.setdefault(self.data_of(sampler), []).append(size or 0)
        return list(sizes.values())

    def _draws(self) -> list[Origin]:
        return [o for o in self.origins if o[0] == "draw"]
