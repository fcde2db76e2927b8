"""From squared norms to clip factors."""

from __future__ import annotations

import torch
from torch import Tensor

from ._op import op


@op()
def clip_factors(norm_sq: Tensor, error: Tensor, max_grad_norm: float) -> Tensor:
    """Factor by which each record's gradient is scaled so that its norm is at most ``max_grad_norm``.

    ``c[n] = min(1, max_grad_norm / sqrt(sum_l norm_sq[l, n] + error[l, n]))``, rounded down.

    Shapes:
        norm_sq ``[L, N]``, error ``[L, N]``: one row per parameter, together an upper bound of the squared
            gradient norm -> ``[N]``.
    Guarantee:
        ``c[n] * g[n]`` is no longer than ``max_grad_norm``, the rounding of this division and of that product included.
    Edge cases:
        A record whose sum is not finite gets exactly 0 (mask its rows too before a weighted sum: 0 * inf is NaN).
        A zero norm gets 1. N = 0 gives an empty tensor.
    """
    bound_sq = norm_sq.sum(0) + error.sum(0)
    # L additions, one square root, one division and the later product c * g each round once.
    rounding = 1.0 - (norm_sq.shape[0] + 6) * torch.finfo(bound_sq.dtype).eps
    factors = (max_grad_norm * rounding / bound_sq.sqrt()).clamp(max=1.0)
    return torch.where(bound_sq.isfinite(), factors, 0.0)
