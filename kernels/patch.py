"""Squared norms of per-sample gradients of convolutions, from two Gram matrices and without unfolding.

``sum_{t,t'} B[t,t'] sum_tap X[pixel(t, tap), pixel(t', tap)]`` as in :func:`~dp2vae_fast.ops.conv_norm_sq`: one launch
makes B, one X of every phase, and a third adds X up over the taps and multiplies. Pixels of a phase are numbered row by
row, and so are positions, so that ``t <= t'`` gives ``pixel(t) <= pixel(t')`` for every tap: of both matrices only the
tiles on and above the diagonal are made. The error bound is that of :mod:`.norm`, with the additions over taps.
"""

from __future__ import annotations

import functools
import itertools
import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from dp2vae_fast.ops.norm import conv_norm_sq, linear_norm_sq, product_depth

from . import blocks
from ._common import TINY, Dot, launch, relative_error, sum_depth, takes, tile_pair
from .gram import diagonal, finish_gram_kernel, gram_tile, matrix_sum, vector_sum

_SCRATCH = 1 << 26  # numbers of Gram matrices held at a time


@triton.jit
def gram_kernel(
    x,
    grams,
    positions,
    features,
    record,
    group,
    phase,
    position,
    feature,
    groups,
    phases,
    pieces,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gram matrices ``[N, groups, phases, T, T]`` over features, one tile a program."""
    pid = tl.program_id(0).to(tl.int64)
    matrix = pid // pieces
    n, g, f = matrix // (groups * phases), matrix // phases % groups, matrix % phases
    i, j = tile_pair((pid % pieces).to(tl.int32))
    rows = i * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = j * BLOCK_T + tl.arange(0, BLOCK_T)
    row, column = rows.to(tl.int64), columns.to(tl.int64)
    gram = gram_tile(
        x + n * record + g * group + f * phase,
        *(row * position, column * position, rows < positions, columns < positions, feature, features),
        *(False, UPCAST, PRECISION, BLOCK_T, BLOCK_K),
    )
    at = grams + matrix * positions * positions + row[:, None] * positions + column[None, :]
    tl.store(at, gram, mask=(rows < positions)[:, None] & (columns < positions)[None, :])


@triton.jit
def combine_kernel(
    plain,
    spread,
    pixel_of,
    phase_of,
    parts,
    diagonals,
    positions,
    pixels,
    taps,
    phases,
    pieces,
    tiles,
    plane,
    BLOCK_T: tl.constexpr,
):
    """The spread Gram matrix added up over taps, times the plain one, over one tile of positions.

    ``pixel_of [taps, T]`` is negative where a tap reads padding.
    """
    pid = tl.program_id(0).to(tl.int64)
    matrix = pid // pieces
    i, j = tile_pair((pid % pieces).to(tl.int32))
    rows = i * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = j * BLOCK_T + tl.arange(0, BLOCK_T)
    windows = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
    above = rows[:, None] <= columns[None, :]  # what lies below is not made
    for tap in range(0, taps):
        row = tl.load(pixel_of + tap * positions + rows, mask=rows < positions, other=-1).to(tl.int64)
        column = tl.load(pixel_of + tap * positions + columns, mask=columns < positions, other=-1).to(tl.int64)
        gram = spread + (matrix * phases + tl.load(phase_of + tap)) * pixels * pixels
        mask = (row >= 0)[:, None] & (column >= 0)[None, :] & above
        windows += tl.load(gram + row[:, None] * pixels + column[None, :], mask=mask, other=0.0)
    mask = (rows < positions)[:, None] & (columns < positions)[None, :] & above
    at = plain + matrix * positions * positions + rows.to(tl.int64)[:, None] * positions + columns[None, :]
    products = tl.load(at, mask=mask, other=0.0)
    twice = tl.where(rows[:, None] == columns[None, :], 1.0, 2.0)
    tl.store(parts + pid, matrix_sum(twice * products * windows))
    if i == j:
        squares, window_squares = diagonal(products, rows, columns), diagonal(windows, rows, columns)
        place = diagonals + matrix * tiles + i
        tl.store(place, vector_sum(tl.sqrt_rn(squares) * tl.sqrt_rn(window_squares)))
        tl.store(place + plane, vector_sum(squares))
        tl.store(place + 2 * plane, vector_sum(window_squares))


@functools.lru_cache(maxsize=64)
def _tables(
    grid: tuple[int, ...],
    sizes: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    device: torch.device,
) -> tuple[list[int], Tensor, Tensor]:
    """The phases that taps read (as numbered by :func:`_by_phase`), pixel ``[taps, T]`` and phase ``[taps]``.

    Position t reads pixel ``t + shift`` of its tap's phase, where that has one.
    """
    steps = [math.ceil(size / s) for size, s in zip(sizes, stride, strict=True)]
    positions = torch.cartesian_prod(*(torch.arange(g) for g in grid)).reshape(-1, len(grid))
    pixels, phases = [], []
    for tap in itertools.product(*(range(k) for k in kernel)):
        offset = [d * t - p for d, t, p in zip(dilation, tap, padding, strict=True)]
        shift = torch.tensor([o // s for o, s in zip(offset, stride, strict=True)])
        phase, pixel, inside = 0, torch.zeros(len(positions), dtype=torch.int64), True
        for axis, (o, s, step) in enumerate(zip(offset, stride, steps, strict=True)):
            phase = phase * s + o % s
            at = positions[:, axis] + shift[axis]
            inside = inside & (at >= 0) & (at < step)
            pixel = pixel * step + at
        pixels.append(pixel.where(torch.as_tensor(inside), -1))
        phases.append(phase)
    used = sorted(set(phases))
    phase_of = torch.tensor([used.index(phase) for phase in phases], dtype=torch.int32, device=device)
    return used, torch.stack(pixels).to(torch.int32).to(device), phase_of


def _by_phase(spread: Tensor, stride: list[int], used: list[int]) -> Tensor:
    """Pixels ``[N, C, phases, M]`` of the phases that are used, zero where a phase has fewer than the first one.

    A copy in the operand's own memory order where there are several phases.
    """
    if all(s == 1 for s in stride):
        return spread.flatten(2).unsqueeze(2)
    spread = F.pad(
        spread, [q for size, s in zip(spread.shape[:1:-1], stride[::-1], strict=True) for q in (0, -size % s)]
    )
    for axis, s in enumerate(stride):
        spread = spread.unflatten(2 + 2 * axis, (-1, s))
    dims = len(stride)
    spread = spread.permute(0, 1, *range(3, 3 + 2 * dims, 2), *range(2, 2 + 2 * dims, 2))
    spread = spread.flatten(2, 1 + dims).flatten(3)
    return spread if len(used) == spread.shape[2] else spread[:, :, used]


def _gram(x: Tensor, groups: int, dot: Dot) -> Tensor:
    """Gram matrices ``[N, groups, phases, M, M]`` of ``[N, C, phases, M]``, the tiles below the diagonal left out."""
    records, channels, phases, positions = x.shape
    options = blocks.choose(f"gram {dot.kind}", x, positions)
    tiles = math.ceil(positions / options["BLOCK_T"])
    pieces = tiles * (tiles + 1) // 2
    grams = x.new_empty(records, groups, phases, positions, positions, dtype=torch.float32)
    features = channels // groups
    steps = (x.stride(0), features * x.stride(1), x.stride(2), x.stride(3), x.stride(1))
    sizes = (positions, features, *steps, groups, phases, pieces)
    how = dict(UPCAST=dot.upcast, PRECISION=dot.precision, **options)
    launch(gram_kernel, records * groups * phases * pieces, x, x, grams, *sizes, **how)
    return grams


def _supports(activations: Tensor, backprops: Tensor, weight_shape: list[int], *_: object) -> bool | str:
    if 0 in (*activations.shape[1:], *backprops.shape[1:]):
        return "an operand is empty"
    return takes(activations, backprops)


@conv_norm_sq.register("triton", supports=_supports)
def _conv_norm_sq(
    activations: Tensor,
    backprops: Tensor,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    transposed: bool,
) -> tuple[Tensor, Tensor]:
    plain, spread = (activations, backprops) if transposed else (backprops, activations)
    kernel, grid, records = weight_shape[2:], tuple(plain.shape[2:]), plain.shape[0]
    if groups == math.prod(kernel) == 1 and not any(padding):  # a linear layer at every position
        corner = tuple(slice(0, s * g, s) for g, s in zip(grid, stride, strict=True))
        rows = [x.flatten(2).mT for x in (spread[(..., *corner)], plain)]
        norm_sq, error = linear_norm_sq(*rows, backend="triton")
        return norm_sq, error
    geometry = (kernel, stride, padding, dilation)
    used, pixel_of, phase_of = _tables(grid, tuple(spread.shape[2:]), *map(tuple, geometry), plain.device)
    plain, spread = plain.flatten(2).unsqueeze(2), _by_phase(spread, stride, used)
    dots = Dot(plain, convolution=True), Dot(spread, convolution=True)
    positions, pixels, taps = plain.shape[3], spread.shape[3], len(phase_of)
    options, final = blocks.choose("combine", plain, positions), blocks.choose("finish", plain)
    tiles = math.ceil(positions / options["BLOCK_T"])
    pieces = tiles * (tiles + 1) // 2
    channels = weight_shape[0] // groups, weight_shape[1]
    depth = dots[0].depth(channels[0]) + dots[1].depth(channels[1]) + taps + 2  # twice a product is exact
    depth += 2 * min(positions, options["BLOCK_T"]) + sum_depth(pieces, final["BLOCK"]) + groups
    depth += 2 * (product_depth(positions, plain.device) + 1) + 2
    lost = (sum(channels) + taps) * positions**2 * TINY
    bounds = relative_error(depth, plain, *dots), lost
    norm_sq, error = (plain.new_empty(records, dtype=torch.float32) for _ in range(2))
    few = max(1, _SCRATCH // (groups * (positions**2 + len(used) * pixels**2)))
    for first in range(0, records, few):
        plain_grams = _gram(plain[first : first + few], groups, dots[0])
        spread_grams = _gram(spread[first : first + few], groups, dots[1])
        matrices = plain_grams.shape[0] * groups
        parts = norm_sq.new_empty(matrices * pieces)
        diagonals = norm_sq.new_empty(3 * matrices * tiles)
        sizes = (positions, pixels, taps, len(used), pieces, tiles, matrices * tiles)
        operands = (plain_grams, spread_grams, pixel_of, phase_of, parts, diagonals)
        launch(combine_kernel, matrices * pieces, plain, *operands, *sizes, **options)
        results = (parts, diagonals, norm_sq[first:], error[first:], groups, pieces, tiles, matrices * tiles)
        launch(finish_gram_kernel, plain_grams.shape[0], plain, *results, *bounds, **final)
    return norm_sq, error
