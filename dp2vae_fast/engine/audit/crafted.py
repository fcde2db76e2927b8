"""Records that an audit makes up: some to exceed the bound of a contribution, some to be told apart."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def hostile_records(records: Sequence[Tensor]) -> list[Tensor]:
    """Records made to exceed a bound, field by field: huge, tiny, constant, saturated, not finite, duplicates."""
    made: list[list[Tensor]] = []
    for field in records:
        first = field[:1]
        if not field.is_floating_point():
            made.append([first] * 12)
            continue
        low, high = field.min(), field.max()
        signs = torch.randint(2, first.shape, generator=torch.Generator().manual_seed(1)).bool()
        broken = first.clone()
        broken.view(-1)[0] = math.nan
        made.append(
            [
                first,  # a duplicate of one that is in the batch
                first * 1e4,
                first * 1e15,
                first * 1e30,
                first * 1e-4,
                first * 1e-30,
                torch.zeros_like(first),
                torch.full_like(first, float(high)),
                torch.where(signs, low, high).to(first.dtype),
                first + 1e6,
                torch.full_like(first, math.inf),
                broken,
            ]
        )
    return [torch.cat(rows) for rows in made]


def extreme_records(records: Sequence[Tensor], number: int, generator: torch.Generator) -> list[Tensor]:
    """``number`` records, each value the largest or the smallest of its field on a coin; whole numbers are drawn from
    those that occur."""
    made = []
    for field in records:
        shape = (number, *field.shape[1:])
        if field.is_floating_point():
            finite = field[field.isfinite()]
            coins = torch.randint(2, shape, generator=generator).bool()
            made.append(torch.where(coins, finite.min(), finite.max()).to(field.dtype))
        else:
            made.append(field.flatten()[torch.randint(field.numel(), shape, generator=generator)])
    return made
