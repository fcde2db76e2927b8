"""Records that matter to each other where no gradient passes, seen by what a call of the model returns in further runs.

Others are changed: half of the records stay, and the other half become copies of them, far off where the model can be
expected to take any number; then the halves change places. Shapes and random numbers are those of before, so nothing
but others can move what a record gets: their largest or their mean (per-tensor quantisation), or a neighbour, with
dropout or without.

Others are gone: two records run alone. That shows what depends on how many there are (a division by the batch's size),
and is too coarse for most else, since other shapes round otherwise; nor can it be told where random numbers are drawn.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .repeat import KNOWN_BY, Call, CannotRepeat, Repeats, same_states

# How far outputs may move when others are changed, as a part of the largest. Equal shapes make equal kernels; sums in
# another order, and rows that a model sorts or picks, are a few roundings apart. And how far off these others are.
_UNMOVED = {torch.float64: 1e-12, torch.float32: 1e-5}
_BARELY_MOVED = 1e-2  # of other types, autocast included
_FAR = 1e4
_SPLITS = 4  # into halves, of a call with random numbers, all of which must show it
# How far outputs of records alone may be from those in the batch: a part of what tells records apart and one of the
# whole, for products of other shapes round otherwise (as TF32 and the plain ones do), and deep models carry that on.
# Half of what statistics of a batch are is gone with all but two records.
_ALONE = {torch.float64: (1e-6, 1e-9), torch.float32: (1e-2, 1e-3)}
_COARSE = (0.1, 1e-2)


class _Batch(NamedTuple):
    """Where tensors of a call have their records."""

    axis: int
    records: int
    rows_per_record: int

    def has_rows(self, shape: torch.Size) -> bool:
        """Whether there are rows of all records."""
        return len(shape) > self.axis and shape[self.axis] in (self.records, self.records * self.rows_per_record)

    def pick(self, which: Tensor, x: Tensor, rows: int) -> Tensor:
        """The rows of the records ``which``, of a tensor that has ``rows`` of all records, or the first of them."""
        each = rows // self.records
        place = (which[:, None] * each + torch.arange(each)).flatten()
        return x.detach().index_select(self.axis, place.to(x.device))

    def arrange(self, which: Tensor, far: Tensor | None, x: object) -> object:
        """Of an input that has rows, those of the records ``which``; where these are marked, ``far`` off."""
        if not isinstance(x, Tensor) or not self.has_rows(x.shape):
            return x
        rows = self.pick(which, x, x.shape[self.axis])
        if far is not None and _may_be_far(x):
            marks = far.repeat_interleave(x.shape[self.axis] // self.records).to(x.device)
            marks = marks.reshape(-1, *[1] * (x.dim() - self.axis - 1))
            rows = (_FAR * rows).where(marks & (rows != rows.round()), rows)
        return rows.requires_grad_(x.requires_grad)


def what_mixes(repeats: Repeats, call: Call, records: int, rows_per_record: int) -> str:
    """What the model returns where records matter to each other; empty where they do not, or nobody can tell.

    Args:
        call: was run again, for its gradients.
    """
    batch = _Batch(repeats.axis, records, rows_per_record)
    with torch.random.fork_rng([d for d in call.random if d.type != "cpu"]):
        if _others_matter(repeats, call, batch):
            return "something else for the same record when others in the batch are changed"
        if _size_matters(repeats, call, batch):
            return "something else for two records alone than for the same two in the batch"
    return ""


def _others_matter(repeats: Repeats, call: Call, batch: _Batch) -> bool:
    """Whether records get other outputs than in the second run, when others are changed."""
    if batch.records < 2 or not call.again:
        return False
    for _ in range(_SPLITS if call.draws else 1):
        halves = torch.randperm(batch.records, generator=repeats.choice).chunk(2)
        moved = False
        for kept, others in (halves, halves[::-1]):
            outputs = _run_with_others(repeats, call, batch, kept, others)
            if outputs is not None and not same_states(call.drawn, repeats.drawn):
                return False  # so many random numbers as values ask for (rejection), which others' then come after
            moved |= outputs is not None and _moved(call, batch, kept, outputs)
        if not moved:
            return False
    return True


def _run_with_others(repeats: Repeats, call: Call, batch: _Batch, kept: Tensor, others: Tensor) -> list[Tensor] | None:
    """What a run returns in which ``others`` have become copies of records that are ``kept``."""
    which, far = torch.arange(batch.records), torch.zeros(batch.records, dtype=torch.bool)
    which[others] = kept[torch.arange(len(others)) % len(kept)]
    far[others] = True
    for marks in (far, None):  # what cannot take the one may take the other
        try:
            return repeats.run(call, tree_map(partial(batch.arrange, which, marks), (call.args, call.kwargs)))
        except CannotRepeat:
            pass
    return None


def _moved(call: Call, batch: _Batch, kept: Tensor, outputs: list[Tensor]) -> bool:
    """Whether a run returned something else for records whose inputs were ``kept`` than the second run did."""
    for x, before in zip(outputs, call.again, strict=True):
        if x.shape != before.shape or not batch.has_rows(x.shape) or x.is_complex():
            continue
        a, b = (batch.pick(kept, y, x.shape[batch.axis]).double() for y in (x, before))
        share = _BARELY_MOVED if _is_coarse(call) else _UNMOVED[before.dtype]
        size = float(b.nan_to_num(0, 0, 0).abs().max()) if b.numel() else 0.0
        if not torch.allclose(a, b, 0, share * size, equal_nan=True):
            return True
    return False


def _size_matters(repeats: Repeats, call: Call, batch: _Batch) -> bool:
    """Whether records get other outputs two at a time than they got among all of the call."""
    known = min(batch.records, KNOWN_BY // batch.rows_per_record)
    many = min(2, known // 2)
    if call.draws or many * batch.rows_per_record < 2:  # a single row would fit whatever it is added to
        return False
    chosen = torch.randperm(known, generator=repeats.choice)
    parts = [chosen[:many].sort().values, chosen[many : 2 * many].sort().values]
    try:
        runs = [
            repeats.run(call, tree_map(partial(batch.arrange, part, None), (call.args, call.kwargs))) for part in parts
        ]
    except CannotRepeat:
        return False
    for alone, before, shape in zip(zip(*runs, strict=True), call.outputs, call.shapes, strict=True):
        if not batch.has_rows(shape) or before.is_complex():
            continue
        together = [batch.pick(part, before, shape[batch.axis]) for part in parts]
        if all(a.shape == b.shape for a, b in zip(alone, together, strict=True)):
            share, floor = _COARSE if _is_coarse(call) else _ALONE[before.dtype]
            a, b = (
                torch.cat([x.detach().nan_to_num(0, 0, 0).double() for x in xs], batch.axis) for xs in (alone, together)
            )
            between = b - b.mean(batch.axis, keepdim=True)
            if float((a - b).norm()) > share * float(between.norm()) + floor * float(b.norm()):
                return True
    return False


def _is_coarse(call: Call) -> bool:
    return bool(call.autocast) or any(x.dtype not in _ALONE for x in (*call.outputs, *call.trainable))


def _may_be_far(x: Tensor) -> bool:
    """Whether ``x`` is in no range that a model may rely on, as probabilities are, or what it makes indices of. (Whole
    numbers among its entries stay where they are all the same: they may be categories.)"""
    return x.is_floating_point() and bool(((x < 0) & (x != x.round())).any())
