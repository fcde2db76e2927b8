"""Per-sample weight gradients formed tile by tile and squared in the epilogue, kept or not.

A tile is ``sum_t plain[t, row] spread[t, column]`` in one float32 accumulator. For a linear layer the operands are
backprops and activations; for a convolution column (tap, c) reads channel c at the pixel of its tap, so that the
gradients come out with channels last, as :func:`~dp2vae_fast.ops.conv_kept` stores them.

Kept gradients: the error counts the sum of squares alone, for the norm is that of the numbers as stored. A term of such
a number passes through as many roundings as there are positions (three times as many on tensor cores, :mod:`._common`).
Norms alone: the gradient formed here is off by at most ``d u sum_t |a_t| |b_t|`` after d roundings a term, its squared
norm by twice that times the same sum: the bound is ``gamma(2 d + ...) reach``, with the roundings of the weighted sum
that is formed afterwards counted in the same way.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dp2vae_fast.ops.gradient import conv_direct_norm_sq, conv_kept, linear_direct_norm_sq, linear_kept
from dp2vae_fast.ops.norm import product_depth

from . import blocks
from ._common import TINY, Dot, launch, relative_error, sum_depth, takes
from .gram import finish_gram_kernel, finish_kernel, matrix_sum


@triton.jit
def spread_at(pixel_at, tap, t, positions, position, inside, WINDOWS: tl.constexpr):
    """Where position t of each tap lies in memory, and whether there is a pixel."""
    if WINDOWS:
        at = tl.load(pixel_at + tap * positions + t, mask=inside, other=-1).to(tl.int64)
        return at, at >= 0
    return t.to(tl.int64) * position + tl.zeros_like(tap), inside


@triton.jit
def operand_tiles(
    row_at,
    column_at,
    pixel_at,
    tap,
    t,
    t_inside,
    row_inside,
    column_inside,
    positions,
    plain_position,
    spread_position,
    WINDOWS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Both operands of a tile at positions t, ``[rows, t]`` and ``[t, columns]``; zero where there is none."""
    left = tl.load(
        row_at[:, None] + t.to(tl.int64)[None, :] * plain_position,
        mask=row_inside[:, None] & t_inside[None, :],
        other=0.0,
    )
    inside = t_inside[:, None] & column_inside[None, :]
    at, inside = spread_at(pixel_at, tap[None, :], t[:, None], positions, spread_position, inside, WINDOWS)
    right = tl.load(column_at[None, :] + at, mask=inside, other=0.0)
    if UPCAST:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return left, right


@triton.jit
def product_kernel(
    plain,
    spread,
    pixel_at,
    values,
    parts,
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
    row_tiles,
    column_tiles,
    KEEP: tl.constexpr,
    WINDOWS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    pid = tl.program_id(0)
    matrix = (pid // (row_tiles * column_tiles)).to(tl.int64)
    n, g = matrix // groups, matrix % groups
    row = pid // column_tiles % row_tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    column = pid % column_tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    tap = column // channels
    row_at = plain + n * plain_record + g * plain_group + row.to(tl.int64) * plain_row
    column_at = spread + n * spread_record + g * spread_group + (column % channels).to(tl.int64) * spread_channel
    total = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for first in range(0, positions, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        left, right = operand_tiles(
            *(row_at, column_at, pixel_at, tap, t, t < positions, row < rows, column < columns),
            *(positions, plain_position, spread_position, WINDOWS, UPCAST),
        )
        total = tl.dot(left, right, total, input_precision=PRECISION)
    if KEEP:
        to = values + (matrix * rows + row.to(tl.int64))[:, None] * columns + column[None, :]
        tl.store(to, total, mask=(row < rows)[:, None] & (column < columns)[None, :])
    tl.store(parts + pid, matrix_sum(total * total))


@triton.jit
def reach_kernel(
    plain,
    spread,
    pixel_at,
    diagonals,
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
    tiles,
    plane,
    WINDOWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sums over a tile of positions of ``|plain_t| |window_t|`` and of both squares."""
    pid = tl.program_id(0)
    matrix = (pid // tiles).to(tl.int64)
    n, g = matrix // groups, matrix % groups
    t = pid % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    squares = tl.zeros((BLOCK_T,), tl.float32)
    row_at = plain + n * plain_record + g * plain_group + t.to(tl.int64) * plain_position
    for first in range(0, rows, BLOCK_K):
        row = first + tl.arange(0, BLOCK_K)
        mask = (t < positions)[:, None] & (row < rows)[None, :]
        x = tl.load(row_at[:, None] + row.to(tl.int64)[None, :] * plain_row, mask=mask, other=0.0).to(tl.float32)
        squares += tl.sum(x * x, 1)
    window_squares = tl.zeros((BLOCK_T,), tl.float32)
    for first in range(0, columns, BLOCK_K):
        column = first + tl.arange(0, BLOCK_K)
        tap = column // channels
        column_at = spread + n * spread_record + g * spread_group + (column % channels).to(tl.int64) * spread_channel
        inside = (t < positions)[:, None] & (column < columns)[None, :]
        at, inside = spread_at(pixel_at, tap[None, :], t[:, None], positions, spread_position, inside, WINDOWS)
        x = tl.load(column_at[None, :] + at, mask=inside, other=0.0).to(tl.float32)
        window_squares += tl.sum(x * x, 1)
    tl.store(diagonals + pid, tl.sum(tl.sqrt_rn(squares) * tl.sqrt_rn(window_squares), 0))
    tl.store(diagonals + plane + pid, tl.sum(squares, 0))
    tl.store(diagonals + 2 * plane + pid, tl.sum(window_squares, 0))


class Product(NamedTuple):
    """Operands ``[N, groups * rows, T]`` and ``[N, groups * channels, ...]``; ``pixel_at [taps, T]`` or None."""

    plain: Tensor
    spread: Tensor
    pixel_at: Tensor | None
    groups: int
    convolution: bool

    def dot(self) -> Dot:
        plain, spread = self.plain, self.spread
        wider = plain if plain.dtype == torch.float32 else spread
        return Dot(wider, self.convolution, upcast=plain.dtype != spread.dtype)

    def arguments(self) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, ...], tuple[int, int, int]]:
        """What both kernels take: operands, then sizes and steps; and (positions, rows, columns)."""
        plain, spread = self.plain, self.spread
        rows, channels = plain.shape[1] // self.groups, spread.shape[1] // self.groups
        taps = 1 if self.pixel_at is None else self.pixel_at.shape[0]
        plain_steps = (plain.stride(0), rows * plain.stride(1), plain.stride(1), plain.stride(2))
        spread_steps = (spread.stride(0), channels * spread.stride(1), spread.stride(1), spread.stride(2))
        pixel_at = plain if self.pixel_at is None else self.pixel_at
        sizes = (plain.shape[2], rows, channels * taps)
        return (plain, spread, pixel_at), (*sizes, channels, self.groups, *plain_steps, *spread_steps), sizes


def _formed(product: Product, values: Tensor | None) -> tuple[Tensor, Tensor]:
    """Squared norms and errors; the gradients go to ``values`` where that is given."""
    plain = product.plain
    operands, numbers, (positions, rows, columns) = product.arguments()
    groups = product.groups
    dot = product.dot()
    options, final = blocks.choose(f"product {dot.kind}", plain), blocks.choose("finish", plain)
    row_tiles, column_tiles = math.ceil(rows / options["BLOCK_P"]), math.ceil(columns / options["BLOCK_D"])
    records, pieces = plain.shape[0], row_tiles * column_tiles
    norm_sq, error, parts = (
        plain.new_empty(size, dtype=torch.float32) for size in (records, records, records * groups * pieces)
    )
    windows = product.pixel_at is not None
    launch(
        product_kernel,
        records * groups * pieces,
        plain,
        *(*operands, parts if values is None else values, parts, *numbers, row_tiles, column_tiles),
        KEEP=values is not None,
        WINDOWS=windows,
        UPCAST=dot.upcast,
        PRECISION=dot.precision,
        **options,
    )
    depth = 1 + min(rows, options["BLOCK_P"]) + min(columns, options["BLOCK_D"])
    if values is not None:
        depth += sum_depth(groups * pieces, final["BLOCK"])
        bounds = relative_error(depth, plain), groups * rows * columns * TINY
        launch(finish_kernel, records, plain, parts, parts, norm_sq, error, groups * pieces, *bounds, **final)
        return norm_sq, error
    depth += sum_depth(pieces, final["BLOCK"]) + groups
    depth += 2 * dot.depth(positions) + 2 * (product_depth(positions, plain.device) + 1)
    # Products below the normal range: each may lose `TINY` of a number, T times, and a square as much again.
    bounds = relative_error(depth, plain, dot, dot), 2 * positions * rows * columns * TINY
    options = blocks.choose("reach", plain)
    tiles = math.ceil(positions / options["BLOCK_T"])
    plane = records * groups * tiles
    diagonals = plain.new_empty(3 * plane, dtype=torch.float32)
    launch(reach_kernel, plane, plain, *operands, diagonals, *numbers, tiles, plane, WINDOWS=windows, **options)
    sizes = (groups, pieces, tiles, plane)
    launch(finish_gram_kernel, records, plain, parts, diagonals, norm_sq, error, *sizes, *bounds, **final)
    return norm_sq, error


def linear(activations: Tensor, backprops: Tensor) -> Product:
    return Product(backprops.mT, activations.mT, None, 1, False)


@functools.lru_cache(maxsize=64)
def _pixel_at(
    grid: tuple[int, ...],
    sizes: tuple[int, ...],
    steps: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    device: torch.device,
) -> Tensor:
    """Offset in memory of the pixel that each tap reads at each position, int32 ``[taps, T]``; -1: outside."""
    positions = torch.cartesian_prod(*(torch.arange(g) for g in grid)).reshape(-1, len(grid))
    taps = torch.tensor(list(itertools.product(*(range(k) for k in kernel))))
    first, hop, far = (torch.tensor(x) for x in (padding, stride, dilation))
    pixels = positions * hop + (taps * far - first).unsqueeze(1)
    inside = ((pixels >= 0) & (pixels < torch.tensor(sizes))).all(-1)
    return (pixels * torch.tensor(steps)).sum(-1).where(inside, -1).to(torch.int32).to(device)


def convolution(
    activations: Tensor,
    backprops: Tensor,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    transposed: bool,
) -> Product:
    plain, spread = (activations, backprops) if transposed else (backprops, activations)
    shapes = (tuple(plain.shape[2:]), tuple(spread.shape[2:]), spread.stride()[2:])
    geometry = (weight_shape[2:], stride, padding, dilation)
    pixel_at = _pixel_at(*shapes, *(tuple(x) for x in geometry), plain.device)
    return Product(plain.flatten(2), spread, pixel_at, groups, True)


def supports_linear(activations: Tensor, backprops: Tensor) -> bool | str:
    if 0 in (*activations.shape[1:], *backprops.shape[1:]):
        return "an operand is empty"
    return takes(activations, backprops)


def supports_convolution(activations: Tensor, backprops: Tensor, *_: object) -> bool | str:
    reach = max(
        sum((s - 1) * t for s, t in zip(x.shape[1:], x.stride()[1:], strict=True)) for x in (activations, backprops)
    )
    if reach >= 1 << 31:
        return "a record spans 2^31 elements"
    return supports_linear(activations, backprops)


@linear_kept.register("triton", supports=supports_linear)
def _linear_kept(activations: Tensor, backprops: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    shape = (activations.shape[0], backprops.shape[2], activations.shape[2])
    values = activations.new_empty(shape, dtype=torch.float32)
    return values, *_formed(linear(activations, backprops), values)


@linear_direct_norm_sq.register("triton", supports=supports_linear)
def _linear_direct_norm_sq(activations: Tensor, backprops: Tensor) -> tuple[Tensor, Tensor]:
    return _formed(linear(activations, backprops), None)


@conv_kept.register("triton", supports=supports_convolution)
def _conv_kept(
    activations: Tensor,
    backprops: Tensor,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    transposed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    how = (weight_shape, stride, padding, dilation, groups, transposed)
    shape = (activations.shape[0], weight_shape[0], *weight_shape[2:], weight_shape[1])
    values = activations.new_empty(shape, dtype=torch.float32)
    norms = _formed(convolution(activations, backprops, *how), values)
    if math.prod(weight_shape[2:]) == 1 or weight_shape[1] == 1:  # one order of memory, strides as the reference's
        return values.reshape(activations.shape[0], *weight_shape), *norms
    return values.movedim(-1, 2), *norms


@conv_direct_norm_sq.register("triton", supports=supports_convolution)
def _conv_direct_norm_sq(
    activations: Tensor,
    backprops: Tensor,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    transposed: bool,
) -> tuple[Tensor, Tensor]:
    how = (weight_shape, stride, padding, dilation, groups, transposed)
    return _formed(convolution(activations, backprops, *how), None)
