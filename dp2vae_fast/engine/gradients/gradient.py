"""Per-sample gradients of one parameter: what they can be asked, and those that were formed.

A layer rule says *what* the gradient of each record is; these classes know how to take its norm and its weighted sum.
:class:`Kept` holds ``[N, *shape]``; :mod:`.products` hold the two factors that a layer's backward pass already had at
hand, so that the gradient of a record need never exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ... import ops


class Gradient(Protocol):
    """The gradients of N records with respect to one parameter."""

    @property
    def records(self) -> int:
        """Number of records N."""
        ...

    def norm_sq(self) -> tuple[Tensor, Tensor]:
        """Squared norms ``[N]`` and a bound ``[N]`` of their error."""
        ...

    def grad_sample(self) -> Tensor:
        """The gradients themselves, ``[N, *parameter shape]``, in float32 or wider."""
        ...

    def kept(self) -> Kept:
        """Formed and kept, with their norms."""
        ...

    def weighted_sum(self, factors: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """``sum_n factors[n] gradient[n]``, of the parameter's shape, in float32 or wider.

        Records of factor zero contribute exactly zero, whatever they hold. ``dtype``: float64 for sums whose rounding
        :mod:`.precision` bounds; float32 leaves products over several positions to the vendor library.
        """
        ...

    def in_float64(self, records: Tensor) -> Gradient:
        """The given records (indices) alone, with operands in float64."""
        ...

    def fold(self, rows_per_record: int) -> Gradient:
        """Sum over consecutive rows: ``N * rows_per_record`` rows become N records."""
        ...

    @property
    def formed(self) -> bool:
        """Whether norms are those of the gradients as they are added up, not of exact ones."""
        ...

    @property
    def device(self) -> torch.device: ...


def random_like(x: Tensor, records: int) -> Tensor:
    """``records`` rows of random numbers, lying in memory as those of ``x`` do."""
    order = ops.memory_order(x[0])
    lying = torch.randn(records, *(x.shape[1 + d] for d in order), dtype=torch.float32, device=x.device).to(x.dtype)
    return lying.permute(0, *(1 + order.index(d) for d in range(x.dim() - 1)))


def rounded_down(factors: Tensor, *operands: Tensor) -> Tensor:
    """``factors`` in the precision of sums of these operands: a record's bound outlives the rounding."""
    dtype = ops.result_dtype(*operands)
    if factors.dtype == dtype:
        return factors
    near = factors.to(dtype)
    return torch.where(near > factors, torch.nextafter(near, torch.zeros_like(near)), near)


@dataclass(frozen=True)
class Kept:
    """Gradients that were formed: ``values [N, *shape]``, and their ``norms`` where whoever formed them took them."""

    values: Tensor
    norms: tuple[Tensor, Tensor] | None = None

    @property
    def records(self) -> int:
        return self.values.shape[0]

    def norm_sq(self) -> tuple[Tensor, Tensor]:
        return self.norms or ops.grad_sample_norm_sq(self.values)

    def kept(self) -> Kept:
        return self

    def grad_sample(self) -> Tensor:
        return ops.widen(self.values)

    def weighted_sum(self, factors: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        values, factors = self.grad_sample(), rounded_down(factors, self.values)
        if values.is_contiguous():
            if values.dim() == 2:
                return ops.kept_weighted_sum(values, factors)
            flat = values.reshape(self.records, values.shape[1:].numel())
            return ops.kept_weighted_sum(flat, factors).view(values.shape[1:])
        like = values[0]
        order = ops.memory_order(like)  # convolutions keep channels last
        flat = values.permute(0, *(1 + d for d in order)).reshape(self.records, like.numel())
        total = ops.kept_weighted_sum(flat, factors).reshape([like.shape[d] for d in order])
        return total.permute([order.index(d) for d in range(like.dim())])

    def in_float64(self, records: Tensor) -> Kept:
        return Kept(self.values[records].double())

    def fold(self, rows_per_record: int) -> Kept:
        return Kept(self.grad_sample().unflatten(0, (-1, rows_per_record)).sum(1))

    @property
    def formed(self) -> bool:
        return True

    @property
    def device(self) -> torch.device:
        return self.values.device
