"""What the pending sum of an optimizer comes from: under Poisson sampling one draw, and each of its records once."""

from __future__ import annotations

from .capture.book import Origin


class Pending:
    """Where the gradients since the last step come from, and of how many records they are.

    Attributes:
        origins: batches and draws.
        batches: physical ones that were added up.
        records: of all of them.
        one_draw_at_a_time: every batch is of the draw that a loader was asked for last.
    """

    def __init__(self) -> None:
        self.origins: set[Origin] = set()
        self.batches = self.records = 0
        self.one_draw_at_a_time = False

    def add(self, origins: set[Origin], records: int) -> None:
        """A batch of ``records`` records comes to what is pending."""
        self.origins |= origins
        self.batches, self.records = self.batches + 1, self.records + records

    def clear(self) -> None:
        """There was a step, or the sum is forgotten."""
        self.origins, self.batches, self.records = set(), 0, 0

    def check(self) -> None:
        """Not more than one draw, nor more of it than there is.

        Raises:
            ValueError: a record could be in the sum twice, or in one that is counted as a draw that it is not of.
        """
        draws = self._draws()
        if self.one_draw_at_a_time and not draws:
            raise ValueError(
                "this batch is of no draw in use: the pass over the data loader that make_private returned was over "
                "when the model saw it, or it is from elsewhere. Use each batch before the next is fetched"
            )
        if len({sampler for _, sampler, *_ in draws}) < len(draws):
            raise ValueError(
                "records of two Poisson draws in one step, of which one record could be in both: call step() on each "
                "batch before the next is used"
            )
        if len(draws) == 1 and (size := draws[0][3]) is not None and self.records > size:
            raise ValueError(
                f"{self.records} gradients in one step on a draw of {size} records, which would count several times, "
                "or are not of records: give the model all rows of a record at once (rows_per_record)"
            )

    def check_whole(self) -> None:
        """Of a draw that was not in parts, gradients of all its records came.

        Raises:
            ValueError: of fewer: several records were taken for one, or rows for records.
        """
        draws = self._draws()
        if len(draws) == 1 and (size := draws[0][3]) is not None and 0 < self.records < size:
            raise ValueError(
                f"{self.records} gradients in a step on a draw of {size} records, several of which would count as one "
                "(a batch in parts, one backward pass; rows that are no records): call the model once on all records, "
                "and leave one out by a loss of zero"
            )

    def _draws(self) -> list[Origin]:
        return [o for o in self.origins if o[0] == "draw"]
