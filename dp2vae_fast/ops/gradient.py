"""Per-sample weight gradients that are formed: kept, squared and forgotten, or added up with a weight a record.

A layer that uses its weight at T positions has, for record n, the weight gradient ``G[n] = sum_t backprops[n, t] outer
activations[n, t]``. ``*_kept`` returns ``G`` with its norms, ``*_direct_norm_sq`` its norms alone, ``*_weighted_sum``
``sum_n factors[n] G[n]``.

Guarantee, of all three: record n has a part that depends on that record alone. The C++ kernels form it in float32, bit
for bit the same in all three ops, so that a direct norm is that of what is added up afterwards. The Triton kernels of
sums form it in float32 too, by an order of their own, which the ``error`` of direct norms counts. The references of
direct norms and weighted sums multiply and add in float64; there ``error`` counts float32's roundings all the same,
which bounds the lengths of terms that cancel (:func:`~..engine.precision.sum_rounding`). Each term of a product passes
through :func:`~.norm.product_depth` roundings at most. The parts of up to 2,048 records are added up such that none
passes through more than 144 additions of float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _fit
from ._op import op
from .norm import _gamma, conv_roles, grad_sample_norm_sq, native_convolution, native_product, product_depth

# A sum over many records is formed in parts, and blocks of parts, so that no term passes through many additions.
RECORDS_PER_PART, PARTS_PER_BLOCK = 128, 16


def masked(x: Tensor, factors: Tensor) -> Tensor:
    """Zero where the factor is, whatever the record holds: 0 * inf is NaN."""
    return x.masked_fill((factors == 0).reshape(-1, *[1] * (x.dim() - 1)), 0)


def _sum_of_products(
    product: Callable[[Tensor, Tensor], Tensor], activations: Tensor, backprops: Tensor, factors: Tensor
) -> Tensor:
    """``product``, a sum over records, of operands in float64, in parts: the terms of a record, which may be long and
    cancel, are added up with those of few others."""

    def of_a_part(a: Tensor, b: Tensor, f: Tensor) -> Tensor:
        scaled = masked(b, f).double() * f.double().reshape(-1, *[1] * (b.dim() - 1))
        return product(masked(a, f).double(), scaled)

    parts = map(of_a_part, *(x.split(RECORDS_PER_PART) for x in (activations, backprops, factors)))
    return functools.reduce(torch.add, parts).to(result_dtype(activations, backprops))


def _direct_norms(values: Tensor, reach: Tensor, positions: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Norms of float64 products ``values``, of terms whose lengths add up to ``sqrt(reach)`` in every record."""
    exact, exact_error = grad_sample_norm_sq.reference(values)
    norm_sq = exact.to(dtype)
    depth = positions if values.device.type == "cpu" else max(positions, product_depth(positions, values.device))
    error = _gamma(2 * depth + 2, norm_sq) * (exact + reach) + exact_error + torch.finfo(dtype).tiny
    return norm_sq, error.to(dtype)


def result_dtype(*operands: Tensor) -> torch.dtype:
    """That of gradients and sums of these operands: float32, or float64 where one of them is."""
    return torch.float64 if torch.float64 in [x.dtype for x in operands] else torch.float32


@op(native=native_product, fits=_fit.linear)
def linear_kept(activations: Tensor, backprops: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per-sample weight gradients of a linear layer, their squared norms and error bounds.

    Equivalent to ``torch.einsum("ntp,ntd->npd", backprops, activations)`` in float32 or wider.

    Shapes:
        activations ``[N, T, D]``, backprops ``[N, T, P]`` -> gradients ``[N, P, D]``, norm_sq ``[N]``, error ``[N]``.
    Guarantee:
        ``norm_sq + error`` is an upper bound of the squared norm of the gradients as returned.
    """
    dtype = result_dtype(activations, backprops)
    values = backprops.to(dtype).transpose(1, 2) @ activations.to(dtype)
    return values, *grad_sample_norm_sq.reference(values)


@op(native=native_product, fits=_fit.linear)
def linear_direct_norm_sq(activations: Tensor, backprops: Tensor) -> tuple[Tensor, Tensor]:
    """The norms of :func:`linear_kept`, whose gradients are not kept."""
    a, b = activations.double(), backprops.double()
    reach = (a.square().sum(2) * b.square().sum(2)).sqrt().sum(1).square()
    return _direct_norms(b.transpose(1, 2) @ a, reach, a.shape[1], result_dtype(activations, backprops))


@op(native=native_product, fits=_fit.linear_sum)
def linear_weighted_sum(activations: Tensor, backprops: Tensor, factors: Tensor) -> Tensor:
    """``sum_n factors[n] G[n]``: ``[N, T, D], [N, T, P], [N] -> [P, D]``, in float32 or wider.

    Records of factor zero contribute exactly zero, whatever they hold.
    """

    def product(a: Tensor, b: Tensor) -> Tensor:
        return b.flatten(0, 1).T @ a.flatten(0, 1)

    return _sum_of_products(product, activations, backprops, factors)


@op(native=native_convolution, fits=_fit.outer_sum)
def outer_weighted_sum(activations: Tensor, backprops: Tensor, factors: Tensor) -> Tensor:
    """:func:`linear_weighted_sum` of layers with one position: ``[N, 1, D], [N, 1, P], [N] -> [P, D]``.

    Records are added in parts of at most :data:`RECORDS_PER_PART` and blocks of :data:`PARTS_PER_BLOCK` parts; blocks
    in float64. Within a part the terms of each number are one sum of the kernel's, or of the vendor library's in the
    reference. Records of factor zero contribute exactly zero, whatever they hold.
    """
    dtype = result_dtype(activations, backprops)
    a = masked(activations, factors).squeeze(1).to(dtype)
    b = masked(backprops, factors).squeeze(1).to(dtype) * factors.to(dtype)[:, None]
    rows = RECORDS_PER_PART * PARTS_PER_BLOCK
    blocks = (
        functools.reduce(torch.add, map(lambda x, y: y.T @ x, *(z.split(RECORDS_PER_PART) for z in block)))
        for block in zip(a.split(rows), b.split(rows), strict=True)
    )
    if len(factors) <= rows:
        return next(blocks)
    total = b.new_zeros(b.shape[1], a.shape[1], dtype=torch.float64)
    for block in blocks:
        total += block
    return total.to(dtype)


@op(native=native_convolution, fits=_fit.convolution)
def conv_kept(
    activations: Tensor,
    backprops: Tensor,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    transposed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-sample weight gradients of an n-dimensional (transposed) convolution, their squared norms and error bounds.

    Shapes:
        activations ``[N, C_in, *in]``, backprops ``[N, C_out, *out]``; ``weight_shape`` as the layer's weight
        (``[C_out, C_in/groups, *k]``, transposed ``[C_in, C_out/groups, *k]``); stride, padding, dilation: n ints.
        -> gradients ``[N, *weight_shape]``, stored with channels last, norm_sq ``[N]``, error ``[N]``.
    Guarantee:
        as :func:`linear_kept`.
    Edge cases:
        N = 0 gives empty tensors; positions outside the input count as zero.
    """
    plain, windows = _unfolded(activations, backprops, weight_shape, stride, padding, dilation, groups, transposed)
    values = (plain @ windows.transpose(2, 3)).reshape(plain.shape[0], *weight_shape)
    return _channels_last(values), *grad_sample_norm_sq.reference(values)


def _unfolded(
    activations: Tensor,
    backprops: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
) -> tuple[Tensor, Tensor]:
    """The plain operand ``[N, groups, rows, T]``, and what the taps read for it ``[N, groups, channels * taps, T]``."""
    plain, spread = conv_roles(activations, backprops, transposed)
    n, kernel, grid = plain.shape[0], weight_shape[2:], plain.shape[2:]
    sides = [p for q in reversed(padding) for p in (q, q)]
    spread = F.pad(spread, sides).contiguous()
    batch_stride, channel_stride, *steps = spread.stride()
    taps = [s * d for s, d in zip(steps, dilation, strict=True)]
    hops = [s * h for s, h in zip(steps, stride, strict=True)]
    windows = spread.as_strided(
        (n, spread.shape[1], *kernel, *grid),
        (batch_stride, channel_stride, *taps, *hops),
        spread.storage_offset(),
    )
    positions = math.prod(grid)
    windows = windows.reshape(n, groups, weight_shape[1] * math.prod(kernel), positions)
    return plain.reshape(n, groups, weight_shape[0] // groups, positions), windows


def _channels_last(values: Tensor) -> Tensor:
    return values.movedim(2, -1).contiguous().movedim(-1, 2)


@op(native=native_convolution, fits=_fit.convolution)
def conv_direct_norm_sq(
    activations: Tensor,
    backprops: Tensor,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    transposed: bool,
) -> tuple[Tensor, Tensor]:
    """The norms of :func:`conv_kept`, whose gradients are not kept."""
    how = (weight_shape, stride, padding, dilation, groups, transposed)
    plain, windows = _unfolded(activations.double(), backprops.double(), *how)
    reach = (plain.square().sum(2) * windows.square().sum(2)).sqrt().sum(2).square().sum(1)
    values = plain @ windows.transpose(2, 3)
    return _direct_norms(values, reach, plain.shape[3], result_dtype(activations, backprops))


@op(native=native_convolution, fits=_fit.convolution_sum)
def conv_weighted_sum(
    activations: Tensor,
    backprops: Tensor,
    factors: Tensor,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    transposed: bool,
) -> Tensor:
    """``sum_n factors[n] G[n]`` of a convolution: ``[N, C_in, *in], [N, C_out, *out], [N] -> weight_shape``.

    Records of factor zero contribute exactly zero, whatever they hold.
    """

    def product(a: Tensor, b: Tensor) -> Tensor:
        return conv_weight_gradient(a, b, weight_shape, stride, padding, dilation, groups, transposed)

    return _sum_of_products(product, activations, backprops, factors)


def conv_weight_gradient(
    activations: Tensor,
    backprops: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
) -> Tensor:
    """The vendor library's weight gradient of a convolution, summed over the batch."""
    if activations.shape[0] == 0:
        return backprops.new_zeros(weight_shape)
    output_padding = [0] * len(stride)
    if transposed:
        sizes = zip(
            activations.shape[2:], backprops.shape[2:], weight_shape[2:], stride, padding, dilation, strict=True
        )
        output_padding = [o - ((i - 1) * s - 2 * p + d * (k - 1) + 1) for i, o, k, s, p, d in sizes]
    weight = backprops.new_empty(1).expand(*weight_shape)  # only its shape is read
    return torch.ops.aten.convolution_backward(
        backprops,
        activations,
        weight,
        None,
        list(stride),
        list(padding),
        list(dilation),
        transposed,
        output_padding,
        groups,
        [False, True, False],
    )[1]


def _native_kept(values: Tensor, factors: Tensor) -> bool | str:
    plain = values.dtype == factors.dtype == torch.float32 and values.is_contiguous() and factors.is_contiguous()
    return plain or "the kernel takes contiguous float32"


@op(native=_native_kept, fits=_fit.kept_sum)
def kept_weighted_sum(values: Tensor, factors: Tensor) -> Tensor:
    """``sum_n factors[n] values[n]``: ``[N, M], [N] -> [M]``, added up in parts of at most 128 records.

    Records of factor zero contribute exactly zero, whatever they hold.
    """
    values = masked(values, factors)
    total = values.new_zeros(values.shape[1], dtype=torch.float64)
    for few, same in zip(factors.split(RECORDS_PER_PART), values.split(RECORDS_PER_PART), strict=True):
        total += few @ same
    return total.to(values.dtype)
