"""Normals: to the last few bits of the exact ones, and distributed as they should be.

Keys are fixed, so that nothing here is left to chance: a statistic that passes once passes always. Its threshold is
one that a sound generator exceeds with a probability below 1e-3, so a fault that shows is not waved through.
"""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from streams import _C, BACKENDS, KEY, LENGTHS, MANY, STEP, draw, make_key, native, same_bits, ulp_distance
from torch import Tensor

from dp2vae_fast.ops import noise

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
