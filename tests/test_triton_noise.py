"""Triton noise: words to the bit, normals as those of the other backends, updates against the reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from streams import _C, KEY, draw, same_bits, ulp_distance
from test_chacha20 import RFC_8439, keystream_block
from test_normals import ANGLE_WORDS, RADIUS_WORDS, TAIL_WORDS, exact_normals
from test_triton import DEVICE
from torch import Tensor

from dp2vae_fast.ops import noise

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

import triton.language as tl  # noqa: E402
from dp2vae_fast.kernels import _common, chacha20  # noqa: E402

ON_CPU = pytest.mark.skipif(DEVICE != "cpu", reason="the draws of tests/streams.py are on the CPU")
LIMITS = dict(step=2**32 - 1, mechanism=2**30 - 1, index=2**32 - 1)


def tensors(shapes: list[tuple[int, ...]], seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(shape, generator=generator).to(dtype).to(DEVICE) for shape in shapes]


def key_and_step(step: int) -> tuple[Tensor, Tensor]:
    return KEY.to(DEVICE), torch.tensor(step, device=DEVICE)


@ON_CPU
@pytest.mark.parametrize("vector", RFC_8439)
def test_rfc_8439(vector: str):
    key, counter, nonce, block = RFC_8439[vector]
    assert keystream_block(key, counter, nonce, "triton") == block


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 129, 2049])
def test_words_are_those_of_the_reference(n: int):
    key, step = key_and_step(LIMITS["step"])
    how = (LIMITS["mechanism"], noise.COINS, LIMITS["index"], n)
    found = noise.random_words(key, step, *how, backend="triton")
    assert same_bits(found.cpu(), noise.random_words(key, step, *how, backend="reference").cpu())


@triton.jit
def box_muller_kernel(radius_words, tail_words, angle_words, firsts, seconds, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(radius_words + at, mask=at < n, other=0).to(tl.uint32, bitcast=True)
    tail = tl.load(tail_words + at, mask=at < n, other=0).to(tl.uint32, bitcast=True)
    b = tl.load(angle_words + at, mask=at < n, other=0).to(tl.uint32, bitcast=True)
    first, second = chacha20.times_direction(chacha20.with_tail(chacha20.radius(a), a, tail), b)
    tl.store(firsts + at, first, mask=at < n)
    tl.store(seconds + at, second, mask=at < n)


def test_box_muller_at_its_edges():
    triples = [
        (radius, tail, angle)
        for radius in RADIUS_WORDS
        for tail in (TAIL_WORDS if radius < 2**16 else [0])
        for angle in ANGLE_WORDS
    ]
    exact = torch.tensor([exact_normals(*triple) for triple in triples], dtype=torch.float64)
    words = torch.tensor(triples).to(torch.int32).to(DEVICE).T.contiguous()
    first, second = (torch.empty(len(triples), device=DEVICE) for _ in range(2))
    programs = math.ceil(len(triples) / 1024)
    _common.launch(
        box_muller_kernel, programs, first, *words, first, second, len(triples), BLOCK=1024, **chacha20.EXACT
    )
    found = torch.stack((first, second), 1).cpu()
    assert ulp_distance(found, exact).max() <= noise.MAX_ULP
    assert ((exact == 0) <= (found == 0)).all()  # quarter turns are hit exactly
    if _C:
        assert same_bits(found, torch.tensor([_C.box_muller(*triple) for triple in triples]))


def step_with_a_tail(blocks: int) -> int:
    """The first step at which some pair among so many blocks has a radius word below 2^16."""
    for step in range(10_000):
        words = noise.random_words(KEY, torch.tensor(step), 0, noise.NOISE, 0, 16 * blocks).long() & 0xFFFFFFFF
        if bool((words[::2] < 2**16).any()):
            return step
    raise AssertionError("no tail in 10,000 steps")


@ON_CPU
@pytest.mark.parametrize("nonce", [LIMITS, dict(step=step_with_a_tail(128))], ids=["limits", "tail"])
def test_normals_are_those_of_the_other_backends(nonce: dict[str, int]):
    found = draw(2049, **nonce, backend="triton")
    assert ulp_distance(found, draw(2049, **nonce, backend="reference")).max() <= noise.MAX_ULP
    if _C:
        assert same_bits(found, draw(2049, **nonce, backend="cpp"))
    assert same_bits(found[:130], draw(130, **nonce, backend="triton"))


SHAPES, INDICES = [(2, 77), (0,), (9,)], [3, 0, 2**32 - 1]
ROUNDINGS = 20 * 2.0**-24  # as tests/test_noise.py
SGD = [
    dict(momentum=0.0, dampening=0.0, weight_decay=0.1, nesterov=False, maximize=True, first_step=True),
    dict(momentum=0.9, dampening=0.3, weight_decay=0.0, nesterov=False, maximize=False, first_step=False),
    dict(momentum=0.9, dampening=0.0, weight_decay=0.1, nesterov=True, maximize=False, first_step=False),
    dict(momentum=0.9, dampening=0.3, weight_decay=0.0, nesterov=False, maximize=False, first_step=True),
]
ADAM = [
    dict(amsgrad=False, weight_decay=0.0, decoupled=False, maximize=False),
    dict(amsgrad=True, weight_decay=0.1, decoupled=False, maximize=True),
    dict(amsgrad=False, weight_decay=0.1, decoupled=True, maximize=False),
]


def sgd(settings: dict[str, Any], backend: str) -> list[Tensor]:
    lists = [tensors(SHAPES, seed) for seed in range(3)]
    buffers = lists[2] if settings["momentum"] else []
    draws = (*key_and_step(5), 2, INDICES, 1.3, 0.25)
    noise.noise_sgd_(lists[0], lists[1], buffers, *draws, lr=0.05, **settings, backend=backend)
    return [x for one in lists for x in one]


def adam(settings: dict[str, Any], backend: str) -> list[Tensor]:
    settings = dict(settings)
    lists = [tensors(SHAPES, seed) for seed in range(5)]
    largest = lists[4] if settings.pop("amsgrad") else []
    how = dict(lr=0.05, beta1=0.8, beta2=0.7, eps=0.01, **settings)
    noise.noise_adam_(*lists[:4], largest, *key_and_step(5), 2, INDICES, 1.3, 0.25, 3, **how, backend=backend)
    return [x for one in lists for x in one]


@pytest.mark.parametrize("run, settings", [(sgd, s) for s in SGD] + [(adam, s) for s in ADAM])
def test_updates(run, settings: dict[str, Any]):
    found, expected = run(settings, "triton"), run(settings, "reference")
    before = [x for seed in range(5) for x in tensors(SHAPES, seed)]
    for i, (one, other, old) in enumerate(zip(found, expected, before, strict=False)):
        size = float(other.abs().max()) if other.numel() else 0.0
        torch.testing.assert_close(one, other, rtol=0, atol=ROUNDINGS * size)
        if len(SHAPES) <= i < 2 * len(SHAPES):  # the sums
            assert torch.equal(one, old)
        elif i < len(SHAPES) and one.numel():
            assert not bool((one == old).any())
    if _C and DEVICE == "cpu":
        assert all(same_bits(one, other) for one, other in zip(found, run(settings, "cpp"), strict=True))


BFLOAT16 = pytest.param(torch.bfloat16, marks=pytest.mark.skipif(_common.INTERPRETED, reason="it is cut off there"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BFLOAT16])
def test_noise_is_added_in_float32(dtype: torch.dtype):
    z = [torch.zeros(shape, device=DEVICE) for shape in SHAPES]
    added, old = tensors(SHAPES, 0, dtype), tensors(SHAPES, 0, dtype)
    for values, std in ((z, 1.0), (added, 1.7)):
        noise.add_noise_(values, *key_and_step(4), 2, INDICES, std, backend="triton")
    for found, value, normal in zip(added, old, z, strict=True):
        assert torch.equal(found, (value.float() + 1.7 * normal).to(dtype))


def test_a_strided_key_is_read_as_it_is():
    key, step = key_and_step(3)
    strided = torch.stack((key, torch.zeros_like(key)), 1)[:, 0]
    words = [noise.random_words(k, step, 0, 0, 0, 20, backend="triton") for k in (key, strided)]
    assert torch.equal(*words)


@ON_CPU  # on a GPU the check is asynchronous, and ends the process
@pytest.mark.parametrize("step", [-1, 2**32])
def test_a_step_whose_noise_would_repeat_is_refused(step: int):
    untouched = torch.ones(30)
    with pytest.raises(RuntimeError, match="step is outside"):
        noise.add_noise_([untouched], KEY, torch.tensor(step), 0, [0], 1.0, backend="triton")
    with pytest.raises(RuntimeError, match="step is outside"):
        noise.random_words(KEY, torch.tensor(step), 0, 0, 0, 30, backend="triton")
    assert (untouched == 1).all()


def test_what_is_refused_or_not_taken():
    key, step = key_and_step(0)
    x = torch.ones(4, 5, device=DEVICE)
    noise.add_noise_([], key, step, 0, [], 1.0, backend="triton")
    with pytest.raises(ValueError, match=r"indices .* repeat"):
        noise.add_noise_([x, x.clone()], key, step, 0, [1, 1], 1.0, backend="triton")
    with pytest.raises(NotImplementedError, match="triton: tensor 0 is not contiguous"):
        noise.add_noise_([x.mT], key, step, 0, [1], 1.0, backend="triton")
    with pytest.raises(NotImplementedError, match="triton: the kernels take float32, float16, bfloat16"):
        noise.add_noise_([x.double()], key, step, 0, [1], 1.0, backend="triton")
