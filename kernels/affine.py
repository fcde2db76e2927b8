"""Per-sample gradients of the scale and the bias of normalisation layers: input and output gradient are read once.

Moments are taken about a value near the mean and then about the mean itself, for moments about zero lose the digits
that a large mean takes.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dp2vae_fast.ops.affine import group_norm_grad_sample, layer_norm_grad_sample

from . import blocks
from ._common import launch, takes

_MAX_FEATURES = 8192  # that a program of the layer norm holds


@triton.jit
def channel_moments_kernel(
    x,
    b,
    moments,
    channels,
    sites,
    x_record,
    x_channel,
    x_site,
    b_record,
    b_channel,
    b_site,
    pieces,
    plane,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Of each channel a shift near its mean, and the sums of u, u^2, b and u b over its sites, u = x - shift."""
    pid = tl.program_id(0)
    n = (pid // pieces).to(tl.int64)
    channel = pid % pieces * BLOCK_C + tl.arange(0, BLOCK_C)
    real = channel < channels
    x_at = x + n * x_record + channel.to(tl.int64) * x_channel
    b_at = b + n * b_record + channel.to(tl.int64) * b_channel
    site = tl.arange(0, BLOCK_S)
    mask = real[:, None] & (site < sites)[None, :]
    start = tl.load(x_at[:, None] + site.to(tl.int64)[None, :] * x_site, mask=mask, other=0.0).to(tl.float32)
    shift = tl.sum(start, 1) / tl.minimum(sites, BLOCK_S)
    sum_u = tl.zeros((BLOCK_C,), tl.float32)
    sum_uu = tl.zeros((BLOCK_C,), tl.float32)
    sum_b = tl.zeros((BLOCK_C,), tl.float32)
    sum_ub = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, sites, BLOCK_S):
        site = first + tl.arange(0, BLOCK_S)
        mask = real[:, None] & (site < sites)[None, :]
        u = tl.load(x_at[:, None] + site.to(tl.int64)[None, :] * x_site, mask=mask, other=0.0).to(tl.float32)
        u = tl.where(mask, u - shift[:, None], 0.0)
        v = tl.load(b_at[:, None] + site.to(tl.int64)[None, :] * b_site, mask=mask, other=0.0).to(tl.float32)
        sum_u += tl.sum(u, 1)
        sum_uu += tl.sum(u * u, 1)
        sum_b += tl.sum(v, 1)
        sum_ub += tl.sum(u * v, 1)
    to = moments + n * channels + channel
    tl.store(to, shift, mask=real)
    tl.store(to + plane, sum_u, mask=real)
    tl.store(to + 2 * plane, sum_uu, mask=real)
    tl.store(to + 3 * plane, sum_b, mask=real)
    tl.store(to + 4 * plane, sum_ub, mask=real)


@triton.jit
def group_norm_kernel(moments, weight, bias, channels, size, sites, plane, eps, BLOCK: tl.constexpr):
    """From the moments of a group's channels to those of the group, and on to its gradients."""
    group = tl.program_id(0).to(tl.int64)  # over records and groups; `size` channels each
    row = moments + group * size
    means = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, size, BLOCK):
        at = first + tl.arange(0, BLOCK)
        means += tl.load(row + at, mask=at < size, other=0.0)
        means += tl.load(row + plane + at, mask=at < size, other=0.0) / sites
    mean = tl.sum(means, 0) / size
    rests = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, size, BLOCK):
        at = first + tl.arange(0, BLOCK)
        rest = tl.load(row + at, mask=at < size, other=0.0) - mean
        rest += tl.load(row + plane + at, mask=at < size, other=0.0) / sites
        rests += tl.where(at < size, rest, 0.0)
    rest = tl.sum(rests, 0) / size  # what the mean was off by
    squares = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, size, BLOCK):
        at = first + tl.arange(0, BLOCK)
        sum_u = tl.load(row + plane + at, mask=at < size, other=0.0)
        sum_uu = tl.load(row + 2 * plane + at, mask=at < size, other=0.0)
        off = tl.load(row + at, mask=at < size, other=0.0) - mean - rest + sum_u / sites
        squares += tl.where(at < size, sum_uu - sum_u * sum_u / sites + sites * off * off, 0.0)
    variance = tl.sum(squares, 0) / (size * sites)
    scale = 1.0 / tl.sqrt_rn(tl.where(variance < 0, 0.0, variance) + eps)
    for first in range(0, size, BLOCK):
        at = first + tl.arange(0, BLOCK)
        off = tl.load(row + at, mask=at < size, other=0.0) - mean - rest
        sum_b = tl.load(row + 3 * plane + at, mask=at < size, other=0.0)
        sum_ub = tl.load(row + 4 * plane + at, mask=at < size, other=0.0)
        tl.store(weight + group * size + at, (sum_ub + off * sum_b) * scale, mask=at < size)
        tl.store(bias + group * size + at, sum_b, mask=at < size)


def _supports_group_norm(activations: Tensor, backprops: Tensor, groups: int, eps: float) -> bool | str:
    return "an operand is empty" if 0 in activations.shape else takes(activations, backprops)


@group_norm_grad_sample.register("triton", supports=_supports_group_norm)
def _group_norm(activations: Tensor, backprops: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    records, channels, sites = activations.shape
    weight, bias = (activations.new_empty((records, channels), dtype=torch.float32) for _ in range(2))
    moments = activations.new_empty((5, records, channels), dtype=torch.float32)
    options = blocks.choose("channels", activations, sites)
    pieces = math.ceil(channels / options["BLOCK_C"])
    steps = (*activations.stride(), *backprops.stride())
    sizes = (channels, sites, *steps, pieces, records * channels)
    launch(
        channel_moments_kernel,
        records * pieces,
        activations,
        *(activations, backprops, moments, *sizes),
        **options,
    )
    sizes = (channels, channels // groups, sites, records * channels)
    final = blocks.choose("group_norm", activations)
    launch(group_norm_kernel, records * groups, activations, moments, weight, bias, *sizes, eps, **final)
    return weight, bias


@triton.jit
def layer_norm_kernel(
    x,
    b,
    weights,
    biases,
    rows,
    features,
    x_record,
    x_row,
    x_feature,
    b_record,
    b_row,
    b_feature,
    pieces,
    eps,
    RMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sums over ROWS rows of one record, to one row of ``[N, pieces, D]``."""
    pid = tl.program_id(0)
    n = (pid // pieces).to(tl.int64)
    first = pid % pieces * ROWS
    at = tl.arange(0, BLOCK)
    inside = at < features
    weight = tl.zeros((BLOCK,), tl.float32)
    bias = tl.zeros((BLOCK,), tl.float32)
    for row in range(first, tl.minimum(first + ROWS, rows)):
        x_at = x + n * x_record + tl.cast(row, tl.int64) * x_row
        b_at = b + n * b_record + tl.cast(row, tl.int64) * b_row
        u = tl.load(x_at + at.to(tl.int64) * x_feature, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(b_at + at.to(tl.int64) * b_feature, mask=inside, other=0.0).to(tl.float32)
        if not RMS:
            u = tl.where(inside, u - tl.sum(u, 0) / features, 0.0)
            u = tl.where(inside, u - tl.sum(u, 0) / features, 0.0)  # what the mean was off by
        weight += u * v / tl.sqrt_rn(tl.sum(u * u, 0) / features + eps)
        bias += v
    to = tl.cast(pid, tl.int64) * features + at
    tl.store(weights + to, weight, mask=inside)
    tl.store(biases + to, bias, mask=inside)


def _supports_layer_norm(activations: Tensor, backprops: Tensor, rms: bool, eps: float) -> bool | str:
    if 0 in activations.shape:
        return "an operand is empty"
    if activations.shape[2] > _MAX_FEATURES:
        return f"the kernel takes up to {_MAX_FEATURES} features"
    return takes(activations, backprops)


@layer_norm_grad_sample.register("triton", supports=_supports_layer_norm)
def _layer_norm(activations: Tensor, backprops: Tensor, rms: bool, eps: float) -> tuple[Tensor, Tensor]:
    records, rows, features = activations.shape
    options = blocks.choose("layer_norm", activations, features)
    pieces = math.ceil(rows / options["ROWS"])
    weights, biases = (activations.new_empty((records, pieces, features), dtype=torch.float32) for _ in range(2))
    steps = (*activations.stride(), *backprops.stride())
    launch(
        layer_norm_kernel,
        records * pieces,
        activations,
        *(activations, backprops, weights, biases, rows, features, *steps, pieces, eps),
        RMS=rms,
        BLOCK=triton.next_power_of_2(features),
        **options,
    )
    return (weights[:, 0], biases[:, 0]) if pieces == 1 else (weights.sum(1), biases.sum(1))
