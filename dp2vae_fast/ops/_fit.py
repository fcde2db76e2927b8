"""Whether the operands of an op belong together: the reason why not, or the empty string.

An op checks this before it chooses a backend, so that all backends refuse the same: plain PyTorch would broadcast a
single position or record, and a cropped gradient has a shorter norm than the one that is added up.
"""

from __future__ import annotations

import math

from torch import Tensor

def _given(**tensors: Tensor) -> str:
    return ", ".join(f"{name} {list(x.shape)}" for name, x in tensors.items()) + " given, expected "


def norms(norm_sq: Tensor, error: Tensor, max_grad_norm: float, stability: float = 0.0) -> str:
    """Of a bound only numbers are looked at: a tensor's value may be on a GPU, and without a bound factors are 0."""
    shape = norm_sq.shape
    if len(shape) != 2 or shape != error.shape:
        return _given(norm_sq=norm_sq, error=error) + "[L, N] of both: one row per parameter, x[None] where it is one"
    if not isinstance(max_grad_norm, Tensor) and not 0 < max_grad_norm < math.inf:
        return f"max_grad_norm is {max_grad_norm}: it must be positive and finite"
    if not isinstance(stability, Tensor) and not 0 <= stability < math.inf:
        return f"stability is {stability}: it must be finite and not negative"
    return ""
