"""ChaCha20 noise added, or turned into a step of SGD or Adam, in one pass over each parameter.

A lane draws one block of the generator, whose 16 words belong to elements that lie 8 apart (`ops/noise.py`): every
warp reads and writes runs of 8 elements, the sectors of 32 bytes that memory is made of. No noise reaches memory.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dp2vae_fast.ops import noise

from . import blocks
from ._common import DTYPES, INTERPRETED, launch, takes
from .chacha20 import EXACT, chacha20, normals

# These change from call to call, and a kernel must not be compiled anew for a value that happens to be 1.
_VARYING = ["first", "index"]


@triton.jit
def start(step, first, index, BLOCK: tl.constexpr):
    """The lanes' blocks, and the nonce as unsigned words."""
    block = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return block, first.to(tl.uint32), tl.load(step).to(tl.uint32), index.to(tl.uint32)


@triton.jit(do_not_specialize=_VARYING)
def random_words_kernel(words, key, step, n, first, index, BLOCK: tl.constexpr):
    block, first, now, index = start(step, first, index, BLOCK)
    x = chacha20(key, first, now, index, block.to(tl.uint32))
    for w in tl.static_range(16):
        at = 16 * block + w
        tl.store(words + at, x[w].to(tl.int32, bitcast=True), mask=at < n)


@triton.jit(do_not_specialize=_VARYING)
def add_noise_kernel(data, key, step, n, first, index, std, BLOCK: tl.constexpr):
    block, first, now, index = start(step, first, index, BLOCK)
    z = normals(key, first, now, index, block.to(tl.uint32))
    element = block // 8 * 128 + block % 8
    for w in tl.static_range(16):
        at = element + 8 * w
        value = tl.load(data + at, mask=at < n, other=0.0).to(tl.float32) + std * z[w]
        tl.store(data + at, value.to(data.dtype.element_ty), mask=at < n)


@triton.jit(do_not_specialize=_VARYING)
def noise_sgd_kernel(
    weights,  # Triton's own wrapper has a variable named params
    sums,
    buffers,
    key,
    step,
    n,
    first,
    index,
    std,
    scale,
    lr,
    momentum,
    undamped,
    weight_decay,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    FIRST_STEP: tl.constexpr,
    DECAYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block, first, now, index = start(step, first, index, BLOCK)
    z = normals(key, first, now, index, block.to(tl.uint32))
    element = block // 8 * 128 + block % 8
    for w in tl.static_range(16):
        at = element + 8 * w
        inside = at < n
        param = tl.load(weights + at, mask=inside, other=0.0)
        grad = (tl.load(sums + at, mask=inside, other=0.0) + std * z[w]) * scale
        if DECAYS:
            grad = grad + weight_decay * param
        if MOMENTUM:
            average = grad
            if not FIRST_STEP:
                average = tl.load(buffers + at, mask=inside, other=0.0) * momentum + undamped * grad
            tl.store(buffers + at, average, mask=inside)
            grad = grad + momentum * average if NESTEROV else average
        tl.store(weights + at, param - lr * grad, mask=inside)


@triton.jit(do_not_specialize=_VARYING)
def noise_adam_kernel(
    weights,
    sums,
    exp_avgs,
    exp_avg_sqs,
    max_exp_avg_sqs,
    key,
    step,
    n,
    first,
    index,
    std,
    scale,
    step_size,
    lerp_weight,
    beta2,
    one_minus_beta2,
    root_correction2,
    eps,
    weight_decay,
    shrink,
    AMSGRAD: tl.constexpr,
    DECAYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block, first, now, index = start(step, first, index, BLOCK)
    z = normals(key, first, now, index, block.to(tl.uint32))
    element = block // 8 * 128 + block % 8
    for w in tl.static_range(16):
        at = element + 8 * w
        inside = at < n
        param = tl.load(weights + at, mask=inside, other=0.0) * shrink
        grad = (tl.load(sums + at, mask=inside, other=0.0) + std * z[w]) * scale
        if DECAYS:
            grad = grad + weight_decay * param
        average = tl.load(exp_avgs + at, mask=inside, other=0.0)
        average = average + lerp_weight * (grad - average)
        square = tl.load(exp_avg_sqs + at, mask=inside, other=0.0) * beta2 + one_minus_beta2 * grad * grad
        tl.store(exp_avgs + at, average, mask=inside)
        tl.store(exp_avg_sqs + at, square, mask=inside)
        if AMSGRAD:
            largest = tl.load(max_exp_avg_sqs + at, mask=inside, other=0.0)
            square = tl.where(largest < square, square, largest)
            tl.store(max_exp_avg_sqs + at, square, mask=inside)
        divisor = tl.div_rn(tl.sqrt_rn(square), root_correction2 + tl.zeros((BLOCK,), tl.float32)) + eps
        tl.store(weights + at, param - tl.div_rn(step_size * average, divisor), mask=inside)


def _signed(word: int) -> int:
    """The 32-bit word as the kernels take it: always an int32."""
    return word - (1 << 32) if word >= 1 << 31 else word


def _draw(
    kernel: Any,
    lists: list[list[Tensor]],
    key: Tensor,
    step: Tensor,
    mechanism: int,
    domain: int,
    indices: list[int],
    *scalars: float,
    **flags: bool,
) -> None:
    """One launch for each parameter, a lane for every block of its noise."""
    if not lists[0]:
        return
    in_range = (step >= 0) & (step < 1 << 32)
    torch.ops.aten._assert_async.msg(in_range, "step is outside 0 to 2^32 - 1: further steps would repeat")
    key = key.contiguous()
    options = {**blocks.choose("noise", lists[0][0]), **EXACT}
    for *tensors, index in zip(*lists, indices, strict=True):
        n = tensors[0].numel()
        programs = math.ceil(8 * math.ceil(n / noise.SUPERBLOCK) / options["BLOCK"])
        nonce = _signed(4 * mechanism + domain), _signed(index)
        launch(kernel, programs, tensors[0], *tensors, key, step, n, *nonce, *scalars, **flags, **options)


def _takes_lists(key: Tensor, step: Tensor, *lists: list[Tensor], narrow: bool = False) -> bool | str:
    """Whether the kernels take these parallel lists; if not, why not."""
    for i, tensors in enumerate(zip(*lists, strict=True)):
        if any(x.device != key.device for x in (step, *tensors)):
            return "key, step and tensors are on several devices"
        if not all(x.is_contiguous() for x in tensors):
            return f"tensor {i} is not contiguous"
        verdict = takes(*tensors, dtypes=DTYPES if narrow else (torch.float32,))
        if verdict is not True:
            return verdict
        if INTERPRETED and tensors[0].dtype == torch.bfloat16:
            return "Triton's interpreter cuts numbers off to bfloat16, where a GPU rounds them"
    return True


def _supports_words(key: Tensor, step: Tensor, mechanism: int, domain: int, index: int, n: int) -> bool | str:
    noise._check_words(key, step, mechanism, domain, index, n)
    if key.device != step.device:
        return "key and step are on several devices"
    return takes(key, dtypes=(torch.int32,))


@noise.random_words.register("triton", supports=_supports_words)
def _random_words(key: Tensor, step: Tensor, mechanism: int, domain: int, index: int, n: int) -> Tensor:
    words = key.new_empty(n)
    _draw(random_words_kernel, [[words]], key, step, mechanism, domain, [index])
    return words


def _supports_add(
    tensors: list[Tensor], key: Tensor, step: Tensor, mechanism: int, indices: list[int], std: float
) -> bool | str:
    noise._native_add_noise(tensors, key, step, mechanism, indices, std)
    return _takes_lists(key, step, tensors, narrow=True)


@noise.add_noise_.register("triton", supports=_supports_add)
def _add_noise(
    tensors: list[Tensor], key: Tensor, step: Tensor, mechanism: int, indices: list[int], std: float
) -> None:
    _draw(add_noise_kernel, [tensors], key, step, mechanism, noise.NOISE, indices, std)


def _supports_sgd(
    params: list[Tensor],
    sums: list[Tensor],
    momentum_buffers: list[Tensor],
    key: Tensor,
    step: Tensor,
    mechanism: int,
    indices: list[int],
    std: float,
    scale: float,
    lr: float,
    momentum: float,
    *_settings: float,
) -> bool | str:
    noise._native_noise_sgd(params, sums, momentum_buffers, key, step, mechanism, indices, std, scale, lr, momentum)
    return _takes_lists(key, step, params, sums, *[momentum_buffers] * bool(momentum_buffers))


@noise.noise_sgd_.register("triton", supports=_supports_sgd)
def _noise_sgd(
    params: list[Tensor],
    sums: list[Tensor],
    momentum_buffers: list[Tensor],
    key: Tensor,
    step: Tensor,
    mechanism: int,
    indices: list[int],
    std: float,
    scale: float,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first_step: bool,
) -> None:
    lists = [params, sums, momentum_buffers if momentum != 0 else params]
    scalars = (std, -scale if maximize else scale, lr, momentum, 1 - dampening, weight_decay)
    flags = dict(MOMENTUM=momentum != 0, NESTEROV=nesterov, FIRST_STEP=first_step, DECAYS=weight_decay != 0)
    _draw(noise_sgd_kernel, lists, key, step, mechanism, noise.NOISE, indices, *scalars, **flags)


def _supports_adam(
    params: list[Tensor],
    sums: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    key: Tensor,
    step: Tensor,
    mechanism: int,
    indices: list[int],
    std: float,
    scale: float,
    optimizer_step: int,
    *_settings: float,
) -> bool | str:
    lists = (params, sums, exp_avgs, exp_avg_sqs)
    noise._native_noise_adam(
        *lists, max_exp_avg_sqs, key, step, mechanism, indices, std, scale, optimizer_step, *_settings
    )
    return _takes_lists(key, step, *lists, *[max_exp_avg_sqs] * bool(max_exp_avg_sqs))


@noise.noise_adam_.register("triton", supports=_supports_adam)
def _noise_adam(
    params: list[Tensor],
    sums: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    key: Tensor,
    step: Tensor,
    mechanism: int,
    indices: list[int],
    std: float,
    scale: float,
    optimizer_step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
) -> None:
    lists = [params, sums, exp_avgs, exp_avg_sqs, max_exp_avg_sqs or params]
    scalars = (
        *(std, -scale if maximize else scale, lr / (1 - beta1**optimizer_step)),
        *(1 - beta1, beta2, 1 - beta2, math.sqrt(1 - beta2**optimizer_step), eps),
        *(0.0 if decoupled else weight_decay, 1 - lr * weight_decay if decoupled else 1.0),
    )
    flags = dict(AMSGRAD=bool(max_exp_avg_sqs), DECAYS=weight_decay != 0 and not decoupled)
    _draw(noise_adam_kernel, lists, key, step, mechanism, noise.NOISE, indices, *scalars, **flags)
