"""Gaussian noise from ChaCha20, and the optimizers that draw it as they go.

The generator is the ChaCha20 block function of RFC 8439. Its 16-word state is four constants, the 8-word
key, a block counter and a nonce of three words::

    nonce = (4 * mechanism + domain, step, index)

A mechanism is one use of a key; a domain is what its words are for (`NOISE`, `TAIL`, `COINS`); index is the
number of the parameter. So no two draws share a block as long as no mechanism repeats a step, which
`Keystream` sees to.

Element e of a tensor, counted in row-major order, has superblock ``s = e // 128``, row ``w = e % 128 // 8``
and lane ``l = e % 8``, and reads word w of block ``8 s + l``: eight blocks side by side fill eight SIMD
lanes, and no element depends on the length of the tensor, the number of threads or the device. Rows w and
w+1 (w even) form one Box-Muller pair: with radius word a, angle word b and the tail word t (word w of the
same block in domain `TAIL`)::

    u = (a + 1/2) / 2^32            where a >= 2^16
        (2^32 a + t + 1/2) / 2^64   elsewhere
    z[w], z[w+1] = sqrt(-2 ln u) * (cos, sin)(2 pi b / 2^32)

so the radius is that of a 64-bit uniform, up to 9.49, though the tail word is needed once in 2^16 pairs.

Words are bit-identical on every backend. The references below form normals in float64 and round them to
float32; the other backends stay within `MAX_ULP` float32 ulp of that. Noise is floating-point Gaussian:
nothing is claimed against attacks on floating-point arithmetic itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dp2vae_fast.ops._op import op

NOISE, TAIL, COINS = 0, 1, 2  # domains
# Of a normal, in units of its float32 spacing, against the float64 reference. In units of 2^-24 relative: the radius
# word is rounded to 24 bits (1.5, at most 2.2 once seen through the logarithm and the square root), logarithm and root
# 1.5, sine or cosine 2, the product 0.5; 2^-24 is at most one spacing.
MAX_ULP = 6

SUPERBLOCK = 128
_LANES = 8
_CONSTANTS = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)  # "expand 32-byte k"
_CHUNK = 1 << 10  # superblocks that the reference works on at a time, to stay in cache
_MAX_ELEMENTS = 1 << 36  # 16 words for each of the 2^32 block counters
_NATIVE_DTYPES = (torch.float32, torch.float64)


def _rotate_left(x: Tensor, bits: int) -> Tensor:
    return (x << bits) | ((x >> (32 - bits)) & ((1 << bits) - 1))  # >> of an int32 copies the sign: mask it


def _quarter_rounds(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a = a + b
    d = _rotate_left(d ^ a, 16)
    c = c + d
    b = _rotate_left(b ^ c, 12)
    a = a + b
    d = _rotate_left(d ^ a, 8)
    c = c + d
    b = _rotate_left(b ^ c, 7)
    return a, b, c, d


def chacha20_blocks(key: Tensor, counters: Tensor, nonce: Tensor) -> Tensor:
    """The ChaCha20 block function: key int32 ``[8]``, counters int32 ``[B]``, nonce int32 ``[3]`` -> int32
    ``[16, B]``.

    Words are held in int32, whose arithmetic wraps as that of unsigned words does.
    """
    constants = torch.tensor(_CONSTANTS, dtype=torch.int32, device=key.device)
    columns = [part[:, None].expand(-1, counters.numel()) for part in (constants, key, nonce)]
    initial = torch.cat((columns[0], columns[1], counters[None], columns[2]))
    a, b, c, d = initial.reshape(4, 4, -1)
    for _ in range(10):
        a, b, c, d = _quarter_rounds(a, b, c, d)
        b, c, d = b.roll(-1, 0), c.roll(-2, 0), d.roll(-3, 0)  # the diagonals become columns
        a, b, c, d = _quarter_rounds(a, b, c, d)
        b, c, d = b.roll(1, 0), c.roll(2, 0), d.roll(3, 0)
    return torch.cat((a, b, c, d)) + initial


def _nonce(step: Tensor, mechanism: int, domain: int, index: int) -> Tensor:
    # Not an `if`: the value may be on a GPU, or fake.
    in_range = (step >= 0) & (step < 1 << 32)
    torch.ops.aten._assert_async.msg(in_range, "step is outside 0 to 2^32 - 1: further steps would repeat")
    first = torch.full((), 4 * mechanism + domain, dtype=torch.int64, device=step.device)
    return torch.stack((first, step, torch.full_like(first, index))).to(torch.int32)


def _unsigned(words: Tensor) -> Tensor:
    return words.to(torch.int64) & 0xFFFFFFFF


def box_muller(radius_word: Tensor, tail_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """The two normals of each word triple (int64, values below 2^32), in float64."""
    a = radius_word.double()
    u = torch.where(radius_word >= 1 << 16, (a + 0.5) * 2.0**-32, (a * 2.0**32 + tail_word + 0.5) * 2.0**-64)
    below_one = ((0xFFFFFFFF - radius_word).double() + 0.5) * -(2.0**-32)  # u - 1, exactly
    log_u = torch.where(radius_word >= 1 << 31, below_one.log1p(), u.log())
    radius = (-2 * log_u).sqrt()
    # Cut to the nearest quarter turn in integers: the sine of a small remainder then keeps its relative
    # accuracy.
    quarter = (angle_word + (1 << 29)) >> 30
    angle = (angle_word - (quarter << 30)).double() * (math.pi / 2 * 2.0**-30)
    sine, cosine = angle.sin(), angle.cos()
    odd = quarter % 2 == 1
    cos_sign = torch.where((quarter + 1) % 4 >= 2, -1.0, 1.0)
    sin_sign = torch.where(quarter % 4 >= 2, -1.0, 1.0)
    return (
        radius * torch.where(odd, sine, cosine) * cos_sign,
        radius * torch.where(odd, cosine, sine) * sin_sign,
    )


def normals(key: Tensor, step: Tensor, mechanism: int, index: int, n: int) -> Tensor:
    """Elements 0 to n-1 of one parameter's standard normal noise: float32 ``[n]``."""
    chunks = [
        _normal_superblocks(key, step, mechanism, index, start, min(start + _CHUNK, -(-n // SUPERBLOCK)))
        for start in range(0, -(-n // SUPERBLOCK), _CHUNK)
    ]
    return torch.cat(chunks)[:n] if chunks else torch.empty(0, dtype=torch.float32, device=key.device)


def _normal_superblocks(key: Tensor, step: Tensor, mechanism: int, index: int, first: int, end: int) -> Tensor:
    counters = torch.arange(_LANES * first, _LANES * end, device=key.device).to(torch.int32)
    words = _unsigned(chacha20_blocks(key, counters, _nonce(step, mechanism, NOISE, index)))  # [16, blocks]
    radius_words, angle_words = words[0::2], words[1::2]
    tail_words = torch.zeros_like(radius_words)
    pair, block = (radius_words < 1 << 16).nonzero(as_tuple=True)
    if block.numel():
        tail = chacha20_blocks(key, counters[block], _nonce(step, mechanism, TAIL, index))
        tail_words[pair, block] = _unsigned(tail[2 * pair, torch.arange(block.numel(), device=key.device)])
    z = torch.stack(box_muller(radius_words, tail_words, angle_words), dim=1).to(torch.float32)  # [8, 2, blocks]
    return z.reshape(16, end - first, _LANES).transpose(0, 1).reshape(-1)


def _check_draw(key: Tensor, step: Tensor, mechanism: int, indices: list[int]) -> None:
    if key.dtype != torch.int32 or key.shape != (8,):
        raise ValueError(f"key is {key.dtype} {list(key.shape)}, expected torch.int32 [8]")
    if step.dtype != torch.int64 or step.dim() != 0:
        raise ValueError(f"step is {step.dtype} {list(step.shape)}, expected a torch.int64 scalar tensor")
    if not 0 <= mechanism < 1 << 30:
        raise ValueError(f"mechanism is {mechanism}, expected 0 to 2^30 - 1")
    if len(set(indices)) != len(indices):
        raise ValueError(f"indices {indices} repeat: two tensors would get the same noise; give each its own")
    for index in indices:
        if not 0 <= index < 1 << 32:
            raise ValueError(f"indices hold {index}, expected 0 to 2^32 - 1")


def _tensors(key: Tensor, step: Tensor) -> str:
    if not isinstance(step, Tensor):
        return f"step is {step!r}, expected a torch.int64 scalar tensor: torch.tensor({step!r})"
    if not isinstance(key, Tensor):  # a secret: not shown
        return f"key is of type {type(key).__name__}, expected a torch.int32 tensor [8]"
    return ""


def _check_lists(indices: list[int], std: float, **lists: list[Tensor]) -> None:
    if not std >= 0 or std == math.inf:
        raise ValueError(f"std is {std}, expected a finite number, not negative")
    (first_name, first), *others = lists.items()
    for name, tensors in others:
        if len(tensors) != len(first):
            raise ValueError(f"{name} holds {len(tensors)} tensors, {first_name} {len(first)}: expected as many")
        for i, (tensor, other) in enumerate(zip(tensors, first, strict=True)):
            if tensor.shape != other.shape:
                raise ValueError(
                    f"{name}[{i}] has shape {list(tensor.shape)}, {first_name}[{i}] {list(other.shape)}: "
                    "expected equal shapes"
                )
    if len(indices) != len(first):
        raise ValueError(f"indices holds {len(indices)} numbers, {first_name} {len(first)} tensors: expected as many")
    for i, tensor in enumerate(first):
        if not tensor.is_floating_point() or tensor.numel() > _MAX_ELEMENTS:
            raise ValueError(
                f"{first_name}[{i}] is {tensor.dtype} of {tensor.numel()} elements, expected a real "
                "floating dtype and at most 2^36 elements"
            )


def kernels_support(*lists: list[Tensor]) -> bool | str:
    """Whether the compiled kernels take these parallel lists of tensors: True, or the reason why not."""
    for i, tensors in enumerate(zip(*lists, strict=True)):
        first = tensors[0]
        for tensor in tensors:
            if tensor.dtype not in _NATIVE_DTYPES or tensor.dtype != first.dtype:
                dtypes = ", ".join(str(t.dtype) for t in tensors)
                return f"tensor {i} has dtype {dtypes}: expected float32 or float64, the same in every list"
            if not tensor.is_contiguous():
                return f"tensor {i} is not contiguous"
            if tensor.device != lists[0][0].device:
                return "the tensors are on several devices"
    return True


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _gradient(
    total: Tensor,
    key: Tensor,
    step: Tensor,
    mechanism: int,
    index: int,
    std: float,
    scale: float,
    maximize: bool,
) -> Tensor:
    """(total + std z) * scale, turned uphill or downhill, in float32 or wider."""
    z = normals(key, step, mechanism, index, total.numel()).reshape(total.shape)
    wide = _wide(total.dtype)
    return (total.to(wide) + std * z.to(wide)) * (-scale if maximize else scale)


def _check_words(key: Tensor, step: Tensor, mechanism: int, domain: int, index: int, n: int) -> bool:
    _check_draw(key, step, mechanism, [index])
    if not 0 <= domain < 4:
        raise ValueError(f"domain is {domain}, expected 0 to 3")
    if not 0 <= n <= _MAX_ELEMENTS:
        raise ValueError(f"n is {n}, expected 0 to 2^36")
    return True


@op(native=_check_words, fits=lambda key, step, *_: _tensors(key, step))
def random_words(key: Tensor, step: Tensor, mechanism: int, domain: int, index: int, n: int) -> Tensor:
    """The first n words of a ChaCha20 keystream, in the order of RFC 8439, block counter from 0: int32
    ``[n]``.

    Shapes:
        key int32 ``[8]``; step int64 ``[]``: with mechanism and index as in `add_noise_`; domain: 0 to 3, of which the
        noise ops read 0 and 1. The same numbers give the same words.
    Guarantees:
        Bit-identical on every backend. Words of different (mechanism, domain, step, index) never share a
        block.
    Edge cases:
        n = 0 gives an empty tensor. Words above 2^31 - 1 come as negative int32.
    Raises:
        ValueError: mechanism, domain or index is out of the range that its 30, 2 or 32 bits of the nonce hold.
        RuntimeError: step is, which only its value can tell.
    """
    _check_words(key, step, mechanism, domain, index, n)
    counters = torch.arange(-(-n // 16), device=key.device).to(torch.int32)
    return chacha20_blocks(key, counters, _nonce(step, mechanism, domain, index)).T.reshape(-1)[:n].clone()


def _native_add_noise(
    tensors: list[Tensor], key: Tensor, step: Tensor, mechanism: int, indices: list[int], std: float
) -> bool | str:
    _check_draw(key, step, mechanism, indices)
    _check_lists(indices, std, tensors=tensors)
    return kernels_support(tensors)


@op(mutates=("tensors",), native=_native_add_noise, fits=lambda tensors, key, step, *_: _tensors(key, step))
def add_noise_(
    tensors: list[Tensor], key: Tensor, step: Tensor, mechanism: int, indices: list[int], std: float
) -> None:
    """Add ``std * z`` to every tensor in place, z standard normal from ChaCha20.

    Equivalent to ``tensor += std * normals(key, step, mechanism, index,
    tensor.numel()).reshape(tensor.shape)``.

    Args:
        key: the secret: 256 random bits of the operating system. Whoever knows them can take the noise off again.
        mechanism: the number of one use of the key. Uses that are released apart have numbers of their own.
        step: the number of this draw of the mechanism.
    Shapes:
        key int32 ``[8]``; step int64 ``[]``; one index for every tensor.
    What the caller must see to:
        The same (key, mechanism, step, index) is the same noise, which the difference of two releases is rid of, so no
        draw may repeat one: count a mechanism's steps up, before each draw, and after a stop go on from beyond the last
        one or with a new key. :class:`~dp2vae_fast.engine.keystream.Keystream` does all this.
    Guarantees:
        z depends on nothing but (key, step, mechanism, index) and the element's row-major position. It is
        drawn in float32 and added in the tensor's dtype, in float32 where that is narrower.
    Edge cases:
        Empty lists and empty tensors pass. std = 0 leaves finite tensors as they are. Any strides are taken;
        the compiled kernels take contiguous float32 and float64 tensors and leave others to the reference.
    Raises:
        ValueError: indices repeat (two tensors would share their noise), an argument is out of range, or
        lengths differ.
        RuntimeError: step is out of range.
    """
    _check_draw(key, step, mechanism, indices)
    _check_lists(indices, std, tensors=tensors)
    for tensor, index in zip(tensors, indices, strict=True):
        z = normals(key, step, mechanism, index, tensor.numel()).reshape(tensor.shape)
        wide = _wide(tensor.dtype)
        tensor.copy_(tensor.to(wide) + std * z.to(wide))


def _native_noise_sgd(
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
    _check_draw(key, step, mechanism, indices)
    buffers = {"momentum_buffers": momentum_buffers} if momentum_buffers else {}
    _check_lists(indices, std, params=params, sums=sums, **buffers)
    if momentum != 0 and len(momentum_buffers) != len(params):
        raise ValueError(f"momentum is {momentum} but momentum_buffers is empty: give one buffer for every parameter")
    return kernels_support(params, sums, *buffers.values())


@op(
    mutates=("params", "momentum_buffers"),
    native=_native_noise_sgd,
    fits=lambda params, sums, buffers, key, step, *_: _tensors(key, step),
)
def noise_sgd_(
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
    """One step of `torch.optim.SGD` on the gradients ``(sum + std z) * scale``, noise drawn on the way.

    Shapes:
        params, sums and, where momentum is not 0, momentum_buffers: parallel lists; key, step, mechanism and
        indices, and what must not repeat, as in `add_noise_`. first_step: the buffers hold nothing yet and are
        set to the gradient, as SGD does.
    Guarantees:
        The same z as `add_noise_`; then SGD's arithmetic. `sums` is only read. Off the reference no tensor
        of noise is ever formed.
    Edge cases and errors:
        as `add_noise_`; ValueError too where momentum is not 0 and momentum_buffers is empty.
    """
    _native_noise_sgd(params, sums, momentum_buffers, key, step, mechanism, indices, std, scale, lr, momentum)
    for i, (param, total, index) in enumerate(zip(params, sums, indices, strict=True)):
        grad = _gradient(total, key, step, mechanism, index, std, scale, maximize).to(param.dtype)
        if weight_decay != 0:
            grad = grad.add(param, alpha=weight_decay)
        if momentum != 0:
            buffer = momentum_buffers[i]
            if first_step:
                buffer.copy_(grad)
            else:
                buffer.mul_(momentum).add_(grad, alpha=1 - dampening)
            grad = grad.add(buffer, alpha=momentum) if nesterov else buffer
        param.add_(grad, alpha=-lr)


def _native_noise_adam(
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
    _check_draw(key, step, mechanism, indices)
    if optimizer_step < 1:
        raise ValueError(f"optimizer_step is {optimizer_step}, expected 1 or more: Adam counts from 1")
    state = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if max_exp_avg_sqs:
        state["max_exp_avg_sqs"] = max_exp_avg_sqs
    _check_lists(indices, std, params=params, sums=sums, **state)
    return kernels_support(params, sums, *state.values())


@op(
    mutates=("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"),
    native=_native_noise_adam,
    fits=lambda params, sums, averages, squares, largest, key, step, *_: _tensors(key, step),
)
def noise_adam_(
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
    """One step of `torch.optim.Adam` (decoupled: `AdamW`) on the gradients ``(sum + std z) * scale``.

    Shapes:
        parallel lists; max_exp_avg_sqs empty unless amsgrad. optimizer_step counts from 1 and is Adam's own
        counter, for the bias correction; `step` is the noise's, and as key, mechanism and indices in `add_noise_`.
    Guarantees, edge cases and errors:
        as `noise_sgd_`; ValueError too where optimizer_step < 1.
    """
    _native_noise_adam(
        params,
        sums,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        key,
        step,
        mechanism,
        indices,
        std,
        scale,
        optimizer_step,
    )
    root_correction2 = math.sqrt(1 - beta2**optimizer_step)
    step_size = lr / (1 - beta1**optimizer_step)
    for i, (param, total, index) in enumerate(zip(params, sums, indices, strict=True)):
        grad = _gradient(total, key, step, mechanism, index, std, scale, maximize).to(param.dtype)
        if decoupled:
            param.mul_(1 - lr * weight_decay)
        elif weight_decay != 0:
            grad = grad.add(param, alpha=weight_decay)
        second = exp_avg_sqs[i]
        exp_avgs[i].lerp_(grad, 1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        if max_exp_avg_sqs:
            second = torch.maximum(max_exp_avg_sqs[i], second, out=max_exp_avg_sqs[i])
        param.addcdiv_(exp_avgs[i], (second.sqrt() / root_correction2).add_(eps), value=-step_size)
