"""Sums over records, each record's part formed apart from all others.

``sum_n factors[n] G[n]``: the product ``G[n]`` over T positions is formed in float32, by an order of additions that
depends on T and the block sizes alone, whatever else is in the batch and wherever the record stands in it; then it is
multiplied with its factor and added as one term. Chunks of at most :data:`~dp2vae_fast.ops.norm.CHUNK` positions have
one accumulator each and are then added, as :func:`~dp2vae_fast.ops.norm.product_depth` counts. Where the user allows
TF32, operands are rounded to it here: tensor cores would cut them off, by twice what norms count.

Records are added up in parts, each by programs of its own: at most 128 terms one after the other in float32. Parts are
added in float64 and the total is rounded once, so that no term passes through more additions of float32 than
:func:`~dp2vae_fast.engine.precision.sum_rounding` counts. A record of factor zero is not read.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dp2vae_fast.ops.gradient import RECORDS_PER_PART, conv_weighted_sum, kept_weighted_sum, linear_weighted_sum
from dp2vae_fast.ops.norm import CHUNK

from . import blocks
from ._common import launch, takes
from .gradient import Product, convolution, linear, operand_tiles, supports_convolution, supports_linear

_SMALL = 8  # records of a part at least, where there are as many: below, adding parts up costs as much as they do
_PROGRAMS = 4  # that keep a multiprocessor busy


@triton.jit
def rounded_to_tf32(x):
    """To nearest, half away from zero; NaN stays."""
    bits = (x.to(tl.int32, bitcast=True) + 0x1000) & ~0x1FFF
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def chunk_product(
    row_at,
    column_at,
    pixel_at,
    tap,
    first,
    length,
    row_inside,
    column_inside,
    positions,
    plain_position,
    spread_position,
    WINDOWS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """A tile of a record's product over the CHUNK positions from ``first`` on, those from ``length`` on left out."""
    total = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for begin in tl.static_range(0, CHUNK, BLOCK_T):
        t = first + begin + tl.arange(0, BLOCK_T)
        left, right = operand_tiles(
            *(row_at, column_at, pixel_at, tap, t, t < length, row_inside, column_inside),
            *(positions, plain_position, spread_position, WINDOWS, UPCAST),
        )
        if PRECISION == "tf32":
            left = rounded_to_tf32(left)
            right = rounded_to_tf32(right)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    return total


@triton.jit
def weighted_kernel(
    plain,
    spread,
    pixel_at,
    factors,
    sums,
    positions,
    rows,
    columns,
    channels,
    groups,
    plain_record,
    plain_group,
    plain_row,
    plain_position,
    spread_record,
    spread_group,
    spread_channel,
    spread_position,
    factor_step,
    records,
    part,
    row_tiles,
    column_tiles,
    WINDOWS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One tile of the sum over ``part`` records: ``sums [parts, groups, rows, channels, taps]``."""
    pid = tl.program_id(0)
    matrix = pid // (row_tiles * column_tiles)
    g = (matrix % groups).to(tl.int64)
    row = pid // column_tiles % row_tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    column = pid % column_tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    tap, channel = column // channels, column % channels
    row_at = plain + g * plain_group + row.to(tl.int64) * plain_row
    column_at = spread + g * spread_group + channel.to(tl.int64) * spread_channel
    total = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    begin = matrix // groups * part
    for record in range(begin, tl.minimum(begin + part, records)):
        n = tl.cast(record, tl.int64)
        factor = tl.load(factors + n * factor_step)
        length = tl.where(factor == 0, 0, positions)  # positions read: none where 0 * inf would be NaN
        where = (row_at + n * plain_record, column_at + n * spread_record, pixel_at, tap)
        steps = (row < rows, column < columns, positions, plain_position, spread_position)
        if ONE_CHUNK:
            product = chunk_product(
                *where, 0, length, *steps, WINDOWS, UPCAST, PRECISION, CHUNK, BLOCK_P, BLOCK_D, BLOCK_T
            )
        else:
            product = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
            for first in range(0, length, CHUNK):
                product += chunk_product(
                    *where, first, length, *steps, WINDOWS, UPCAST, PRECISION, CHUNK, BLOCK_P, BLOCK_D, BLOCK_T
                )
        total += factor * product
    at = channel * (columns // channels) + tap
    to = sums + (matrix.to(tl.int64) * rows + row)[:, None] * columns + at[None, :]
    tl.store(to, total, mask=(row < rows)[:, None] & (column < columns)[None, :])


@triton.jit
def kept_kernel(
    values,
    factors,
    sums,
    columns,
    value_record,
    value_step,
    factor_step,
    records,
    part,
    tiles,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A few numbers of the sum over ``part`` records, in ROWS accumulators each: ``sums [parts, columns]``."""
    pid = tl.program_id(0)
    column = (pid % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    begin = pid // tiles * part
    end = tl.minimum(begin + part, records)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(begin, end, ROWS):
        record = first + tl.arange(0, ROWS)
        n = record.to(tl.int64)
        factor = tl.load(factors + n * factor_step, mask=record < end, other=0.0)
        at = (n * value_record)[:, None] + (column * value_step)[None, :]
        value = tl.load(values + at, mask=(factor != 0)[:, None] & (column < columns)[None, :], other=0.0)
        total += factor[:, None] * value
    tl.store(sums + (pid // tiles).to(tl.int64) * columns + column, tl.sum(total, 0), mask=column < columns)


@triton.jit
def add_parts_kernel(sums, total, parts, numbers, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """In float64, rounded once: ``sums [parts, numbers]``."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exact = tl.zeros((ROWS, BLOCK), tl.float64)
    for first in range(0, parts, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < parts)[:, None] & (at < numbers)[None, :]
        exact += tl.load(sums + row.to(tl.int64)[:, None] * numbers + at[None, :], mask=mask, other=0.0).to(tl.float64)
    tl.store(total + at, tl.sum(exact, 0).to(tl.float32), mask=at < numbers)


def _part(records: int, tiles: int, like: Tensor) -> int:
    """Records of a part: few where a part has too few tiles to fill the device."""
    processors = torch.cuda.get_device_properties(like.device).multi_processor_count if like.is_cuda else 1
    parts = max(1, _PROGRAMS * processors // tiles)
    return min(RECORDS_PER_PART, max(_SMALL, math.ceil(records / parts)))


def _added_up(sums: Tensor) -> Tensor:
    if len(sums) == 1:
        return sums[0]
    total = sums.new_empty(sums.shape[1:])
    options = blocks.choose("add_parts", sums)
    launch(
        add_parts_kernel,
        math.ceil(total.numel() / options["BLOCK"]),
        sums,
        *(sums, total, len(sums), total.numel()),
        **options,
    )
    return total


def _weighted(product: Product, factors: Tensor, shape: list[int]) -> Tensor:
    plain, dot = product.plain, product.dot()
    operands, numbers, (positions, rows, columns) = product.arguments()
    options = blocks.choose(f"weighted {dot.kind}", plain, positions)
    row_tiles, column_tiles = math.ceil(rows / options["BLOCK_P"]), math.ceil(columns / options["BLOCK_D"])
    records, tiles = len(factors), product.groups * row_tiles * column_tiles
    part = _part(records, tiles, plain)
    parts = math.ceil(records / part)
    sums = plain.new_empty((parts, *shape), dtype=torch.float32)
    launch(
        weighted_kernel,
        parts * tiles,
        plain,
        *(*operands, factors, sums, *numbers, factors.stride(0), records, part, row_tiles, column_tiles),
        WINDOWS=product.pixel_at is not None,
        UPCAST=dot.upcast,
        PRECISION=dot.precision,
        ONE_CHUNK=positions <= CHUNK,
        CHUNK=min(CHUNK, math.ceil(positions / options["BLOCK_T"]) * options["BLOCK_T"]),
        **options,
    )
    return _added_up(sums)


def _takes_factors(factors: Tensor, like: Tensor) -> bool | str:
    if factors.dtype != torch.float32 or factors.device != like.device:
        return "the kernel takes float32 factors on the device of the operands"
    return True


def _supports_linear(activations: Tensor, backprops: Tensor, factors: Tensor) -> bool | str:
    reason = supports_linear(activations, backprops)
    return _takes_factors(factors, activations) if reason is True else reason


def _supports_convolution(activations: Tensor, backprops: Tensor, factors: Tensor, *_: object) -> bool | str:
    reason = supports_convolution(activations, backprops)
    return _takes_factors(factors, activations) if reason is True else reason


def _supports_kept(values: Tensor, factors: Tensor) -> bool | str:
    return takes(values, factors, dtypes=(torch.float32,))


@linear_weighted_sum.register("triton", supports=_supports_linear)
def _linear_weighted_sum(activations: Tensor, backprops: Tensor, factors: Tensor) -> Tensor:
    return _weighted(linear(activations, backprops), factors, [backprops.shape[2], activations.shape[2]])


@conv_weighted_sum.register("triton", supports=_supports_convolution)
def _conv_weighted_sum(
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
    how = (weight_shape, stride, padding, dilation, groups, transposed)
    return _weighted(convolution(activations, backprops, *how), factors, weight_shape)


@kept_weighted_sum.register("triton", supports=_supports_kept)
def _kept_weighted_sum(values: Tensor, factors: Tensor) -> Tensor:
    records, columns = values.shape
    options = blocks.choose("kept", values)
    tiles = math.ceil(columns / options["BLOCK"])
    part = _part(records, max(1, tiles), values)
    parts = math.ceil(records / part)
    sums = values.new_empty((parts, columns))
    launch(
        kept_kernel,
        parts * tiles,
        values,
        *(values, factors, sums, columns, *values.stride(), factors.stride(0), records, part, tiles),
        **options,
    )
    return _added_up(sums)
