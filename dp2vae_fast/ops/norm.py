"""Squared norms of per-sample weight gradients, each with a bound of its rounding error.

A layer that uses its weight at T positions has, for record n, the weight gradient

    G[n] = sum_t  backprops[n, t]  outer  activations[n, t].

The ops here never form ``G``: ``|G[n]|^2`` is ``sum_{t,t'} <a_t, a_t'> <b_t, b_t'>``, the product of two Gram matrices.
It costs about ``T^2 (D + P)`` multiplications and wins where T is small; where T is large and the weight small, forming
``G[n]`` with ``T D P`` of them (:mod:`.gradient`) does.

Every ``*_norm_sq`` returns two tensors ``[N]``: the squared norm as computed, and an ``error`` such that

    |G[n]|^2  <=  norm_sq[n] + error[n]

holds for the exact gradient of the given operands, whatever order the additions were made in (Higham, *Accuracy and
Stability of Numerical Algorithms*, ch. 3: an inner product of length m is off by at most ``m u / (1 - m u)`` times
the inner product of magnitudes). The clip factor divides by the sum of the two, which keeps every record's
realised contribution within its bound even where a Gram sum cancels. Operands of lower precision than float32 are
widened first, so ``u`` is the unit roundoff of float32 or float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _fit
from ._op import op

_NATIVE_DTYPES = (torch.float32, torch.bfloat16)
_ROUNDOFF = {"bf16": 2.0**-8, "tf32": 2.0**-11}
# Ratio by which `error` exceeds the first-order bound: covers the rounding of the error term itself, whose own
# relative error is far below one per cent at any length for which the bound is of use.
_MARGIN = 1.02
CHUNK = 64  # positions that kernels add up in one accumulator (csrc/cpu/product.h, kernels/weighted.py)
# What a term of a sum loses on tensor cores, in units of 2^-24 an addition. They align the few products of one
# instruction (4 or more) to the largest and cut off what lies below, then cut off their sum: at most 2^-23 for each of
# 4 products and the accumulator, or 2.5 units a product (Fasi, Higham, Mikaitis and Pranesh 2021).
MMA_ROUNDINGS = 3


def product_depth(positions: int, device: torch.device) -> int:
    """Float32 roundings that a term of one record's product over T positions passes through at most, however
    :mod:`.gradient` forms it on such a device.

    On a GPU that may be by tensor cores, so it is counted whatever the operands are: the backend that takes the norm
    need not be the one that adds up.
    """
    depth = positions if positions <= CHUNK else CHUNK + -(-positions // CHUNK)
    return depth if device.type == "cpu" else MMA_ROUNDINGS * depth


def product_error(positions: int, like: Tensor) -> float:
    """What one record's product over T positions is off by at most, however formed and added with its factor: a part
    of the lengths of its T terms, added up.

    A GPU's kernels round the operands, two a term, where the user allows it; a CPU's multiply them as they are.
    """
    rounded = 0.0 if like.device.type == "cpu" else 2 * operand_roundoff(like)
    return 2.0**-24 * (product_depth(positions, like.device) + 1) + rounded


def native_convolution(activations: Tensor, backprops: Tensor, *_: object) -> bool | str:
    """Whether the C++ kernels of products take these operands; if not, why not."""
    if activations.dtype not in _NATIVE_DTYPES or backprops.dtype not in _NATIVE_DTYPES:
        return "the kernels take float32 and bfloat16"
    if 0 in activations.shape[1:] or 0 in backprops.shape[1:]:
        return "an operand is empty"
    return True


def native_product(activations: Tensor, backprops: Tensor, *_: object) -> bool | str:
    """The same for linear layers ``[N, T, D]``."""
    if activations.shape[1] == 1:
        return "one position is the vendor library's"
    return native_convolution(activations, backprops)


def _native_norms(activations: Tensor, backprops: Tensor) -> bool | str:
    """The same for norms. Gradients of one position that are kept, and their sums on a GPU, are the vendor library's
    products, whose rounding of operands the reference counts."""
    if activations.shape[1] != 1:
        return native_convolution(activations, backprops)
    rows = activations.stride(2) == backprops.stride(2) == 1 and 0 not in (activations.shape[2], backprops.shape[2])
    plain = activations.dtype == backprops.dtype == torch.float32 and rows and operand_roundoff(activations) == 0.0
    return plain or "of one position it takes float32 rows, which products do not round"


def operand_roundoff(like: Tensor) -> float:
    """Relative error with which matrix products and convolutions round their float32 operands before multiplying, as
    this process is set.

    Zero unless the user allowed TF32 or bfloat16 products (``torch.set_float32_matmul_precision``,
    ``torch.backends.*.fp32_precision``; on CUDA TF32 is PyTorch's default for convolutions).
    """
    if like.dtype == torch.float64:
        return 0.0
    backends: Any = torch.backends
    products = (
        (backends.cuda.matmul, backends.cudnn.conv) if like.is_cuda else (backends.mkldnn.matmul, backends.mkldnn.conv)
    )
    return max([_ROUNDOFF.get(product.fp32_precision, 0.0) for product in products])


def _gamma(length: int, like: Tensor) -> float:
    """Relative error bound of a squared norm formed by sums of ``length`` products, with the module's margin.

    Where operands are rounded, four of them enter a squared norm and two, doubled by the square, the weighted
    gradient that is
    formed from the same operands afterwards: eight roundings in all.
    """
    x = length * (2.0**-53 if like.dtype == torch.float64 else 2.0**-24)
    return _MARGIN * (x / (1.0 - x) + 8 * operand_roundoff(like)) if x < 1.0 else math.inf


def _underflow(length: int, *squares: Tensor) -> Tensor:
    """What products below the normal range may have lost of a product of two sums of squares, of at most ``length``
    terms each.

    A lost term is below ``tiny``, and its cofactor at most the other sum: a record of huge activations and
    vanishing backprops would otherwise have a norm of zero.
    """
    return length * torch.finfo(squares[0].dtype).tiny * (sum(squares[1:], squares[0]) + 1)


def _native_rows(grad_sample: Tensor) -> bool | str:
    plain = grad_sample.dtype == torch.float32 and grad_sample.dim() >= 1 and grad_sample.is_contiguous()
    return plain or "the kernel takes contiguous float32"


def widen(x: Tensor) -> Tensor:
    """``x`` in float32, or float64 if it already is: the precision in which norms and sums over records are formed."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _gram_norm(gram_a: Tensor, gram_b: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Finish ``sum_{t,t'} A[t,t'] B[t,t']`` for Gram matrices ``[N, G, T, T]``; groups add.

    ``sum_{t,t'} |A||B| <= (sum_t |a_t||b_t|)^2`` by Cauchy-Schwarz, and the diagonals hold the norms: the error
    bound is free.
    """
    norm_sq = (gram_a * gram_b).sum(-1).sum(-1).sum(-1)
    squares_a, squares_b = gram_a.diagonal(dim1=-2, dim2=-1), gram_b.diagonal(dim1=-2, dim2=-1)
    reach = (squares_a * squares_b).clamp(min=0).sqrt().sum(-1).square().sum(-1)
    positions = gram_a.shape[-1]
    lost = _underflow(length * positions**2, squares_a.sum((1, 2)), squares_b.sum((1, 2)))
    length += 2 * positions + gram_a.shape[1] + 2 * (product_depth(positions, gram_a.device) + 1) + 2
    return norm_sq.clamp(min=0), _gamma(length, norm_sq) * reach + lost


@op(native=_native_norms, fits=_fit.linear)
def linear_norm_sq(activations: Tensor, backprops: Tensor) -> tuple[Tensor, Tensor]:
    """Squared norm of the per-sample weight gradient of a linear layer, by Gram matrices.

    Equivalent to ``torch.einsum("ntp,ntd->npd", backprops, activations).flatten(1).square().sum(1)``.

    Shapes:
        activations ``[N, T, D]``, backprops ``[N, T, P]`` -> norm_sq ``[N]``, error ``[N]``.
    Guarantee:
        ``norm_sq + error`` is an upper bound of the exact squared norm (module docstring).
    Edge cases:
        N = 0 gives empty tensors, T = 0 gives zeros, a non-finite operand gives a non-finite result.
    """
    a, b = widen(activations), widen(backprops)
    dtype = torch.promote_types(a.dtype, b.dtype)
    a, b = a.to(dtype), b.to(dtype)
    if a.shape[1] == 1:  # one position: |a|^2 |b|^2, and every partial product is positive
        (squares_a, _), (squares_b, _) = grad_sample_norm_sq(a), grad_sample_norm_sq(b)
        length = a.shape[2] + b.shape[2]
        norm_sq = squares_a * squares_b
        return norm_sq, _gamma(length + 1, a) * norm_sq + _underflow(length, squares_a, squares_b)
    gram_a, gram_b = a @ a.transpose(1, 2), b @ b.transpose(1, 2)
    return _gram_norm(gram_a.unsqueeze(1), gram_b.unsqueeze(1), a.shape[2] + b.shape[2])


def conv_roles(activations: Tensor, backprops: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    """(plain, spread) of a convolution: the operand on the grid of positions t, and the one read through the taps.

    A convolution reads its input through the taps, a transposed one its output gradient; with the roles swapped
    both have the weight gradient ``sum_t plain[o, t] spread[c, s t + d tap - p]`` and the same code.
    """
    plain, spread = (activations, backprops) if transposed else (backprops, activations)
    plain, spread = widen(plain), widen(spread)
    dtype = torch.promote_types(plain.dtype, spread.dtype)
    return plain.to(dtype), spread.to(dtype)


@op(native=native_convolution, fits=_fit.convolution)
def conv_norm_sq(
    activations: Tensor,
    backprops: Tensor,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    transposed: bool,
) -> tuple[Tensor, Tensor]:
    """Squared norm of the per-sample weight gradient of an n-dimensional (transposed) convolution, without unfolding.

    ``sum_{t,t'} B[t,t'] sum_tap X[s t + d tap - p, s t' + d tap - p]`` with the Gram matrices B of the plain operand
    and X of the pixels of the other: channel products are made once per pair of pixels and only *added up* over taps.
    With stride s a tap reads pixels of one phase ``(d tap - p) mod s`` only, so X is taken phase by phase.

    Shapes:
        as :func:`~.gradient.conv_kept`; -> norm_sq ``[N]``, error ``[N]``.
    Guarantee:
        ``norm_sq + error`` is an upper bound of the exact squared norm (module docstring).
    Edge cases:
        N = 0 gives empty tensors; positions outside the input count as zero; non-finite operands give a non-finite
        result.
    """
    plain, spread = conv_roles(activations, backprops, transposed)
    n, kernel, grid = plain.shape[0], weight_shape[2:], list(plain.shape[2:])
    dims, positions = len(grid), math.prod(grid)
    plain = plain.reshape(n, groups, weight_shape[0] // groups, positions)
    gram_plain = plain.transpose(2, 3) @ plain
    gram_windows = torch.zeros(n, groups, *grid, *grid, dtype=plain.dtype, device=plain.device)
    phases: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for tap in itertools.product(*(range(k) for k in kernel)):
        offset = [d * t - p for d, t, p in zip(dilation, tap, padding, strict=True)]
        phase = tuple(o % s for o, s in zip(offset, stride, strict=True))
        phases.setdefault(phase, []).append(tuple(o // s for o, s in zip(offset, stride, strict=True)))
    for phase, shifts in phases.items():
        pixels = spread[(..., *(slice(f, None, s) for f, s in zip(phase, stride, strict=True)))]
        sizes = list(pixels.shape[2:])
        if math.prod(sizes) == 0:
            continue
        pixels = pixels.reshape(n, groups, weight_shape[1], math.prod(sizes))
        gram_pixels = (pixels.transpose(2, 3) @ pixels).reshape(n, groups, *sizes, *sizes)
        for shift in shifts:  # position t reads pixel t + shift of this phase, where there is one
            first = [max(0, -o) for o in shift]
            last = [min(g, m - o) for g, m, o in zip(grid, sizes, shift, strict=True)]
            if any(lo >= hi for lo, hi in zip(first, last, strict=True)):
                continue
            here = tuple(slice(lo, hi) for lo, hi in zip(first, last, strict=True))
            there = tuple(slice(lo + o, hi + o) for lo, hi, o in zip(first, last, shift, strict=True))
            gram_windows[(..., *here, *here)] += gram_pixels[(..., *there, *there)]
    gram_windows = gram_windows.reshape(n, groups, positions, positions)
    length = weight_shape[0] // groups + weight_shape[1] + math.prod(kernel) + dims
    return _gram_norm(gram_windows, gram_plain, length)


def _native_embedding(indices: Tensor, backprops: Tensor, padding_idx: int) -> bool | str:
    plain = indices.dtype == torch.int64 and backprops.dtype == torch.float32
    return plain or "the kernel takes int64 indices and float32"


@op(native=_native_embedding, fits=_fit.embedding)
def embedding_norm_sq(indices: Tensor, backprops: Tensor, padding_idx: int) -> tuple[Tensor, Tensor]:
    """Squared norm of the per-sample gradient of an embedding table, without a dense gradient.

    Rows that name the same entry add before they are squared: ``sum_{t,t'} [i_t = i_t'] <b_t, b_t'>``. Rows at
    ``padding_idx`` contribute nothing; a negative ``padding_idx`` means that there is none.

    Shapes:
        indices ``[N, T]`` (integers), backprops ``[N, T, D]`` -> norm_sq ``[N]``, error ``[N]``.
    Guarantee:
        ``norm_sq + error`` is an upper bound of the exact squared norm (module docstring).
    """
    b = widen(backprops)
    same = (indices.unsqueeze(2) == indices.unsqueeze(1)) & (indices != padding_idx).unsqueeze(2)
    gram = (b @ b.transpose(1, 2)).masked_fill(~same, 0)
    length = b.square().sum(2).sqrt()
    reach = (length.unsqueeze(2) * length.unsqueeze(1)).masked_fill(~same, 0).sum(-1).sum(-1)
    norm_sq = gram.sum(-1).sum(-1).clamp(min=0)
    lost = b.shape[2] * b.shape[1] ** 2 * torch.finfo(b.dtype).tiny
    return norm_sq, _gamma(b.shape[2] + 2 * b.shape[1] + 2, b) * reach + lost


@op(native=_native_rows)
def grad_sample_norm_sq(grad_sample: Tensor) -> tuple[Tensor, Tensor]:
    """Squared norm of per-sample gradients that have been formed: ``[N, ...] -> norm_sq [N], error [N]``.

    Equivalent to ``grad_sample.flatten(1).square().sum(1)``, with the error bound of a sum in two levels.
    """
    g = widen(grad_sample)
    rows = g.shape[1] if g.dim() > 1 else 1
    g = g.reshape(g.shape[0], rows, math.prod(g.shape[2:]))
    norm_sq = g.square().sum(2).sum(1)
    lost = g.shape[1] * g.shape[2] * torch.finfo(g.dtype).tiny  # squares below the normal range
    return norm_sq, _gamma(g.shape[1] + g.shape[2] + 1, g) * norm_sq + lost


def per_dim(value: int | Sequence[int], dims: int, name: str) -> list[int]:
    """``value`` as one int a spatial dimension, the way convolution arguments are written.

    Raises:
        ValueError: a sequence of another length than ``dims``.
    """
    values = [value] * dims if isinstance(value, int) else [int(v) for v in value]
    if len(values) != dims:
        raise ValueError(f"{name} has {len(values)} values for {dims} spatial dimensions: give one int or {dims}")
    return values
