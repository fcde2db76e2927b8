"""Squared norms of per-sample gradients of linear layers and embeddings, and of gradients that have been formed.

Each returns the norm as computed and an error bound for the float32 arithmetic of its own kernel. A Gram norm adds up
terms ``a_td a_t'd b_tp b_t'p``; where each passes through at most L roundings, the sum is off by at most
``L u / (1 - L u)`` times their magnitudes, which add up to at most ``reach = (sum_t |a_t| |b_t|)^2`` by Cauchy-Schwarz,
and the diagonal tiles hold those lengths. L counts the two products of a tile (three roundings a term on tensor cores,
:mod:`._common`), the sum over a tile, the sum over tiles and, doubled by the square, the weighted gradient that is
formed from the same operands afterwards. Only tiles on and above the diagonal are made, and none reaches memory.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dp2vae_fast.ops.norm import embedding_norm_sq, grad_sample_norm_sq, linear_norm_sq, product_depth

from . import blocks
from ._common import TINY, Dot, flat_rows, launch, relative_error, slowest, sum_depth, takes, tile_pair
from .gram import diagonal, finish_gram_kernel, finish_kernel, gram_tile, matrix_sum, store_norm, vector_sum


@triton.jit
def square_sums_kernel(
    x, parts, norm_sq, error, columns, row_step, pieces, gamma, lost, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """Sum of squares of one chunk of a row, for ``pieces`` chunks a row; with one chunk the norm itself."""
    pid = tl.program_id(0)
    n = (pid // pieces).to(tl.int64)
    begin = (pid % pieces).to(tl.int64) * CHUNK
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, CHUNK, BLOCK):
        at = begin + first + tl.arange(0, BLOCK)
        value = tl.load(x + n * row_step + at, mask=at < columns, other=0.0).to(tl.float32)
        total += value * value
    square = tl.sum(total, 0)
    if pieces == 1:
        store_norm(norm_sq, error, n, square, square, 0.0, gamma, lost)
    else:
        tl.store(parts + pid, square)


def _supports_rows(grad_sample: Tensor) -> bool | str:
    return takes(grad_sample)


@grad_sample_norm_sq.register("triton", supports=_supports_rows)
def _grad_sample_norm_sq(grad_sample: Tensor) -> tuple[Tensor, Tensor]:
    x = flat_rows(grad_sample)
    records, columns = x.shape
    norm_sq, error = (x.new_empty(records, dtype=torch.float32) for _ in range(2))
    options, final = blocks.choose("square_sums", x, columns), blocks.choose("finish", x)
    pieces = max(1, math.ceil(columns / options["CHUNK"]))
    parts = x.new_empty(records * pieces, dtype=torch.float32)
    depth = sum_depth(min(columns, options["CHUNK"]), options["BLOCK"]) + sum_depth(pieces, final["BLOCK"])
    bounds = relative_error(depth, x), columns * TINY
    launch(
        square_sums_kernel,
        records * pieces,
        x,
        *(x, parts, norm_sq, error, columns, x.stride(0), pieces),
        *bounds,
        **options,
    )
    if pieces > 1:
        launch(finish_kernel, records, x, parts, parts, norm_sq, error, pieces, *bounds, **final)
    return norm_sq, error


@triton.jit
def square_sum(x, length, step, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, length, BLOCK):
        at = first + tl.arange(0, BLOCK)
        value = tl.load(x + at.to(tl.int64) * step, mask=at < length, other=0.0).to(tl.float32)
        total += value * value
    return tl.sum(total, 0)


@triton.jit
def one_position_kernel(
    a, b, norm_sq, error, features_a, features_b, a_record, a_step, b_record, b_step, gamma, lost, BLOCK: tl.constexpr
):
    """``|a|^2 |b|^2``, whose partial products are all positive."""
    n = tl.program_id(0).to(tl.int64)
    square_a = square_sum(a + n * a_record, features_a, a_step, BLOCK)
    square_b = square_sum(b + n * b_record, features_b, b_step, BLOCK)
    product = square_a * square_b
    store_norm(norm_sq, error, n, product, product, square_a + square_b, gamma, lost)


@triton.jit
def linear_gram_kernel(
    a,
    b,
    parts,
    diagonals,
    norm_sq,
    error,
    positions,
    features_a,
    features_b,
    a_record,
    a_position,
    a_feature,
    b_record,
    b_position,
    b_feature,
    pieces,
    tiles,
    plane,
    gamma,
    lost,
    SINGLE: tl.constexpr,
    UPCAST_A: tl.constexpr,
    UPCAST_B: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of both Gram matrices, multiplied and added up; SINGLE: it is the only one, and its sum the norm."""
    pid = tl.program_id(0)
    n = (pid // pieces).to(tl.int64)
    i, j = tile_pair(pid % pieces)
    rows = i * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = j * BLOCK_T + tl.arange(0, BLOCK_T)
    row, column = rows.to(tl.int64), columns.to(tl.int64)
    gram_a = gram_tile(
        a + n * a_record,
        *(row * a_position, column * a_position, rows < positions, columns < positions, a_feature, features_a),
        *(SINGLE, UPCAST_A, PRECISION, BLOCK_T, BLOCK_K),
    )
    gram_b = gram_tile(
        b + n * b_record,
        *(row * b_position, column * b_position, rows < positions, columns < positions, b_feature, features_b),
        *(SINGLE, UPCAST_B, PRECISION, BLOCK_T, BLOCK_K),
    )
    total = matrix_sum(gram_a * gram_b)
    if i == j:
        squares_a = diagonal(gram_a, rows, columns)
        squares_b = diagonal(gram_b, rows, columns)
        root = vector_sum(tl.sqrt_rn(squares_a) * tl.sqrt_rn(squares_b))
        square_a = vector_sum(squares_a)
        square_b = vector_sum(squares_b)
        if SINGLE:
            store_norm(norm_sq, error, n, total, root * root, square_a + square_b, gamma, lost)
        else:
            at = diagonals + n * tiles + i
            tl.store(at, root)
            tl.store(at + plane, square_a)
            tl.store(at + 2 * plane, square_b)
            tl.store(parts + pid, total)
    else:
        tl.store(parts + pid, 2.0 * total)  # of (i, j) and (j, i)


def supports_product(activations: Tensor, backprops: Tensor) -> bool | str:
    return takes(activations, backprops)


@linear_norm_sq.register("triton", supports=supports_product)
def _linear_norm_sq(activations: Tensor, backprops: Tensor) -> tuple[Tensor, Tensor]:
    a, b = activations, backprops
    (records, positions, features_a), features_b = a.shape, b.shape[2]
    norm_sq, error = (a.new_empty(records, dtype=torch.float32) for _ in range(2))
    length = features_a + features_b
    if positions == 1:
        options = blocks.choose("one_position", a, max(features_a, features_b))
        depth = sum(sum_depth(features, options["BLOCK"]) for features in (features_a, features_b)) + 1
        launch(
            one_position_kernel,
            records,
            a,
            *(a, b, norm_sq, error, features_a, features_b, a.stride(0), a.stride(2), b.stride(0), b.stride(2)),
            *(relative_error(depth, a), length * TINY),
            **options,
        )
        return norm_sq, error
    dots = Dot(a), Dot(b)
    options, final = blocks.choose(f"gram {slowest(*dots)}", a, positions), blocks.choose("finish", a)
    tile = options["BLOCK_T"]
    tiles = max(1, math.ceil(positions / tile))
    pieces = tiles * (tiles + 1) // 2
    parts, diagonals = (a.new_empty(size, dtype=torch.float32) for size in (records * pieces, 3 * records * tiles))
    depth = dots[0].depth(features_a) + dots[1].depth(features_b) + 1
    depth += (
        2 * min(positions, tile) + sum_depth(pieces, final["BLOCK"]) + 2 * (product_depth(positions, a.device) + 1) + 2
    )
    bounds = relative_error(depth, a, *dots), length * positions**2 * TINY
    launch(
        linear_gram_kernel,
        records * pieces,
        a,
        *(a, b, parts, diagonals, norm_sq, error, positions, features_a, features_b, *a.stride(), *b.stride()),
        *(pieces, tiles, records * tiles, *bounds),
        SINGLE=tiles == 1,
        UPCAST_A=dots[0].upcast,
        UPCAST_B=dots[1].upcast,
        PRECISION=dots[0].precision if a.dtype == torch.float32 else dots[1].precision,
        **options,
    )
    if tiles > 1:
        sizes = (1, pieces, tiles, records * tiles)
        launch(finish_gram_kernel, records, a, parts, diagonals, norm_sq, error, *sizes, *bounds, **final)
    return norm_sq, error


@triton.jit
def embedding_kernel(
    indices,
    b,
    parts,
    reaches,
    positions,
    features,
    index_record,
    index_position,
    b_record,
    b_position,
    b_feature,
    pieces,
    padding_idx,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``<b_t, b_t'>`` and ``|b_t| |b_t'|`` of one tile, added up where t and t' name the same entry."""
    pid = tl.program_id(0)
    n = (pid // pieces).to(tl.int64)
    i, j = tile_pair(pid % pieces)
    rows = i * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = j * BLOCK_T + tl.arange(0, BLOCK_T)
    row, column = rows.to(tl.int64), columns.to(tl.int64)
    at = indices + n * index_record
    row_entry = tl.load(at + row * index_position, mask=rows < positions, other=padding_idx)
    column_entry = tl.load(at + column * index_position, mask=columns < positions, other=padding_idx)
    same = (row_entry[:, None] == column_entry[None, :]) & (row_entry[:, None] != padding_idx)
    same = same & (rows[:, None] < positions) & (columns[None, :] < positions)
    gram = gram_tile(
        b + n * b_record,
        *(row * b_position, column * b_position, rows < positions, columns < positions, b_feature, features),
        *(False, UPCAST, PRECISION, BLOCK_T, BLOCK_K),
    )
    row_square = tl.zeros((BLOCK_T,), tl.float32)
    column_square = tl.zeros((BLOCK_T,), tl.float32)
    for first in range(0, features, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        along = (b + n * b_record + k.to(tl.int64) * b_feature)[None, :]
        mask = k[None, :] < features
        x = tl.load(along + row[:, None] * b_position, mask=mask & (rows < positions)[:, None], other=0.0)
        y = tl.load(along + column[:, None] * b_position, mask=mask & (columns < positions)[:, None], other=0.0)
        x, y = x.to(tl.float32), y.to(tl.float32)
        row_square += tl.sum(x * x, 1)
        column_square += tl.sum(y * y, 1)
    lengths = tl.sqrt_rn(row_square)[:, None] * tl.sqrt_rn(column_square)[None, :]
    twice = tl.where(i == j, 1.0, 2.0)
    tl.store(parts + pid, twice * matrix_sum(tl.where(same, gram, 0.0)))
    tl.store(reaches + pid, twice * matrix_sum(tl.where(same, lengths, 0.0)))


def _supports_embedding(indices: Tensor, backprops: Tensor, padding_idx: int) -> bool | str:
    if indices.dtype not in (torch.int64, torch.int32) or indices.device != backprops.device:
        return "the kernel takes int64 and int32 indices on the device of the backprops"
    return takes(backprops)


@embedding_norm_sq.register("triton", supports=_supports_embedding)
def _embedding_norm_sq(indices: Tensor, backprops: Tensor, padding_idx: int) -> tuple[Tensor, Tensor]:
    records, positions, features = backprops.shape
    norm_sq, error = (backprops.new_empty(records, dtype=torch.float32) for _ in range(2))
    dot = Dot(backprops)
    options, final = blocks.choose(f"gram {dot.kind}", backprops, positions), blocks.choose("finish", backprops)
    tiles = max(1, math.ceil(positions / options["BLOCK_T"]))
    pieces = tiles * (tiles + 1) // 2
    parts, reaches = (backprops.new_empty(records * pieces, dtype=torch.float32) for _ in range(2))
    launch(
        embedding_kernel,
        records * pieces,
        backprops,
        *(indices, backprops, parts, reaches, positions, features, *indices.stride(), *backprops.stride(), pieces),
        padding_idx,
        UPCAST=dot.upcast,
        PRECISION=dot.precision,
        **options,
    )
    depth = dot.depth(features) + 2 * min(positions, options["BLOCK_T"]) + sum_depth(pieces, final["BLOCK"])
    depth += 2 * positions + 2  # as the reference: rows that name one entry are added up in the gradient too
    bounds = relative_error(depth, backprops, dot), features * positions**2 * TINY
    launch(finish_kernel, records, backprops, parts, reaches, norm_sq, error, pieces, *bounds, **final)
    return norm_sq, error
