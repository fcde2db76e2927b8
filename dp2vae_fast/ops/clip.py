"""From squared norms to clip factors."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _fit
from ._op import op


def _norm_bound(norm_sq: Tensor, error: Tensor) -> tuple[Tensor, float]:
    """Norms ``[N]`` that the exact ones do not exceed, and the factor by which to round down what divides by them.

    L additions, one square root, one division and the later product c * g each round once.
    """
    bound_sq = norm_sq.sum(0) + error.sum(0)
    return bound_sq.sqrt(), 1.0 - (norm_sq.shape[0] + 6) * torch.finfo(bound_sq.dtype).eps


def _whole(factors: Tensor, bound: Tensor) -> Tensor:
    """``factors``, and 0 where they or the bound are not finite or rounding was no longer relative: below the normal
    range."""
    tiny = torch.finfo(factors.dtype).tiny
    return torch.where(bound.isfinite() & (factors >= tiny) & factors.isfinite(), factors, 0.0)


def _native(norm_sq: Tensor, error: Tensor, *_: float) -> bool | str:
    return norm_sq.dtype == error.dtype == torch.float32 or "the kernel takes float32"


@op(native=_native, fits=_fit.norms)
def clip_factors(norm_sq: Tensor, error: Tensor, max_grad_norm: float) -> Tensor:
    """Factor by which each record's gradient is scaled so that its norm is at most ``max_grad_norm``.

    ``c[n] = min(1, max_grad_norm / sqrt(sum_l norm_sq[l, n] + error[l, n]))``, rounded down.

    Shapes:
        norm_sq ``[L, N]``, error ``[L, N]``: one row per parameter, together an upper bound of the squared
            gradient norm -> ``[N]``.
    Guarantee:
        ``c[n] * g[n]`` is no longer than ``max_grad_norm``, the rounding of this division and of that product included.
    Edge cases:
        A record whose sum is not finite gets exactly 0 (mask its rows too before a weighted sum: 0 * inf is NaN),
        and so does one whose factor is below the smallest normal number, which would be rounded by more, and up.
        A zero norm gets 1. N = 0 gives an empty tensor.
    Raises:
        ValueError: max_grad_norm is not positive and finite (one that is a tensor, whose value is not looked at, gives
        factors of 0 where it is negative or NaN), or the shapes differ.
    """
    bound, rounding = _norm_bound(norm_sq, error)
    return _whole((max_grad_norm * rounding / bound).clamp(max=1.0), bound)


@op(native=_native, fits=_fit.norms)
def normalize_factors(norm_sq: Tensor, error: Tensor, max_grad_norm: float, stability: float) -> Tensor:
    """Factor by which each record's gradient is scaled to nearly ``max_grad_norm``, short ones too.

    ``c[n] = max_grad_norm / (sqrt(sum_l norm_sq[l, n] + error[l, n]) + stability)``, rounded down: the normalisation
    of automatic clipping (Bu, Wang, Zha and Karypis 2023).

    Shapes, guarantee and edge cases:
        as :func:`clip_factors`, but a zero norm gets ``max_grad_norm / stability``, and a factor beyond the largest
        number is 0. ``stability`` is finite and not negative.
    """
    bound, rounding = _norm_bound(norm_sq, error)
    return _whole(max_grad_norm * rounding / (bound + stability), bound)
