"""Per-sample gradients of one parameter, formed or not.

A layer rule says *what* the gradient of each record is; these classes know how to take its norm and its weighted sum.
:class:`Kept` holds ``[N, *shape]``; the others hold the two factors that a layer's backward pass already had at
hand, so that the gradient of a record need never exist.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from .. import ops
from .precision import PARTS_PER_BLOCK, RECORDS_PER_PART

# An addition of the pixel-Gram combine pass, in multiply-adds of a matrix product: it moves bytes where a product
# does arithmetic.
_COMBINE = 4
_ROWS = RECORDS_PER_PART * PARTS_PER_BLOCK


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

    def weighted_sum(self, factors: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """``sum_n factors[n] gradient[n]``, of the parameter's shape, in float32 or wider.

        ``dtype``: in which products over several positions are multiplied and added up; sums over records alone are
        formed in parts (:mod:`.precision`).
        """
        ...

    def in_float64(self, records: Tensor) -> Gradient:
        """The given records (indices) alone, with operands in float64."""
        ...

    def without(self, records: Tensor) -> Gradient:
        """The same with the given records (bool ``[N]``) set to exactly zero, whatever they held."""
        ...

    def fold(self, rows_per_record: int) -> Gradient:
        """Sum over consecutive rows: ``N * rows_per_record`` rows become N records."""
        ...

    def cost(self) -> Cost:
        """What the planner weighs: the sizes of this gradient."""
        ...


@dataclass(frozen=True)
class Cost:
    """What the two roads of one parameter cost: counts a record, for comparison with each other."""

    numbers: int  # elements of one record's gradient
    form: int  # multiply-adds to form it, which is also what its share of the weighted sum takes
    gram: int  # multiply-adds of its norm by Gram matrices
    positions: int = 1  # T, over which a product sums


def _zeroed(x: Tensor, records: Tensor) -> Tensor:
    return x.masked_fill(records.reshape(-1, *[1] * (x.dim() - 1)), 0)


def _scaled(x: Tensor, factors: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    x = ops.widen(x) if dtype is None else x.to(torch.promote_types(dtype, x.dtype))
    return x * factors.reshape(-1, *[1] * (x.dim() - 1))


def _in_parts(factors: Tensor, values: Tensor) -> Tensor:
    """``factors^T values`` for ``[N, P]`` and ``[N, D]``, in parts of few records; many parts are added in float64."""
    total: Tensor | None = None
    for left, right in zip(factors.split(_ROWS), values.split(_ROWS), strict=True):
        block: Tensor | None = None
        for few, same in zip(left.split(RECORDS_PER_PART), right.split(RECORDS_PER_PART), strict=True):
            part = few.T @ same
            block = part if block is None else block.add_(part)
        assert block is not None
        total = block if total is None else total.double().add_(block)
    assert total is not None
    return total


@dataclass(frozen=True)
class Kept:
    """Gradients that were formed: ``values [N, *shape]``."""

    values: Tensor

    @property
    def records(self) -> int:
        return self.values.shape[0]

    def norm_sq(self) -> tuple[Tensor, Tensor]:
        return ops.grad_sample_norm_sq(self.values)

    def grad_sample(self) -> Tensor:
        return ops.widen(self.values)

    def weighted_sum(self, factors: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        values = self.grad_sample()
        flat = values.reshape(self.records, math.prod(values.shape[1:]))
        return _in_parts(factors.to(values.dtype).unsqueeze(1), flat).reshape(values.shape[1:])

    def in_float64(self, records: Tensor) -> Kept:
        return Kept(self.values[records].double())

    def without(self, records: Tensor) -> Kept:
        return Kept(_zeroed(self.values, records))

    def fold(self, rows_per_record: int) -> Kept:
        return Kept(self.grad_sample().unflatten(0, (-1, rows_per_record)).sum(1))

    def cost(self) -> Cost:
        numbers = math.prod(self.values.shape[1:])
        return Cost(numbers, form=0, gram=numbers)


@dataclass(frozen=True)
class LinearProduct:
    """Weight gradient of a linear layer: activations ``[N, T, D]``, backprops ``[N, T, P]``."""

    activations: Tensor
    backprops: Tensor

    @property
    def records(self) -> int:
        return self.activations.shape[0]

    def norm_sq(self) -> tuple[Tensor, Tensor]:
        return ops.linear_norm_sq(self.activations, self.backprops)

    def grad_sample(self) -> Tensor:
        return ops.linear_grad_sample(self.activations, self.backprops)

    def weighted_sum(self, factors: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        one_position = self.activations.shape[1] == 1
        backprops = _scaled(self.backprops, factors, None if one_position else dtype).flatten(0, 1)
        activations = self.activations.flatten(0, 1).to(backprops.dtype)
        return _in_parts(backprops, activations) if one_position else backprops.T @ activations

    def in_float64(self, records: Tensor) -> LinearProduct:
        return LinearProduct(self.activations[records].double(), self.backprops[records].double())

    def without(self, records: Tensor) -> LinearProduct:
        return LinearProduct(_zeroed(self.activations, records), _zeroed(self.backprops, records))

    def fold(self, rows_per_record: int) -> LinearProduct:
        def joined(x: Tensor) -> Tensor:
            return x.unflatten(0, (-1, rows_per_record)).flatten(1, 2)

        return LinearProduct(joined(self.activations), joined(self.backprops))

    def cost(self) -> Cost:
        (_, t, d), p = self.activations.shape, self.backprops.shape[2]
        return Cost(d * p, form=t * d * p, gram=t * t * (d + p) if t > 1 else d + p, positions=t)


@dataclass(frozen=True)
class ConvGeometry:
    """Arguments of an n-dimensional (transposed) convolution, one int a spatial dimension."""

    weight_shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    groups: int
    transposed: bool


@dataclass(frozen=True)
class ConvProduct:
    """Weight gradient of a convolution: activations ``[N, C_in, *in]``, backprops ``[N, C_out, *out]``."""

    activations: Tensor
    backprops: Tensor
    geometry: ConvGeometry

    @property
    def records(self) -> int:
        return self.activations.shape[0]

    def _arguments(self) -> tuple[Tensor, Tensor, list[int], list[int], list[int], list[int], int, bool]:
        g = self.geometry
        lists = (list(g.weight_shape), list(g.stride), list(g.padding), list(g.dilation))
        return (self.activations, self.backprops, *lists, g.groups, g.transposed)

    def norm_sq(self) -> tuple[Tensor, Tensor]:
        return ops.conv_norm_sq(*self._arguments())

    def grad_sample(self) -> Tensor:
        return ops.conv_grad_sample(*self._arguments())

    def weighted_sum(self, factors: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        backprops, g = _scaled(self.backprops, factors, dtype), self.geometry
        if self.records == 0:
            return backprops.new_zeros(g.weight_shape)
        weight = backprops.new_empty(1).expand(g.weight_shape)  # only its shape is read
        _, gradient, _ = torch.ops.aten.convolution_backward(
            backprops,
            self.activations.to(backprops.dtype),
            weight,
            None,
            list(g.stride),
            list(g.padding),
            list(g.dilation),
            g.transposed,
            list(g.output_padding),
            g.groups,
            [False, True, False],
        )
        return gradient

    def in_float64(self, records: Tensor) -> ConvProduct:
        return replace(self, activations=self.activations[records].double(), backprops=self.backprops[records].double())

    def without(self, records: Tensor) -> ConvProduct:
        return replace(self, activations=_zeroed(self.activations, records), backprops=_zeroed(self.backprops, records))

    def fold(self, rows_per_record: int) -> Kept:
        return Kept(self.grad_sample()).fold(rows_per_record)

    def cost(self) -> Cost:
        g = self.geometry
        plain, spread = (self.activations, self.backprops) if g.transposed else (self.backprops, self.activations)
        positions, taps = math.prod(plain.shape[2:]), math.prod(g.weight_shape[2:])
        phases = math.prod(min(s, k) for s, k in zip(g.stride, g.weight_shape[2:], strict=True))
        numbers = math.prod(g.weight_shape)
        products = plain.shape[1] + phases * spread.shape[1] + _COMBINE * taps * g.groups
        return Cost(numbers, form=positions * numbers, gram=positions**2 * products, positions=positions)


@dataclass(frozen=True)
class EmbeddingProduct:
    """Gradient of an embedding table ``[V, D]``: indices ``[N, T]``, backprops ``[N, T, D]``; ``padding_idx < 0``:
    none."""

    indices: Tensor
    backprops: Tensor
    entries: int
    padding_idx: int

    @property
    def records(self) -> int:
        return self.indices.shape[0]

    def norm_sq(self) -> tuple[Tensor, Tensor]:
        return ops.embedding_norm_sq(self.indices, self.backprops, self.padding_idx)

    def grad_sample(self) -> Tensor:
        backprops = ops.widen(self.backprops)
        dense = backprops.new_zeros(self.records, self.entries, backprops.shape[2])
        kept = backprops.masked_fill((self.indices == self.padding_idx).unsqueeze(2), 0)
        return dense.scatter_add_(1, self.indices.unsqueeze(2).expand_as(backprops), kept)

    def weighted_sum(self, factors: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        backprops = _scaled(self.backprops, factors, dtype)
        return torch.ops.aten.embedding_dense_backward(backprops, self.indices, self.entries, self.padding_idx, False)

    def in_float64(self, records: Tensor) -> EmbeddingProduct:
        return replace(self, indices=self.indices[records], backprops=self.backprops[records].double())

    def without(self, records: Tensor) -> EmbeddingProduct:
        return replace(self, backprops=_zeroed(self.backprops, records))

    def fold(self, rows_per_record: int) -> EmbeddingProduct:
        def joined(x: Tensor) -> Tensor:
            return x.unflatten(0, (-1, rows_per_record)).flatten(1, 2)

        return replace(self, indices=joined(self.indices), backprops=joined(self.backprops))

    def cost(self) -> Cost:
        (_, t, d) = self.backprops.shape
        return Cost(self.entries * d, form=t * d, gram=t * t * d, positions=t)


def add(gradients: list[Gradient]) -> Gradient:
    """The gradient of a parameter that was used several times by the same records: the sum over its uses.

    Uses by linear layers simply have more positions; other kinds are formed and added.
    """
    first = gradients[0]
    if len(gradients) == 1:
        return first
    if all(isinstance(g, LinearProduct) for g in gradients):
        linear = [g for g in gradients if isinstance(g, LinearProduct)]
        return LinearProduct(torch.cat([g.activations for g in linear], 1), torch.cat([g.backprops for g in linear], 1))
    total = first.grad_sample()
    for other in gradients[1:]:
        total = total + other.grad_sample()
    return Kept(total)
