"""Whether the operands of an op belong together: the reason why not, or the empty string.

An op checks this before it chooses a backend, so that all backends refuse the same: plain PyTorch would broadcast a
single position or record, and a cropped gradient has a shorter norm than the one that is added up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

_POSITIONS = ": make the positions one axis, by x.unsqueeze(1) where there are none and x.flatten(1, -2) where several"


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


def linear(activations: Tensor, backprops: Tensor) -> str:
    a, b = activations.shape, backprops.shape
    if len(a) == len(b) == 3 and a[0] == b[0] and a[1] == b[1]:
        return ""
    way_out = "" if len(a) == len(b) == 3 else _POSITIONS
    return _given(activations=activations, backprops=backprops) + "[N, T, D] and [N, T, P]" + way_out


def _factors(factors: Tensor, records: int) -> str:
    if factors.dim() == 1 and factors.shape[0] == records:
        return ""
    return _given(factors=factors) + f"[{records}]: one factor a record"


def linear_sum(activations: Tensor, backprops: Tensor, factors: Tensor) -> str:
    return linear(activations, backprops) or _factors(factors, activations.shape[0])


def outer_sum(activations: Tensor, backprops: Tensor, factors: Tensor) -> str:
    if wrong := linear_sum(activations, backprops, factors):
        return wrong
    if activations.shape[1] == 1:
        return ""
    given = _given(activations=activations, backprops=backprops)
    return given + "[N, 1, D] and [N, 1, P]: linear_weighted_sum takes several positions"


def kept_sum(values: Tensor, factors: Tensor) -> str:
    if values.dim() != 2:
        return _given(values=values) + "[N, M]: x.flatten(1)"
    return _factors(factors, values.shape[0])


def convolution(
    activations: Tensor,
    backprops: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
) -> str:
    a, b, dims = activations.shape, backprops.shape, len(weight_shape) - 2
    if not (1 <= dims <= 3 and len(a) == len(b) == dims + 2 and a[0] == b[0]):
        given = _given(activations=activations, backprops=backprops)
        return f"{given}[N, C_in, *in] and [N, C_out, *out] for weight_shape {list(weight_shape)}, of 1 to 3 dimensions"
    if not len(stride) == len(padding) == len(dilation) == dims:
        how = f"stride {list(stride)}, padding {list(padding)}, dilation {list(dilation)}"
        return f"{how} given, expected one number for each of {dims} spatial dimensions"
    plain, spread = (a, b) if transposed else (b, a)
    if groups < 1 or weight_shape[0] % groups or plain[1] != weight_shape[0] or spread[1] != weight_shape[1] * groups:
        layout = "[C_in, C_out / groups, *k]" if transposed else "[C_out, C_in / groups, *k]"
        return f"{a[1]} channels in, {b[1]} out, groups {groups}: weight_shape {list(weight_shape)} is not {layout}"
    for i, (s, p, d) in enumerate(zip(stride, padding, dilation, strict=True), 2):
        k = weight_shape[i]
        if s < 1 or d < 1 or k < 1 or p < 0:
            return f"kernel {k}, stride {s}, dilation {d}, padding {p}: the first three are at least 1, padding 0"
        beyond = spread[i] + 2 * p - d * (k - 1) - 1 - s * (plain[i] - 1)  # what the last position leaves unread
        if not 0 <= beyond < (max(s, d) if transposed else s):
            return _size(a, b, i, k, s, p, d, transposed)
    return ""


def _size(a: Sequence[int], b: Sequence[int], i: int, k: int, s: int, p: int, d: int, transposed: bool) -> str:
    if transposed:
        least = s * (a[i] - 1) - 2 * p + d * (k - 1) + 1
        size = f"{least} to {least + max(s, d) - 1}"
    else:
        size = str((a[i] + 2 * p - d * (k - 1) - 1) // s + 1)
    return (
        f"activations {list(a)}, backprops {list(b)} given: axis {i} of backprops must be {size} for kernel {k}, "
        f"stride {s}, padding {p}, dilation {d}; pass the gradient of the layer's whole output"
    )


def convolution_sum(activations: Tensor, backprops: Tensor, factors: Tensor, *geometry: Any) -> str:
    return convolution(activations, backprops, *geometry) or _factors(factors, activations.shape[0])


def embedding(indices: Tensor, backprops: Tensor, padding_idx: int) -> str:
    i, b = indices.shape, backprops.shape
    if len(i) == 2 and len(b) == 3 and i[0] == b[0] and i[1] == b[1]:
        return ""
    return _given(indices=indices, backprops=backprops) + "[N, T] and [N, T, D], with an axis of positions"


def _normalisation(activations: Tensor, backprops: Tensor, axes: str) -> str:
    if activations.dim() == 3 and activations.shape == backprops.shape:
        return ""
    return _given(activations=activations, backprops=backprops) + f"{axes} of both"


def group_norm(activations: Tensor, backprops: Tensor, groups: int, eps: float) -> str:
    if wrong := _normalisation(activations, backprops, "[N, C, S]"):
        return wrong
    channels = activations.shape[1]
    return "" if groups >= 1 and channels % groups == 0 else f"groups is {groups}: it must divide {channels} channels"


def layer_norm(activations: Tensor, backprops: Tensor, rms: bool, eps: float) -> str:
    return _normalisation(activations, backprops, "[N, R, D]")
