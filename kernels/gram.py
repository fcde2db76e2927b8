"""Gram matrices tile by tile, and the last step that every norm shares: sums of parts become a norm and its error."""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import positive_part


@triton.jit
def gram_tile(
    x,
    row_at,
    column_at,
    row_inside,
    column_inside,
    feature_step,
    features,
    SAME: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``<x_t, x_t'>`` for positions t that begin at ``row_at`` and t' at ``column_at``; SAME: both are."""
    total = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
    for first in range(0, features, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        along = k.to(tl.int64) * feature_step
        mask = row_inside[:, None] & (k < features)[None, :]
        left = tl.load(x + row_at[:, None] + along[None, :], mask=mask, other=0.0)
        if SAME:
            right = tl.trans(left)
        else:
            mask = column_inside[None, :] & (k < features)[:, None]
            right = tl.load(x + column_at[None, :] + along[:, None], mask=mask, other=0.0)
        if UPCAST:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    return total


@triton.jit
def vector_sum(x):
    """Through a second axis: reducing directly what was reduced from a product ends Triton 3.7's compiler on sm_100."""
    return tl.sum(tl.reshape(x, (x.shape[0] // 4, 4)))


@triton.jit
def matrix_sum(x):
    """Every row, then the sums: a term passes through at most as many additions as there are columns and rows."""
    return vector_sum(tl.sum(x, 1))


@triton.jit
def diagonal(matrix, rows, columns):
    return tl.sum(tl.where(rows[:, None] == columns[None, :], matrix, 0.0), 1)


@triton.jit
def store_norm(norm_sq, error, n, total, reach, sums, gamma, lost):
    """``gamma * reach`` for rounding; for products below the normal range ``lost`` times the sums of squares."""
    tl.store(norm_sq + n, positive_part(total))
    tl.store(error + n, gamma * reach + lost * (sums + 1.0))


@triton.jit
def added_up(x, length, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, length, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(x + at, mask=at < length, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def finish_kernel(parts, reaches, norm_sq, error, pieces, gamma, lost, BLOCK: tl.constexpr):
    """Norm and reach of a record, each a sum of ``pieces`` parts; its sums of squares do not matter."""
    n = tl.program_id(0).to(tl.int64)
    total = added_up(parts + n * pieces, pieces, BLOCK)
    reach = added_up(reaches + n * pieces, pieces, BLOCK)
    store_norm(norm_sq, error, n, total, reach, 0.0, gamma, lost)


@triton.jit
def finish_gram_kernel(
    parts, diagonals, norm_sq, error, groups, pieces, tiles, plane, gamma, lost, BLOCK: tl.constexpr
):
    """The same where ``sqrt(reach)`` of a group is a sum over tiles of positions: the first of three planes of
    ``diagonals``; the others hold the sums of squares of both operands."""
    n = tl.program_id(0).to(tl.int64)
    total = 0.0
    reach = 0.0
    sums = 0.0
    for group in range(0, groups):
        row = n * groups + group
        total += added_up(parts + row * pieces, pieces, BLOCK)
        root = added_up(diagonals + row * tiles, tiles, BLOCK)
        reach += root * root
        sums += added_up(diagonals + plane + row * tiles, tiles, BLOCK)
        sums += added_up(diagonals + 2 * plane + row * tiles, tiles, BLOCK)
    store_norm(norm_sq, error, n, total, reach, sums, gamma, lost)
