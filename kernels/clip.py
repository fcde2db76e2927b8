"""Clip factors of a batch from the norms of all layers, in one launch."""

from __future__ import annotations

import math

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from dp2vae_fast.ops.clip import clip_factors, normalize_factors

from . import blocks
from ._common import launch, takes


@triton.jit
def factors_kernel(
    norm_sq,
    error,
    factors,
    layers,
    records,
    norm_layer,
    norm_record,
    error_layer,
    error_record,
    numerator,
    stability,
    CLIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = n < records
    norms = tl.zeros((BLOCK,), tl.float32)
    errors = tl.zeros((BLOCK,), tl.float32)
    for layer in range(0, layers):
        at = tl.cast(layer, tl.int64)
        norms += tl.load(norm_sq + at * norm_layer + n * norm_record, mask=inside, other=0.0)
        errors += tl.load(error + at * error_layer + n * error_record, mask=inside, other=0.0)
    bound = tl.sqrt_rn(norms + errors)
    if CLIP:
        factor = tl.div_rn(tl.full((BLOCK,), numerator, tl.float32), bound)
        factor = tl.where(factor > 1.0, 1.0, factor)  # a NaN stays
    else:
        factor = tl.div_rn(tl.full((BLOCK,), numerator, tl.float32), bound + stability)
    # NaN is in no range; below that of normal numbers the division would round by more, and up.
    whole = (bound < float("inf")) & (factor >= 2.0**-126) & (factor < float("inf"))
    factor = tl.where(whole, factor, 0.0)
    tl.store(factors + n, factor, mask=inside)


def _round_down(x: float) -> float:
    """The largest float32 that is at most ``x``, which is positive: kernels take scalars in float32."""
    with np.errstate(over="ignore"):
        near = np.float32(x)
    return float(near if float(near) <= x else np.nextafter(near, np.float32(0)))


def _factors(norm_sq: Tensor, error: Tensor, max_grad_norm: float, stability: float, clip: bool) -> Tensor:
    layers, records = norm_sq.shape
    factors = norm_sq.new_empty(records)
    # As in the reference: L additions, the root, the division, this product's cast and that with the gradient.
    numerator = _round_down(max_grad_norm * (1.0 - (layers + 6) * torch.finfo(torch.float32).eps))
    options = blocks.choose("factors", norm_sq, records)
    launch(
        factors_kernel,
        math.ceil(records / options["BLOCK"]),
        norm_sq,
        norm_sq,
        error,
        factors,
        layers,
        records,
        *norm_sq.stride(),
        *error.stride(),
        numerator,
        stability,
        CLIP=clip,
        **options,
    )
    return factors


def _supports(norm_sq: Tensor, error: Tensor, *_: float) -> bool | str:
    return takes(norm_sq, error, dtypes=(torch.float32,))


@clip_factors.register("triton", supports=_supports)
def _clip_factors(norm_sq: Tensor, error: Tensor, max_grad_norm: float) -> Tensor:
    return _factors(norm_sq, error, max_grad_norm, 0.0, clip=True)


@normalize_factors.register("triton", supports=_supports)
def _normalize_factors(norm_sq: Tensor, error: Tensor, max_grad_norm: float, stability: float) -> Tensor:
    return _factors(norm_sq, error, max_grad_norm, stability, clip=False)
