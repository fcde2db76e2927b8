"""Per-sample gradients that need not be formed: the two factors of linear layers, convolutions and embeddings."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ... import ops
from ...ops.gradient import RECORDS_PER_PART
from .cost import Cost, Method
from .gradient import Gradient, Kept, random_like, rounded_down

if TYPE_CHECKING:
    from typing_extensions import Self

# An addition of the pixel-Gram combine pass, in multiply-adds of a Gram matrix with both halves counted: it moves bytes
# where a matrix product does arithmetic.
_COMBINE = 9


def _bytes(x: Tensor) -> int:
    """Of one record."""
    return x.shape[1:].numel() * x.element_size()


def _describe(x: Tensor) -> str:
    return f"{list(x.shape[1:])} {ops.memory_order(x[:1])} {x.dtype}"


def _joined(x: Tensor, rows_per_record: int) -> Tensor:
    """The positions of consecutive rows, as those of one record."""
    return x.unflatten(0, (-1, rows_per_record)).flatten(1, 2)


def _zeroed(factors: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
    """``operands`` with records of factor zero set to zero; on a CPU without a copy where there are none (a GPU would
    have to be waited for)."""
    if not factors.is_cuda and bool(factors.all()):
        return operands
    return tuple(ops.masked(x, factors) for x in operands)


def _scaled(x: Tensor, factors: Tensor) -> Tensor:
    return ops.widen(x) * factors.reshape(-1, *[1] * (x.dim() - 1))


class Product:
    """A :class:`~.gradient.Gradient` that need not be formed: :mod:`.plan` chooses in which of several ways."""

    backprops: Tensor

    @property
    def records(self) -> int:
        return self.backprops.shape[0]

    @property
    def formed(self) -> bool:
        return False

    @property
    def device(self) -> torch.device:
        return self.backprops.device

    def norm_sq(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def kept(self) -> Kept:
        raise NotImplementedError

    def grad_sample(self) -> Tensor:
        return self.kept().values

    def weighted_sum(self, factors: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        raise NotImplementedError

    def in_float64(self, records: Tensor) -> Product:
        raise NotImplementedError

    def fold(self, rows_per_record: int) -> Gradient:
        raise NotImplementedError

    def ways(self) -> tuple[Method, ...]:
        """Of taking norm and weighted sum: those of :mod:`.plan` that this kind of gradient has."""
        raise NotImplementedError

    def directly(self) -> Product:
        """The same, with norms taken by forming each gradient and forgetting it, where that is one of the ways."""
        raise NotImplementedError

    @cached_property
    def cost(self) -> Cost:
        """What the planner weighs: the sizes of this gradient."""
        raise NotImplementedError

    def describe(self) -> str:
        """Everything but the numbers of one record, for telling shapes apart."""
        raise NotImplementedError

    def like(self, records: int) -> Product:
        """One of random numbers, of the same shape."""
        raise NotImplementedError


@dataclass(frozen=True)
class _Pair(Product):
    """What linear layers and convolutions share. ``direct``: as :meth:`directly` says."""

    activations: Tensor
    backprops: Tensor
    direct: bool = field(default=False, kw_only=True)

    @property
    def formed(self) -> bool:
        return self.direct

    def directly(self) -> Self:
        return replace(self, direct=True)


@dataclass(frozen=True)
class LinearProduct(_Pair):
    """Weight gradient of a linear layer: activations ``[N, T, D]``, backprops ``[N, T, P]``."""

    def norm_sq(self) -> tuple[Tensor, Tensor]:
        norm_sq = ops.linear_direct_norm_sq if self.direct else ops.linear_norm_sq
        return norm_sq(self.activations, self.backprops)

    def kept(self) -> Kept:
        values, *norms = ops.linear_kept(self.activations, self.backprops)
        return Kept(values, (norms[0], norms[1]))

    def weighted_sum(self, factors: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        factors = rounded_down(factors, self.activations, self.backprops)
        one_position = self.activations.shape[1] == 1
        # With one position, a single part of a sum over records is a single product of the vendor library's.
        own = self.records > RECORDS_PER_PART if one_position else dtype == torch.float64
        if own:
            weighted_sum = ops.outer_weighted_sum if one_position else ops.linear_weighted_sum
            return weighted_sum(self.activations, self.backprops, factors)
        operands = [x.to(factors.dtype) for x in _zeroed(factors, self.activations, self.backprops)]
        narrow = int(operands[1].shape[2] < operands[0].shape[2])
        operands[narrow] = _scaled(operands[narrow], factors)
        activations, backprops = (x.flatten(0, 1) for x in operands)
        return backprops.T @ activations

    def in_float64(self, records: Tensor) -> LinearProduct:
        return LinearProduct(self.activations[records].double(), self.backprops[records].double())

    def fold(self, rows_per_record: int) -> LinearProduct:
        return LinearProduct(_joined(self.activations, rows_per_record), _joined(self.backprops, rows_per_record))

    def ways(self) -> tuple[Method, ...]:
        return ("gram", "direct", "kept") if self.activations.shape[1] > 1 else ("gram", "kept")

    @cached_property
    def cost(self) -> Cost:
        (_, t, d), p = self.activations.shape, self.backprops.shape[2]
        return Cost(t, d, p, t * t * (d + p) if t > 1 else d + p, _bytes(self.activations), _bytes(self.backprops))

    def describe(self) -> str:
        return f"linear {_describe(self.activations)} {_describe(self.backprops)}"

    def like(self, records: int) -> LinearProduct:
        return LinearProduct(random_like(self.activations, records), random_like(self.backprops, records))


@dataclass(frozen=True)
class ConvGeometry:
    """Arguments of an n-dimensional (transposed) convolution, one int a spatial dimension."""

    weight_shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool

    def arguments(self) -> tuple[list[int], list[int], list[int], list[int], int, bool]:
        """As the ops take them."""
        lists = (list(self.weight_shape), list(self.stride), list(self.padding), list(self.dilation))
        return (*lists, self.groups, self.transposed)


@dataclass(frozen=True)
class ConvProduct(_Pair):
    """Weight gradient of a convolution: activations ``[N, C_in, *in]``, backprops ``[N, C_out, *out]``."""

    geometry: ConvGeometry

    def norm_sq(self) -> tuple[Tensor, Tensor]:
        norm_sq = ops.conv_direct_norm_sq if self.direct else ops.conv_norm_sq
        return norm_sq(self.activations, self.backprops, *self.geometry.arguments())

    def kept(self) -> Kept:
        values, *norms = ops.conv_kept(self.activations, self.backprops, *self.geometry.arguments())
        return Kept(values, (norms[0], norms[1]))

    def weighted_sum(self, factors: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        how = self.geometry.arguments()
        if dtype == torch.float64:
            factors = rounded_down(factors, self.activations, self.backprops)
            return ops.conv_weighted_sum(self.activations, self.backprops, factors, *how)
        activations, backprops = _zeroed(factors, self.activations, self.backprops)
        backprops = _scaled(backprops, factors)
        return ops.conv_weight_gradient(activations.to(backprops.dtype), backprops, *how)

    def in_float64(self, records: Tensor) -> ConvProduct:
        return replace(self, activations=self.activations[records].double(), backprops=self.backprops[records].double())

    def fold(self, rows_per_record: int) -> Kept:
        return self.kept().fold(rows_per_record)

    def ways(self) -> tuple[Method, ...]:
        return ("gram", "direct", "kept")

    @cached_property
    def cost(self) -> Cost:
        g = self.geometry
        plain, spread = (self.activations, self.backprops) if g.transposed else (self.backprops, self.activations)
        positions, taps = math.prod(plain.shape[2:]), math.prod(g.weight_shape[2:])
        phases = math.prod(min(s, k) for s, k in zip(g.stride, g.weight_shape[2:], strict=True))
        gram = positions**2 * (plain.shape[1] + phases * spread.shape[1] + _COMBINE * taps * g.groups)
        sizes = (_bytes(self.activations), _bytes(self.backprops))
        return Cost(positions, g.weight_shape[1] * taps, g.weight_shape[0], gram, *sizes)

    def describe(self) -> str:
        return f"{self.geometry} {_describe(self.activations)} {_describe(self.backprops)}"

    def like(self, records: int) -> ConvProduct:
        pair = random_like(self.activations, records), random_like(self.backprops, records)
        return ConvProduct(*pair, self.geometry)


@dataclass(frozen=True)
class EmbeddingProduct(Product):
    """Gradient of an embedding table ``[V, D]``: indices ``[N, T]``, backprops ``[N, T, D]``; ``padding_idx < 0``:
    none."""

    indices: Tensor
    backprops: Tensor
    entries: int
    padding_idx: int

    def norm_sq(self) -> tuple[Tensor, Tensor]:
        return ops.embedding_norm_sq(self.indices, self.backprops, self.padding_idx)

    def kept(self) -> Kept:
        return Kept(self.grad_sample())

    def grad_sample(self) -> Tensor:
        backprops = ops.widen(self.backprops)
        dense = backprops.new_zeros(self.records, self.entries, backprops.shape[2])
        kept = backprops.masked_fill((self.indices == self.padding_idx).unsqueeze(2), 0)
        return dense.scatter_add_(1, self.indices.unsqueeze(2).expand_as(backprops), kept)

    def weighted_sum(self, factors: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        (backprops,) = _zeroed(factors, self.backprops)
        backprops = _scaled(backprops, factors).to(torch.promote_types(dtype, backprops.dtype))
        # Of one position there is nothing that may cancel.
        records = RECORDS_PER_PART if self.indices.shape[1] > 1 else max(1, self.records)
        parts = zip(backprops.split(records), self.indices.split(records), strict=True)
        total = torch.ops.aten.embedding_dense_backward
        return reduce(torch.add, (total(b, i, self.entries, self.padding_idx, False) for b, i in parts))

    def in_float64(self, records: Tensor) -> EmbeddingProduct:
        return replace(self, indices=self.indices[records], backprops=self.backprops[records].double())

    def fold(self, rows_per_record: int) -> EmbeddingProduct:
        return replace(
            self, indices=_joined(self.indices, rows_per_record), backprops=_joined(self.backprops, rows_per_record)
        )

    def ways(self) -> tuple[Method, ...]:
        return ("gram", "kept")

    @cached_property
    def cost(self) -> Cost:
        (_, t, d) = self.backprops.shape
        return Cost(t, self.entries, d, t * t * d, _bytes(self.indices), _bytes(self.backprops))

    def describe(self) -> str:
        return f"embedding {self.entries} {_describe(self.backprops)}"

    def like(self, records: int) -> EmbeddingProduct:
        indices = torch.randint(self.entries, (records, *self.indices.shape[1:]), device=self.device)
        return replace(self, indices=indices, backprops=random_like(self.backprops, records))


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
