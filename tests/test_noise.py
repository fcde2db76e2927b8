"""Noise: ChaCha20 to the bit, normals to the last few bits, their distribution, and the optimizers that draw them.

Keys are fixed, so that nothing here is left to chance: a statistic that passes once passes always. Its threshold is
one that a sound generator exceeds with a probability below 1e-3, so a fault that shows is not waved through.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import subprocess
import sys

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor

import dp2vae_fast
from dp2vae_fast.ops import noise
from dp2vae_fast.ops._op import OPS

try:
    from dp2vae_fast import _C
except ImportError:
    _C = None

native = pytest.mark.skipif(_C is None, reason="the native module is not built")
ISAS = _C.build_info()["isas"].split() if _C else []
BACKENDS = ["cpp", "reference"] if _C else ["reference"]

# One pass of the kernels holds 128 elements with up to 8 lanes, 256 with 16; threads start at 8192.
LENGTHS = [0, 1, 7, 8, 15, 16, 17, 127, 128, 129, 255, 256, 257, 383, 1031]
MANY = 70_001


def make_key(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (8,), generator=generator).to(torch.int32)


KEY, STEP = make_key(0), torch.tensor(3)


def draw(n: int, key: Tensor = KEY, step: int = 3, mechanism: int = 0, index: int = 0, **how) -> Tensor:
    """Standard normals, as `add_noise_` draws them."""
    z = torch.zeros(n)
    noise.add_noise_([z], key, torch.tensor(step), mechanism, [index], 1.0, **how)
    return z


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()


def ulp_distance(found: Tensor, expected: Tensor) -> Tensor:
    """Distance in units of the float32 spacing at `expected`, which may be float64; smallest normal number up."""
    near = expected.float().abs().clamp(min=torch.finfo(torch.float32).tiny)
    spacing = torch.from_numpy(np.spacing(near.numpy())).double()
    return (found.double() - expected.double()).abs() / spacing


@pytest.fixture
def each_isa():
    """Iterates over the instruction sets of this machine, selecting each; the one in use is restored."""
    before = _C.build_info()["isa"] if _C else ""

    def select():
        for isa in ISAS:
            assert _C.select_isa(isa) and _C.build_info()["isa"] == isa
            yield isa

    yield select
    if _C:
        _C.select_isa(before)


@pytest.fixture
def each_thread_count():
    before = torch.get_num_threads()

    def select():
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            yield threads

    yield select
    torch.set_num_threads(before)


# --- ChaCha20 ---------------------------------------------------------------------------------------------------------

# RFC 8439, section 2.3.2 and appendix A.1: key, block counter, nonce, keystream block.
RFC_8439 = {
    "2.3.2": (
        bytes(range(32)),
        1,
        bytes.fromhex("000000090000004a00000000"),
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e",
    ),
    "A.1 #1": (
        bytes(32),
        0,
        bytes(12),
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
    ),
    "A.1 #2": (
        bytes(32),
        1,
        bytes(12),
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
    ),
    "A.1 #3": (
        bytes(31) + b"\x01",
        1,
        bytes(12),
        "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
        "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0",
    ),
    "A.1 #4": (
        b"\x00\xff" + bytes(30),
        2,
        bytes(12),
        "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"
        "13b25aa26cb4a648cb9b9d1be65b2c0924a66c54d545ec1b7374f4872e99f096",
    ),
    "A.1 #5": (
        bytes(32),
        0,
        bytes(11) + b"\x02",
        "c2c64d378cd536374ae204b9ef933fcd1a8b2288b3dfa49672ab765b54ee27c7"
        "8a970e0e955c14f3a88e741b97c286f75f8fc299e8148362fa198a39531bed6d",
    ),
}


def words_of(raw: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(raw, "<i4").copy())


@pytest.mark.parametrize("vector", RFC_8439)
def test_rfc_8439_reference_block(vector):
    key, counter, nonce, block = RFC_8439[vector]
    words = noise.chacha20_blocks(words_of(key), torch.tensor([counter], dtype=torch.int32), words_of(nonce))
    assert words.T.numpy().astype("<i4").tobytes().hex() == block


@native
@pytest.mark.parametrize("vector", RFC_8439)
def test_rfc_8439_native_block(vector):
    key, counter, nonce, block = RFC_8439[vector]
    assert _C.chacha20_block(key, counter, nonce).hex() == block


def keystream_block(key: bytes, counter: int, nonce: bytes, backend: str) -> str:
    """The block by way of `random_words`, whose arguments become the nonce."""
    first, step, index = (word % 2**32 for word in words_of(nonce).tolist())
    arguments = (words_of(key), torch.tensor(step), first // 4, first % 4, index, 16 * (counter + 1))
    return noise.random_words(*arguments, backend=backend)[16 * counter :].numpy().astype("<i4").tobytes().hex()


@pytest.mark.parametrize("vector", RFC_8439)
def test_rfc_8439_random_words_reference(vector):
    key, counter, nonce, block = RFC_8439[vector]
    assert keystream_block(key, counter, nonce, "reference") == block


@native
@pytest.mark.parametrize("vector", RFC_8439)
def test_rfc_8439_random_words_cpp(vector, each_isa):
    key, counter, nonce, block = RFC_8439[vector]
    for isa in each_isa():
        assert keystream_block(key, counter, nonce, "cpp") == block, isa


@native
def test_block_counters_are_unsigned():
    counters = [0, 2**31 - 1, 2**31, 2**32 - 1]
    signed = torch.tensor(counters).to(torch.int32)
    nonce = torch.tensor([1, -2, 3], dtype=torch.int32)
    blocks = noise.chacha20_blocks(KEY, signed, nonce).T
    for counter, block in zip(counters, blocks, strict=True):
        assert _C.chacha20_block(KEY.numpy().tobytes(), counter, nonce.numpy().tobytes()) == block.numpy().tobytes()


@native
def test_words_are_bit_identical_at_every_length_isa_and_thread_count(each_isa, each_thread_count):
    arguments = (KEY, torch.tensor(2**32 - 1), 2**30 - 1, 3, 2**32 - 1)
    expected = noise.random_words(*arguments, MANY, backend="reference")
    assert expected.unique().numel() > 0.999 * MANY  # 70001 of 2^32: 0.6 repeats are expected
    for isa in each_isa():
        for threads in each_thread_count():
            for n in [*LENGTHS, 8191, MANY]:
                words = noise.random_words(*arguments, n, backend="cpp")
                assert same_bits(words, expected[:n]), (isa, threads, n)


def test_reference_words_do_not_depend_on_length():
    expected = noise.random_words(KEY, STEP, 0, 0, 0, MANY, backend="reference")
    for n in LENGTHS:
        assert same_bits(noise.random_words(KEY, STEP, 0, 0, 0, n, backend="reference"), expected[:n])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_strided_key_is_read_as_it_is(backend):
    strided = torch.stack((KEY, torch.zeros_like(KEY)), 1)[:, 0]
    assert not strided.is_contiguous()
    assert same_bits(draw(40, key=strided, backend=backend), draw(40, backend=backend))


# --- normals ----------------------------------------------------------------------------------------------------------

NEAR = (-2, -1, 0, 1, 2)
RADIUS_WORDS = sorted(
    # Ends; where tail words begin; where ln u is taken of 1 - u; where u and 1 - u cross sqrt(1/2); float32's 24 bits.
    {0, 1, 2, 2**32 - 2, 2**32 - 1}
    | {edge + d for edge in (2**16, 2**31, 2**24, 2**31 + 2**24) for d in NEAR}
    | {round(2**32 * u) + d for u in (math.sqrt(0.5), 1 - math.sqrt(0.5)) for d in (*NEAR, -300, 300)}
)
TAIL_WORDS = [0, 1, 2**31, 2**32 - 1]
ANGLE_WORDS = sorted({((turn << 29) + d) % 2**32 for turn in range(8) for d in (*NEAR, -257, 257)})


def exact_normals(radius_word: int, tail_word: int, angle_word: int) -> tuple[float, float]:
    """The formula of the module's docstring, in 200 bits, rounded to float64."""
    with mpmath.workprec(200):
        a = mpmath.mpf(radius_word)
        u = (a + 0.5) / 2**32 if radius_word >= 2**16 else (a * 2**32 + tail_word + 0.5) / 2**64
        radius, half_turns = mpmath.sqrt(-2 * mpmath.log(u)), mpmath.mpf(angle_word) / 2**31
        return float(radius * mpmath.cospi(half_turns)), float(radius * mpmath.sinpi(half_turns))


@pytest.fixture(scope="module")
def edges() -> tuple[Tensor, Tensor]:
    """Word triples ``[n, 3]`` and their exact normals ``[n, 2]``."""
    triples = [
        (radius, tail, angle)
        for radius in RADIUS_WORDS
        for tail in (TAIL_WORDS if radius < 2**16 else [0])
        for angle in ANGLE_WORDS
    ]
    return torch.tensor(triples), torch.tensor([exact_normals(*triple) for triple in triples], dtype=torch.float64)


def test_reference_box_muller_is_exact_to_float64(edges):
    triples, exact = edges
    found = torch.stack(noise.box_muller(*triples.T), 1)
    assert found.dtype == torch.float64
    # u or u - 1, their logarithm, the root, the angle (whose relative error the sine passes on), sine or cosine and
    # the product each add a rounding or two: 16 halves of eps are ample, and 2^29 times finer than float32.
    assert ((found - exact).abs() <= 16 * 2.0**-53 * exact.abs()).all()


def test_box_muller_does_not_follow_the_default_dtype(edges):
    triples, _ = edges
    expected = noise.box_muller(*triples.T)
    normals = noise.normals(KEY, STEP, 0, 0, 0)
    try:
        torch.set_default_dtype(torch.float64)
        for found, other in zip(noise.box_muller(*triples.T), expected, strict=True):
            assert same_bits(found, other)
        assert noise.normals(KEY, STEP, 0, 0, 0).dtype == normals.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@native
def test_native_box_muller_at_its_edges(edges, each_isa):
    triples, exact = edges
    first = None
    for isa in each_isa():
        found = torch.tensor([_C.box_muller(*triple) for triple in triples.tolist()])
        distance = ulp_distance(found, exact)
        worst = distance.argmax() // 2
        assert distance.max() <= noise.MAX_ULP, (isa, triples[worst].tolist(), found[worst], exact[worst])
        assert ((exact == 0) <= (found == 0)).all()  # quarter turns are hit exactly
        first = found if first is None else first
        assert same_bits(found, first), isa


def test_largest_and_smallest_normals():
    largest = exact_normals(0, 0, 0)[0]
    assert largest == pytest.approx(math.sqrt(130 * math.log(2)), rel=1e-15)  # u = 2^-65: 9.4925
    for box_muller in [lambda *words: [z.item() for z in noise.box_muller(*map(torch.tensor, words))]] + (
        [_C.box_muller] if _C else []
    ):
        assert box_muller(0, 0, 0)[0] == pytest.approx(largest, rel=2**-22)
        assert box_muller(0, 2**32 - 1, 2**31)[0] == pytest.approx(-math.sqrt(-2 * math.log(2**-32)), rel=2**-22)
        assert box_muller(2**32 - 1, 0, 2**30)[1] == pytest.approx(2.0**-16, rel=2**-22)  # u = 1 - 2^-33


@native
def test_native_normals_in_a_sweep(each_isa):
    expected = [noise.normals(make_key(seed), STEP, 5, seed, 2**21) for seed in range(3)]
    for isa in each_isa():
        for seed, reference in enumerate(expected):
            found = draw(2**21, key=make_key(seed), mechanism=5, index=seed, backend="cpp")
            assert ulp_distance(found, reference).max() <= noise.MAX_ULP, (isa, seed)


def element_words(n: int, **nonce: int) -> Tensor:
    """(radius, tail, angle) words of elements 0 to n-1, by the layout that the module's docstring gives: ``[n, 3]``."""
    arguments = (KEY, torch.tensor(nonce["step"]), nonce["mechanism"])
    blocks = -(-n // 128) * 8
    stream, tail = (
        noise.random_words(*arguments, domain, nonce["index"], 16 * blocks).reshape(blocks, 16).long() & 0xFFFFFFFF
        for domain in (noise.NOISE, noise.TAIL)
    )
    e = torch.arange(n)
    block, word = 8 * (e // 128) + e % 8, e % 128 // 8 // 2 * 2
    return torch.stack((stream[block, word], tail[block, word], stream[block, word + 1]), 1)


def exact_elements(words: Tensor, elements: Tensor) -> Tensor:
    return torch.tensor(
        [
            exact_normals(*triple)[e % 128 // 8 % 2]
            for triple, e in zip(words[elements].tolist(), elements.tolist(), strict=True)
        ],
        dtype=torch.float64,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_element_reads_the_words_of_its_place(backend):
    nonce = dict(step=2**32 - 1, mechanism=2**30 - 1, index=2**32 - 1)
    elements = torch.arange(1500)
    exact = exact_elements(element_words(1500, **nonce), elements)
    assert ulp_distance(draw(1500, **nonce, backend=backend), exact).max() <= noise.MAX_ULP


def test_the_tail_path(each_isa):
    """Elements whose radius word is below 2^16 take a second word, from their own place in another domain."""
    n, nonce = 2**21, dict(step=1, mechanism=7, index=9)
    words = element_words(n, **nonce)
    (elements,) = (words[:, 0] < 2**16).nonzero(as_tuple=True)
    assert 16 <= elements.numel() <= 64  # 2^21 / 2^16 = 32 expected, in pairs
    exact = exact_elements(words, elements)
    for isa, backend in [*((isa, "cpp") for isa in each_isa()), ("", "reference")]:
        found = draw(n, **nonce, backend=backend)[elements]
        assert ulp_distance(found, exact).max() <= noise.MAX_ULP, (isa, backend)


# Found among 2^30 radius words of KEY: (step, element, radius word), mechanism and index 0.
RARE = [(6708, 255_541, 3), (4883, 33_858, 7), (6399, 47_445, 7), (1966, 32_692, 12)]


@pytest.mark.parametrize(("step", "element", "radius_word"), RARE)
def test_the_tail_word_decides_far_out(step, element, radius_word, each_isa):
    nonce = dict(step=step, mechanism=0, index=0)
    n = element + 9  # the pair's second element is one row of eight further on
    words = element_words(n, **nonce)
    elements = torch.tensor([element, element + 8])
    assert words[elements, 0].tolist() == [radius_word, radius_word]
    exact = exact_elements(words, elements)
    assert exact.norm() > 6.2  # the radius: -2 ln(13 / 2^32) = 6.26^2
    words[:, 1] ^= 2**31
    assert (ulp_distance(exact_elements(words, elements), exact) > 1000 * noise.MAX_ULP).all()
    for isa, backend in [*((isa, "cpp") for isa in each_isa()), ("", "reference")]:
        found = draw(n, **nonce, backend=backend)[elements]
        assert ulp_distance(found, exact).max() <= noise.MAX_ULP, (isa, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_depends_on_the_place_alone(backend, each_thread_count):
    z = draw(MANY, index=4, backend=backend)
    for threads in each_thread_count():
        for n in LENGTHS:
            assert same_bits(draw(n, index=4, backend=backend), z[:n]), (threads, n)
        for neighbours in ([], [3], [129, 0, 20_000]):
            tensors = [torch.zeros(n) for n in neighbours] + [torch.zeros(10, 7_000)]
            noise.add_noise_(tensors, KEY, STEP, 0, [*range(len(neighbours)), 4], 1.0, backend=backend)
            assert same_bits(tensors[-1].flatten(), z[: MANY - 1]), (threads, neighbours)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_updates_are_bit_identical_across_isas_and_threads(dtype, each_isa, each_thread_count):
    def results():
        generator = torch.Generator().manual_seed(0)
        shapes = [(MANY,), (129,), (3, 5), (0,), (256,), (8192,)]
        lists = [[torch.rand(s, generator=generator, dtype=dtype) for s in shapes] for _ in range(8)]
        draws = (KEY, STEP, 1, [5, 0, 1, 2, 3, 4], 1.3)
        noise.add_noise_(lists[0], *draws, backend="cpp")
        sgd = (0.5, 0.1, 0.9, 0.2, 0.01, False, True, False)
        noise.noise_sgd_(*lists[1:4], *draws, *sgd, backend="cpp")
        adam = (0.5, 3, 0.1, 0.9, 0.99, 1e-3, 0.01, False, True)
        noise.noise_adam_(lists[4], lists[1], *lists[5:8], *draws, *adam, backend="cpp")
        return [tensor for tensors in lists for tensor in tensors]

    expected = None
    for isa in each_isa():
        for threads in each_thread_count():
            found = results()
            expected = expected or found
            for i, (one, other) in enumerate(zip(found, expected, strict=True)):
                assert same_bits(one, other), (isa, threads, i)


# --- distribution -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sample() -> Tensor:
    return torch.cat([draw(2**20, key=make_key(seed)) for seed in range(4)]).double()


def test_moments(sample):
    n = sample.numel()
    for power, expected, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        # The variance of z^power is E z^(2 power) - (E z^power)^2; 3.5 sigma: 5e-4.
        assert abs(sample.pow(power).mean() - expected) < 3.5 * math.sqrt(variance / n), power


def test_kolmogorov_smirnov(sample):
    ordered = torch.special.ndtr(sample.sort().values)
    n = sample.numel()
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum(steps[1:] - ordered, ordered - steps[:-1]).max()
    assert math.sqrt(n) * distance < 1.95  # Kolmogorov's distribution: 1e-3


def test_tail_mass(sample):
    for bound in (3.0, 4.0, 4.5):
        expected = sample.numel() * math.erfc(bound / math.sqrt(2))
        assert abs((sample.abs() > bound).sum() - expected) < 3.5 * math.sqrt(expected), bound


def largest_correlation(rows: Tensor) -> float:
    """Largest off-diagonal correlation of the rows ``[m, n]``, in standard deviations of a sample correlation."""
    correlation = torch.corrcoef(rows.double()) * math.sqrt(rows.shape[1])
    return correlation.fill_diagonal_(0).abs().max().item()


def test_no_correlation_between_keys_steps_mechanisms_and_indices():
    draws = [dict(key=make_key(seed)) for seed in range(4)]
    draws += [dict(index=i) for i in (*range(1, 16), 2**31, 2**32 - 1)]
    draws += [dict(step=i) for i in (*range(3), *range(4, 16), 2**32 - 1)]
    draws += [dict(mechanism=i) for i in (*range(1, 16), 2**30 - 1)]
    draws += [dict(mechanism=1, step=0), dict(mechanism=0, step=1, index=1), dict(index=3, step=0)]
    rows = torch.stack([draw(2**14, **arguments) for arguments in draws])
    # 56 rows, 1540 pairs: 5.2 sigma is 3e-4 for all of them together. A repeated stream has 128.
    assert len(draws) == 56
    assert largest_correlation(rows) < 5.2
    assert largest_correlation(rows.square()) < 5.2


def test_no_correlation_between_the_places_of_a_superblock():
    rows = draw(2**22).reshape(-1, 128).T
    # 8128 pairs: 5.5 sigma is 3e-4 for all of them together.
    assert largest_correlation(rows) < 5.5
    assert largest_correlation(rows.square()) < 5.5
    means, variances = rows.double().mean(1), rows.double().var(1)
    assert (means * math.sqrt(rows.shape[1])).abs().max() < 4.5
    assert ((variances - 1) * math.sqrt(rows.shape[1] / 2)).abs().max() < 4.5  # 128 places: 9e-4


def test_no_correlation_over_the_length():
    z = draw(2**20).double()
    for lag in (128, 256, 2048, 16_384, 131_072, 2**19):
        product = z[lag:] * z[:-lag]
        assert abs(product.mean()) * math.sqrt(product.numel()) < 3.7, lag  # six lags: 1.3e-3 together


# --- add_noise_ and the optimizers ------------------------------------------------------------------------------------

SHAPES = [(), (0,), (7,), (2, 64, 1), (13, 11), (1031,)]
INDICES = [3, 0, 12, 4, 2**32 - 1, 1]
STEPS = 4
# Roundings that two programs of the same step may take differently for one element: no update has more operations.
ROUNDINGS = 20


def some(dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


@functools.cache
def drawn(dtype: torch.dtype, step: int, backend: str) -> list[Tensor]:
    """The noise that each of these tensors gets; not to be written to."""
    z = [torch.zeros(shape, dtype=dtype) for shape in SHAPES]
    noise.add_noise_(z, KEY, torch.tensor(step), 2, INDICES, 1.0, backend=backend)
    return z


def assert_same_but_for_rounding(found: list[Tensor], expected: list[Tensor]) -> None:
    """Equal up to `ROUNDINGS` half-spacings a step, at the size of the tensor's largest element."""
    for one, other in zip(found, expected, strict=True):
        roundings = STEPS * ROUNDINGS * torch.finfo(other.dtype).eps / 2
        size = other.abs().max().item() if other.numel() else 0.0
        torch.testing.assert_close(one, other, rtol=0, atol=roundings * size)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_add_noise_adds_std_times_z(backend, dtype):
    tensors, before = some(dtype, 0), some(dtype, 0)
    noise.add_noise_(tensors, KEY, STEP, 2, INDICES, 1.7, backend=backend)
    for tensor, old, z in zip(tensors, before, drawn(dtype, 3, backend), strict=True):
        assert same_bits(tensor, old + 1.7 * z)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_tensors_are_added_to_in_float32(dtype):
    tensors, before = some(dtype, 0), some(dtype, 0)
    noise.add_noise_(tensors, KEY, STEP, 2, INDICES, 1.7)
    for tensor, old, z in zip(tensors, before, drawn(torch.float32, 3, "reference"), strict=True):
        assert torch.equal(tensor, (old.float() + 1.7 * z).to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_noise_and_no_tensors(backend):
    tensors, before = some(torch.float32, 0), some(torch.float32, 0)
    noise.add_noise_(tensors, KEY, STEP, 2, INDICES, 0.0, backend=backend)
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(tensor, old)
    noise.add_noise_([], KEY, STEP, 2, [], 1.0, backend=backend)
    noise.noise_sgd_([], [], [], KEY, STEP, 2, [], 1.0, 1.0, 0.1, 0.0, 0.0, 0.0, False, False, True, backend=backend)
    adam = (1.0, 1.0, 1, 0.1, 0.9, 0.99, 1e-8, 0.0, False, False)
    noise.noise_adam_([], [], [], [], [], KEY, STEP, 2, [], *adam, backend=backend)


SGD_SETTINGS = [
    dict(momentum=m, dampening=d, nesterov=n, weight_decay=w, maximize=x)
    for m, d, n in [(0.0, 0.0, False), (0.9, 0.0, False), (0.9, 0.3, False), (0.9, 0.0, True)]
    for w in (0.0, 0.1)
    for x in (False, True)
]
ADAM_SETTINGS = [
    dict(amsgrad=a, decoupled_weight_decay=c, weight_decay=w, maximize=x)
    for a in (False, True)
    for c, w in [(False, 0.0), (False, 0.1), (True, 0.1)]
    for x in (False, True)
]
LR, STD, SCALE, BETAS, EPS = 0.05, 1.3, 0.25, (0.8, 0.7), 0.01  # beta2 so small that amsgrad's maximum holds on


def names(settings: dict) -> str:
    return ", ".join(name if value is True else f"{name} {value}" for name, value in settings.items() if value) or "-"


def sums_at(step: int, dtype: torch.dtype) -> list[Tensor]:
    """Sums of gradients that shrink, so that the largest second moment is not the last."""
    return [total / 4**step for total in some(dtype, 10 + step)]


def run_sgd(settings: dict, dtype: torch.dtype, backend: str) -> list[list[Tensor]]:
    """Parameters and momentum buffers after `STEPS` steps; checks on the way that the sums are only read."""
    params = some(dtype, 0)
    buffers = [torch.full_like(p, math.nan) for p in params] if settings["momentum"] else []
    for step in range(STEPS):
        sums = sums_at(step, dtype)
        noise.noise_sgd_(
            params,
            sums,
            buffers,
            KEY,
            torch.tensor(step),
            2,
            INDICES,
            STD,
            SCALE,
            LR,
            settings["momentum"],
            settings["dampening"],
            settings["weight_decay"],
            settings["nesterov"],
            settings["maximize"],
            first_step=step == 0,
            backend=backend,
        )
        assert all(same_bits(s, t) and s._version == 0 for s, t in zip(sums, sums_at(step, dtype), strict=True))
    return [params, buffers]


def run_adam(settings: dict, dtype: torch.dtype, backend: str) -> list[list[Tensor]]:
    """Parameters and moments after `STEPS` steps; checks on the way that the sums are only read."""
    params = some(dtype, 0)
    first, second, largest = ([torch.zeros_like(p) for p in params] for _ in range(3))
    largest = largest if settings["amsgrad"] else []
    for step in range(STEPS):
        sums = sums_at(step, dtype)
        noise.noise_adam_(
            params,
            sums,
            first,
            second,
            largest,
            KEY,
            torch.tensor(step),
            2,
            INDICES,
            STD / 4**step,
            SCALE,
            step + 1,
            LR,
            *BETAS,
            EPS,
            settings["weight_decay"],
            settings["decoupled_weight_decay"],
            settings["maximize"],
            backend=backend,
        )
        assert all(same_bits(s, t) and s._version == 0 for s, t in zip(sums, sums_at(step, dtype), strict=True))
    return [params, first, second, largest]


def run_torch(optimizer: torch.optim.Optimizer, params: list[Tensor], stds: list[float], backend: str) -> None:
    """The same steps by torch.optim, on the same noisy gradients."""
    for step, std in enumerate(stds):
        z = drawn(params[0].dtype, step, backend)
        for param, total, one in zip(params, sums_at(step, params[0].dtype), z, strict=True):
            param.grad = (total + std * one) * SCALE
        optimizer.step()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("settings", SGD_SETTINGS, ids=names)
def test_noise_sgd_is_sgd_on_noisy_gradients(settings, dtype, backend):
    expected = some(dtype, 0)
    optimizer = torch.optim.SGD(expected, lr=LR, foreach=False, **settings)
    run_torch(optimizer, expected, [STD] * STEPS, backend)
    params, buffers = run_sgd(settings, dtype, backend)
    assert_same_but_for_rounding(params, expected)
    if buffers:
        assert_same_but_for_rounding(buffers, [optimizer.state[p]["momentum_buffer"] for p in expected])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("settings", ADAM_SETTINGS, ids=names)
def test_noise_adam_is_adam_on_noisy_gradients(settings, dtype, backend):
    expected = some(dtype, 0)
    optimizer = torch.optim.Adam(expected, lr=LR, betas=BETAS, eps=EPS, foreach=False, **settings)
    run_torch(optimizer, expected, [STD / 4**step for step in range(STEPS)], backend)
    params, *moments = run_adam(settings, dtype, backend)
    assert_same_but_for_rounding(params, expected)
    for name, found in zip(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), moments, strict=True):
        if found:
            assert_same_but_for_rounding(found, [optimizer.state[p][name] for p in expected])


def test_the_optimizer_tests_would_notice_every_setting():
    """No two settings end within a hundred times the tolerance that the tests above allow."""
    for run, all_settings in ((run_sgd, SGD_SETTINGS), (run_adam, ADAM_SETTINGS)):
        ends = {names(settings): run(settings, torch.float32, BACKENDS[0])[0][-1] for settings in all_settings}
        tolerance = STEPS * ROUNDINGS * torch.finfo(torch.float32).eps / 2
        for (one, a), (other, b) in itertools.combinations(ends.items(), 2):
            assert (a - b).abs().max() > 100 * tolerance * a.abs().max(), (one, other)


# --- what is refused, and what falls back -----------------------------------------------------------------------------


def call_add(**changes):
    arguments = dict(
        tensors=[torch.ones(3), torch.ones(2, 2)], key=KEY, step=STEP, mechanism=0, indices=[0, 1], std=1.0
    )
    noise.add_noise_(**{**arguments, **changes})


def call_sgd(**changes):
    arguments = dict(
        params=[torch.ones(3)],
        sums=[torch.ones(3)],
        momentum_buffers=[torch.ones(3)],
        key=KEY,
        step=STEP,
        mechanism=0,
        indices=[0],
        std=1.0,
        scale=1.0,
        lr=0.1,
        momentum=0.9,
        dampening=0.0,
        weight_decay=0.0,
        nesterov=False,
        maximize=False,
        first_step=False,
    )
    noise.noise_sgd_(**{**arguments, **changes})


def call_adam(**changes):
    arguments = dict(
        params=[torch.ones(3)],
        sums=[torch.ones(3)],
        exp_avgs=[torch.ones(3)],
        exp_avg_sqs=[torch.ones(3)],
        max_exp_avg_sqs=[torch.ones(3)],
        key=KEY,
        step=STEP,
        mechanism=0,
        indices=[0],
        std=1.0,
        scale=1.0,
        optimizer_step=1,
        lr=0.1,
        beta1=0.9,
        beta2=0.99,
        eps=1e-8,
        weight_decay=0.0,
        decoupled=False,
        maximize=False,
    )
    noise.noise_adam_(**{**arguments, **changes})


def call_words(**changes):
    arguments = dict(key=KEY, step=STEP, mechanism=0, domain=0, index=0, n=3)
    noise.random_words(**{**arguments, **changes})


REFUSED = [
    (call_add, dict(indices=[1, 1]), "indices .* repeat"),
    (call_add, dict(indices=[0]), "indices holds 1 numbers, tensors 2 tensors"),
    (call_add, dict(indices=[0, 2**32]), "indices hold 4294967296, expected 0 to"),
    (call_add, dict(indices=[0, -1]), "indices hold -1"),
    (call_add, dict(mechanism=2**30), "mechanism is 1073741824"),
    (call_add, dict(mechanism=-1), "mechanism is -1"),
    (call_add, dict(std=-0.1), "std is -0.1"),
    (call_add, dict(std=math.nan), "std is nan"),
    (call_add, dict(std=math.inf), "std is inf"),
    (call_add, dict(key=KEY.long()), r"key is torch.int64 \[8\]"),
    (call_add, dict(key=KEY[:7]), r"key is torch.int32 \[7\]"),
    (call_add, dict(step=torch.tensor(1, dtype=torch.int32)), "step is torch.int32"),
    (call_add, dict(step=torch.tensor([1])), r"step is torch.int64 \[1\]"),
    (call_add, dict(tensors=[torch.ones(3), torch.ones(2, dtype=torch.int32)]), r"tensors\[1\] is torch.int32"),
    (call_add, dict(tensors=[torch.ones(3), torch.ones(2, dtype=torch.complex64)]), r"tensors\[1\] is torch.complex64"),
    (call_sgd, dict(sums=[]), "sums holds 0 tensors, params 1"),
    (call_sgd, dict(sums=[torch.ones(1, 3)]), r"sums\[0\] has shape \[1, 3\], params\[0\] \[3\]"),
    (call_sgd, dict(momentum_buffers=[]), "momentum is 0.9 but momentum_buffers is empty"),
    (call_sgd, dict(momentum_buffers=[torch.ones(4)]), r"momentum_buffers\[0\] has shape \[4\]"),
    (call_sgd, dict(indices=[0, 1]), "indices holds 2 numbers"),
    (call_adam, dict(exp_avgs=[]), "exp_avgs holds 0"),
    (call_adam, dict(exp_avg_sqs=[torch.ones(2)]), r"exp_avg_sqs\[0\] has shape"),
    (call_adam, dict(max_exp_avg_sqs=[torch.ones(2)]), r"max_exp_avg_sqs\[0\] has shape"),
    (call_adam, dict(optimizer_step=0), "optimizer_step is 0"),
    (call_words, dict(domain=4), "domain is 4"),
    (call_words, dict(n=-1), "n is -1"),
    (call_words, dict(index=-1), "indices hold -1"),
]


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize(("call", "changes", "message"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_refused_calls_name_the_argument(call, changes, message, backend):
    call(backend=backend)
    with pytest.raises(ValueError, match=message):
        call(**changes, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("step", [-1, 2**32, 2**40 + 3])
def test_a_step_whose_noise_would_repeat_is_refused(step, backend):
    untouched = torch.ones(300)
    for call, changes in [(call_add, dict(tensors=[untouched, torch.ones(1)])), (call_sgd, {}), (call_words, {})]:
        with pytest.raises(RuntimeError, match="step is"):
            call(step=torch.tensor(step), **changes, backend=backend)
    assert (untouched == 1).all()


UNSUPPORTED = [
    (call_add, lambda: dict(tensors=[torch.ones(3), torch.ones(2, 5).T]), "tensor 1 is not contiguous"),
    (call_add, lambda: dict(tensors=[torch.ones(3, dtype=torch.bfloat16), torch.ones(2)]), "tensor 0 has dtype"),
    (call_sgd, lambda: dict(sums=[torch.ones(6)[::2]]), "tensor 0 is not contiguous"),
    (call_sgd, lambda: dict(sums=[torch.ones(3).double()]), "tensor 0 has dtype torch.float32, torch.float64"),
    (call_adam, lambda: dict(exp_avgs=[torch.ones(6)[::2]]), "tensor 0 is not contiguous"),
]


@native
@pytest.mark.parametrize(("call", "changes", "reason"), UNSUPPORTED, ids=lambda x: x if isinstance(x, str) else "")
def test_what_the_kernels_do_not_take_falls_back_or_raises(call, changes, reason):
    with pytest.raises(NotImplementedError, match=f"cpp: {reason}.*Usable here: reference"):
        call(**changes(), backend="cpp")
    automatic, reference = changes(), changes()
    call(**automatic)
    call(**reference, backend="reference")
    for name in automatic:
        for one, other, untouched in zip(automatic[name], reference[name], changes()[name], strict=True):
            assert torch.equal(one, other)
            assert name == "sums" or not torch.equal(one, untouched)


def test_strided_tensors_get_the_noise_of_their_row_major_place():
    strided, plain = torch.zeros(5, 40).T, torch.zeros(40, 5)
    noise.add_noise_([strided], KEY, STEP, 0, [0], 1.0)
    noise.add_noise_([plain], KEY, STEP, 0, [0], 1.0, backend="reference")
    assert torch.equal(strided, plain)


@native
def test_the_kernels_guard_memory_when_called_directly():
    ops = torch.ops.dp2vae_fast
    one, two = torch.ones(3), torch.ones(4)
    draws = (KEY, STEP, 0)
    sgd = (1.0, 1.0, 0.1, 0.9, 0.0, 0.0, False, False, False)
    for tensors, indices in [([torch.ones(6)[::2]], [0]), ([one.half()], [0]), ([one, two], [0, 0]), ([one], [])]:
        with pytest.raises(RuntimeError):
            ops.add_noise_.default(tensors, *draws, indices, 1.0)
    for lists in [([one], [two], [one]), ([one], [], [one]), ([one], [one.double()], [one]), ([one], [one], [])]:
        with pytest.raises(RuntimeError):
            ops.noise_sgd_.default(*lists, *draws, [0], *sgd)
    for words in [(KEY[:4], STEP, 0, 0, 0, 4), (KEY.long(), STEP, 0, 0, 0, 4), (KEY, STEP, 0, 0, 0, -1)]:
        with pytest.raises(RuntimeError):
            ops.random_words.default(*words)
    assert (one == 1).all() and (two == 1).all()


@native
def test_an_unknown_instruction_set_changes_nothing():
    before = _C.build_info()["isa"]
    assert not _C.select_isa("sse9") and _C.build_info()["isa"] == before


# --- every op as PyTorch sees it --------------------------------------------------------------------------------------


def arguments_of_every_op() -> dict[str, tuple]:
    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))

    def pair() -> list[Tensor]:
        return [torch.ones(3), torch.ones(130)]

    convolution = (randn(2, 4, 5), randn(2, 6, 2), [6, 2, 2], [2], [0], [1], 2, False)
    draws = (KEY, STEP, 0, [0, 1], 1.0)
    return {
        "affine_grad_sample": (randn(2, 3, 4), randn(2, 3, 4)),
        "clip_factors": (randn(3, 2).square(), randn(3, 2).square(), 1.0),
        "conv_grad_sample": convolution,
        "conv_norm_sq": convolution,
        "embedding_norm_sq": (torch.tensor([[0, 1, 1], [2, 3, 0]]), randn(2, 3, 4), 3),
        "grad_sample_norm_sq": (randn(2, 3, 4),),
        "linear_grad_sample": (randn(2, 3, 4), randn(2, 3, 5)),
        "linear_norm_sq": (randn(2, 3, 4), randn(2, 3, 5)),
        "random_words": (KEY, STEP, 0, noise.COINS, 0, 37),
        "add_noise_": (pair(), *draws),
        "noise_sgd_": (pair(), pair(), pair(), *draws, 1.0, 0.1, 0.9, 0.0, 0.1, False, False, False),
        "noise_adam_": (
            *(pair() for _ in range(5)),
            *draws,
            *(1.0, 2, 0.1, 0.9, 0.99, 1e-8, 0.1, True, False),
        ),
    }


@pytest.mark.parametrize("overload", ["default", "reference"])
@pytest.mark.parametrize("name", sorted(n for n, op in OPS.items() if op.__module__.startswith("dp2vae_fast.")))
def test_opcheck(name, overload):
    arguments = arguments_of_every_op()
    assert name in arguments, f"add arguments for op {name} to arguments_of_every_op"
    torch.library.opcheck(getattr(getattr(torch.ops.dp2vae_fast, name), overload), arguments[name])


def test_ops_compile_without_a_graph_break_to_the_same_bits():
    adam = (0.5, 3, 0.1, 0.9, 0.99, 1e-3, 0.01, False, False)

    def step(params, sums, first, second, key, step):
        noise.noise_adam_(params, sums, first, second, [], key, step, 0, [0, 1], 1.3, *adam)
        return noise.random_words(key, step, 0, noise.COINS, 0, 40), params[1] + 1

    def lists():
        return [[torch.linspace(1, 2, 3), torch.linspace(1, 2, 130)] for _ in range(4)]

    eager, compiled = lists(), lists()
    expected = step(*eager, KEY, STEP)
    found = torch.compile(step, fullgraph=True)(*compiled, KEY, STEP)
    for one, other in zip(itertools.chain(found, *compiled), itertools.chain(expected, *eager), strict=True):
        assert same_bits(one, other)
    assert not same_bits(compiled[0][1], lists()[0][1])


def test_the_package_works_without_the_native_module():
    code = """
import sys, warnings
sys.modules["dp2vae_fast._C"] = None
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    import torch, dp2vae_fast
    from dp2vae_fast.ops import noise
    key, x = torch.arange(8, dtype=torch.int32), torch.zeros(200)
    noise.add_noise_([x], key, torch.tensor(3), 0, [0], 1.0)
    noise.add_noise_([x], key, torch.tensor(4), 0, [0], 1.0)
assert torch.isfinite(x).all() and x.std() > 1
said = [str(w.message) for w in said if "dp2vae_fast" in str(w.message)]
assert len(said) == 1, said
assert said[0] == (
    "dp2vae_fast runs on its plain-PyTorch reference ops: "
    "the native module is not built (reinstall with a C++ compiler)"
), said
rows = [row for row in dp2vae_fast.backends_table() if row.backend == "cpp"]
assert {"random_words", "add_noise_", "noise_sgd_", "noise_adam_"} <= {row.op for row in rows}
assert {(row.available, row.reason) for row in rows} == {
    (False, "the native module is not built (reinstall with a C++ compiler)")
}, rows
try:
    noise.random_words(key, torch.tensor(3), 0, 0, 0, 5, backend="cpp")
except NotImplementedError as error:
    assert "cpp: the native module is not built" in str(error), error
else:
    raise AssertionError("backend='cpp' ran without the native module")
print(noise.random_words(key, torch.tensor(3), 0, 0, 0, 5).tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "DP2VAE_FAST_BACKEND": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    key = torch.arange(8, dtype=torch.int32)
    assert done.stdout.strip() == str(noise.random_words(key, STEP, 0, 0, 0, 5).tolist())
    assert dp2vae_fast.backends_table()  # and this process still has what it had
