"""Per-sample gradients of the scale and the bias of normalisation layers, from a layer's input and output gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _fit
from ._op import op
from .norm import widen


def _native_pair(activations: Tensor, backprops: Tensor, *_: object) -> bool | str:
    if 0 in activations.shape:
        return "an operand is empty"
    return activations.dtype == backprops.dtype == torch.float32 or "the kernels take float32"


def _native_rows(activations: Tensor, backprops: Tensor, *_: object) -> bool | str:
    if activations.stride(2) != 1 or backprops.stride(2) != 1:
        return "the kernel takes contiguous features"
    return _native_pair(activations, backprops)


@op(native=_native_pair, fits=_fit.group_norm)
def group_norm_grad_sample(activations: Tensor, backprops: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of a group norm's scale and bias: ``sum_s x_hat[n, c, s] backprops[n, c, s]`` and without ``x_hat``.

    Shapes:
        activations (the layer's input) and backprops ``[N, C, S]`` -> scale ``[N, C]``, bias ``[N, C]``, in float32 or
        wider. Instance norm is group norm of C groups.
    """
    activations, backprops = widen(activations), widen(backprops)
    if 0 in activations.shape:
        return backprops.sum(2), backprops.sum(2)
    normalized = F.group_norm(activations, groups, eps=eps)
    return (normalized * backprops).sum(2), backprops.sum(2)


@op(native=_native_rows, fits=_fit.layer_norm)
def layer_norm_grad_sample(activations: Tensor, backprops: Tensor, rms: bool, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of a layer norm's (``rms``: an RMS norm's) scale and bias.

    Shapes:
        activations (the layer's input) and backprops ``[N, R, D]``, normalised over D at each of R rows -> scale
        ``[N, D]``, bias ``[N, D]``, in float32 or wider.
    """
    activations, backprops = widen(activations), widen(backprops)
    shape = [activations.shape[2]]
    if rms:
        normalized = F.rms_norm(activations, shape, eps=eps)
    else:
        normalized = F.layer_norm(activations, shape, eps=eps)
    return (normalized * backprops).sum(1), backprops.sum(1)
