"""Ten thousand adversarial records against the clipping bound, in every arithmetic; and sums against their rounding.

A record is a gradient over several parameters of several kinds. Its realised contribution is what is really added up:
the factor goes into the backprops, or multiplies the kept gradient, in the arithmetic at hand, and everything that
follows is exact (float64).
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dp2vae_fast import ops
from dp2vae_fast.engine.clipping import AutomaticClipping, FlatClipping, GroupClipping
from dp2vae_fast.engine.gradients.gradient import Gradient, Kept
from dp2vae_fast.engine.gradients.products import ConvGeometry, ConvProduct, EmbeddingProduct, LinearProduct
from dp2vae_fast.engine.precision import RECORDS_PER_PART, records_at_most, roundings_on, sum_rounding
from dp2vae_fast.ops import _op
from dp2vae_fast.ops import norm as norm_ops

RECORDS = 100
ARITHMETICS = ("float32", "bfloat16", "float16", "tf32")
MODES = {
    "flat": FlatClipping(),
    "automatic": AutomaticClipping(stability=1e-6),
    "per layer": GroupClipping(groups={i: i for i in range(8)}, bounds=[1.0, 0.3, 1e-3, 2.0, 0.5, 0.1, 0.7, 0.2]),
}


def rounded(x: Tensor, arithmetic: str) -> Tensor:
    """``x`` (float64) as the operands of this arithmetic hold it, in float32."""
    if arithmetic in ("bfloat16", "float16"):
        return x.to(getattr(torch, arithmetic)).float()
    return tf32(x.float()) if arithmetic == "tf32" else x.float()


def tf32(x: Tensor) -> Tensor:
    """Round to eleven significant bits, half away from zero, as tensor cores take their operands."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def adversarial(generator: torch.Generator, positions: int, features: int, reach: float) -> tuple[Tensor, Tensor]:
    """Activations and backprops ``[N, T, D]``, each record bad in a way of its own; sizes of up to ``10^reach``."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    a, b = randn(RECORDS, positions, features), randn(RECORDS, positions, features)
    kind = torch.randint(6, (RECORDS, 1, 1), generator=generator)
    a = torch.where(kind == 1, a + 10.0 ** (reach * randn(RECORDS, 1, 1)), a)  # a mean, and
    b = torch.where(kind == 1, b - b.mean(1, keepdim=True), b)  # backprops of sum zero: the Gram sum cancels
    alternating = (-1.0) ** torch.arange(positions).reshape(1, -1, 1)
    a, b = torch.where(kind == 2, torch.ones_like(a), a), torch.where(kind == 2, alternating * (1 + 1e-7 * b), b)
    a, b = torch.where(kind == 3, a[:, :1].expand_as(a), a), torch.where(kind == 3, b[:, :1].expand_as(b), b)
    a = torch.where(kind == 4, a * (randn(*a.shape) > 1.5), a)  # sparse
    b = torch.where(kind == 5, b * 10.0 ** (reach * randn(*b.shape)), b)  # one entry outweighs all others
    sizes = 10.0 ** ((reach + 20) * torch.rand(2, RECORDS, 1, 1, generator=generator, dtype=torch.float64) - 20)
    return a * sizes[0], b * sizes[1]


def record_gradients(generator: torch.Generator, arithmetic: str) -> list[Gradient]:
    """Eight parameters of every kind, of the same hundred records."""

    def operands(positions: int, features: int) -> tuple[Tensor, Tensor]:
        a, b = adversarial(generator, positions, features, 1.0 if arithmetic == "float16" else 4.0)
        return rounded(a, arithmetic), rounded(b, arithmetic)

    def maps(side: int, channels: int) -> tuple[Tensor, Tensor]:
        return tuple(x.transpose(1, 2).unflatten(2, (side, side)) for x in operands(side * side, channels))  # type: ignore[return-value]

    plain = ConvGeometry((4, 4, 3, 3), (1, 1), (1, 1), (1, 1), 1, False)
    grouped = ConvGeometry((4, 2, 1, 1), (1, 1), (0, 0), (1, 1), 2, True)
    indices = torch.randint(3, (RECORDS, 30), generator=generator)
    return [
        LinearProduct(*operands(1, 12)),
        LinearProduct(*operands(40, 3)),
        LinearProduct(*operands(700, 2)),
        ConvProduct(*maps(4, 4), plain),
        ConvProduct(*maps(7, 4), grouped),
        EmbeddingProduct(indices, operands(30, 5)[1], 3, -1),
        Kept(operands(6, 9)[1]),
        Kept(operands(1, 200)[1]),
    ]


def realised_sq(gradient: Gradient, factors: Tensor, arithmetic: str) -> Tensor:
    """``|c_n g_n|^2`` in float64, of every record's part of the sum as it is multiplied."""

    def weighted(x: Tensor) -> Tensor:
        c = factors.reshape(-1, *[1] * (x.dim() - 1))
        return x.masked_fill(c == 0, 0) * c

    if isinstance(gradient, LinearProduct) and gradient.activations.shape[1] == 1:
        b = weighted(gradient.backprops)
        b = tf32(b) if arithmetic == "tf32" else b
        a = gradient.activations.masked_fill((factors == 0)[:, None, None], 0)
        return LinearProduct(a.double(), b.double()).grad_sample().flatten(1).square().sum(1)
    if arithmetic == "tf32" and isinstance(gradient, Kept):
        return tf32(weighted(gradient.values)).double().flatten(1).square().sum(1)
    # Formed in float32 by the native kernels; in float64 by the references, from operands as they are.
    formed = [gradient.grad_sample(), gradient.in_float64(torch.arange(gradient.records)).grad_sample()]
    squares = [weighted(x.double()).flatten(1).square().sum(1) for x in formed]
    return torch.maximum(*squares)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("mode", MODES)
def test_ten_thousand_adversarial_records_stay_within_the_bound(mode: str, arithmetic: str, monkeypatch):
    """12 combinations x 9 batches x 100 records."""
    if arithmetic == "tf32":
        monkeypatch.setattr(norm_ops, "operand_roundoff", lambda like: 2.0**-11)
        monkeypatch.setattr(_op, "_requested", ("reference",))  # the native kernels round no operands
    clipping, used, reached = MODES[mode], 0, 0.0
    for seed in range(9):
        generator = torch.Generator().manual_seed(1000 * ARITHMETICS.index(arithmetic) + seed)
        gradients = record_gradients(generator, arithmetic)
        bound = 10.0 ** float(torch.randint(-6, 4, (1,), generator=generator))
        scale = [1.0, 3.0, 257.0][seed % 3]
        factors = clipping.factors(dict(enumerate(gradients)), bound, scale)
        total = torch.zeros(RECORDS, dtype=torch.float64)
        for place, gradient in enumerate(gradients):
            total += realised_sq(gradient, factors[place], arithmetic)
        assert bool((total.sqrt() <= clipping.sensitivity(bound)).all())
        used += int((factors[0] > 0).sum())
        reached = max(reached, float(total.sqrt().max()) / clipping.sensitivity(bound))
    assert used > 400 and reached > 0.5  # the attack is on records that take part, and comes near


def test_operands_rounded_to_bfloat16_are_still_counted_where_a_norm_is_taken_again(monkeypatch):
    """By up to 2^-8 each, always upwards: error bounds of three per cent, which float64 does not take away."""
    monkeypatch.setattr(norm_ops, "operand_roundoff", lambda like: 2.0**-8 * (like.dtype != torch.float64))
    a = torch.full((RECORDS, 1, 6), 1 + 0.51 * 2.0**-7)
    sizes = 50 * (1 + torch.rand(RECORDS, generator=torch.Generator().manual_seed(3)))
    gradient = LinearProduct(a, a * sizes.reshape(-1, 1, 1))
    factors = FlatClipping().factors({0: gradient}, 1.0)[0]
    multiplied = [
        (x + 2.0**-8 * x.abs()).to(torch.bfloat16).double() for x in (a, gradient.backprops * factors[:, None, None])
    ]
    contribution = multiplied[0].flatten(1).norm(dim=1) * multiplied[1].flatten(1).norm(dim=1)
    assert bool((contribution <= 1.0).all())


@settings(max_examples=150, deadline=None)
@given(
    positions=st.integers(1, 60),
    features=st.integers(1, 20),
    offset=st.floats(-1e6, 1e6, width=32),
    sizes=st.tuples(st.floats(1e-30, 1e18), st.floats(1e-30, 1e18)),
    bound=st.floats(1e-6, 1e6),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_size(positions, features, offset, sizes, bound, seed):
    generator = torch.Generator().manual_seed(seed)
    a = (torch.randn(4, positions, features, generator=generator) + offset) * sizes[0]
    b = torch.randn(4, positions, features, generator=generator)
    gradient = LinearProduct(a, (b - b.mean(1, keepdim=True)) * sizes[1])
    for either in (gradient, Kept(gradient.grad_sample())):
        factors = FlatClipping().factors({0: either}, bound)[0]
        assert bool((realised_sq(either, factors, "float32").sqrt() <= bound).all())


# Sums over records -----------------------------------------------------------------------------------


def hostile_sum(records: int, generator: torch.Generator) -> Tensor:
    """Values whose partial sums round as badly as can be: large ones first, then many just above half an ulp."""
    values = torch.full((records, 64), 1.0)
    values[: records // 2] += 2.0**-10 * torch.rand(records // 2, 64, generator=generator)
    values[records // 2 :] *= 1.0 + 2.0**-23
    return values / values.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("records", [3, RECORDS_PER_PART, 5000])
def test_the_rounding_of_a_sum_is_within_what_is_stated(records: int):
    generator = torch.Generator().manual_seed(0)
    values = hostile_sum(records, generator)
    a = torch.randn(records, 1, 8, generator=generator)
    a = a / a.norm(dim=2, keepdim=True)
    ones = torch.ones(records)
    for gradient in (Kept(values), LinearProduct(a, values.unsqueeze(1))):
        exact = gradient.in_float64(torch.arange(records)).grad_sample().sum(0)
        off = float((gradient.weighted_sum(ones).float().double() - exact).norm())
        assert off <= 0.5 * sum_rounding(records)  # each of the two neighbours' sums may be off by half


def test_the_rounding_that_is_stated_is_nearly_reached():
    """Terms of at most 1, added one after the other, each of which the sum is rounded up by as much as can be."""
    total, exact = np.float32(1), Fraction(1)
    for _ in range(RECORDS_PER_PART - 1):
        unit = float(np.spacing(total + np.float32(1)))
        halfway = (np.floor((float(total) + 1.0) / unit - 0.5) + 0.5) * unit
        term = np.nextafter(np.float32(halfway - float(total)), np.float32(1))
        assert 0.9 < term <= 1
        exact += Fraction(float(term))
        total += term
    off = float(Fraction(float(total)) - exact)
    part = 0.5 * sum_rounding(0, largest=RECORDS_PER_PART)
    assert 0.4 * part < off < part


@pytest.mark.parametrize("leaves", [2, 3, 7, 12])
def test_terms_added_one_by_one_pass_through_most_additions(leaves: int):
    """Of all orders of additions, trees with so many leaves, the squares of the leaves' depths add up to most."""
    trees = {1: {(0, 0)}}  # leaves: (sum of their depths, of the squares)
    for m in range(2, leaves + 1):
        pairs = ((one, other) for a in range(1, m) for one in trees[a] for other in trees[m - a])
        trees[m] = {(d + e + m, dd + ee + 2 * (d + e) + m) for (d, dd), (e, ee) in pairs}
    squares = [*range(1, leaves), leaves - 1]
    assert max(dd for _, dd in trees[leaves]) == sum(depth**2 for depth in squares)


@pytest.mark.parametrize("positions", [16, 256])
def test_products_over_positions_do_not_mix_records(positions: int):
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(50, positions, 6, generator=generator) + 100 for _ in range(2))
    gradient = LinearProduct(a, b - b.mean(1, keepdim=True))
    factors = FlatClipping().factors({0: gradient}, 1.0)[0]
    parts = torch.einsum("n,npd->pd", factors.double(), gradient.grad_sample().double())
    fine = float((gradient.weighted_sum(factors) - parts).norm())
    coarse = float((gradient.weighted_sum(factors, torch.float32).double() - parts).norm())
    assert fine <= 0.5 * sum_rounding(50)
    assert fine < coarse


class Contractions(TorchDispatchMode):
    """Over how many terms, or records, the sums of the vendor library's went."""

    def __init__(self) -> None:
        super().__init__()
        self.terms: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default:
            self.terms.append(args[0].shape[1])
        elif func in (torch.ops.aten.convolution_backward.default, torch.ops.aten.embedding_dense_backward.default):
            self.terms.append(len(args[0]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["linear", "convolution", "embedding"])
def test_pieces_of_few_records_are_added_up_together(kind: str):
    """The pieces of a record, one a position, may be long and cancel: `sum_rounding` counts on 128 records of them."""
    generator = torch.Generator().manual_seed(4)
    records, positions = 2 * RECORDS_PER_PART + 3, 5
    factors = 0.5 ** torch.randint(0, 9, (records,), generator=generator)
    b = torch.randn(records, positions, 4, generator=generator)
    if kind == "embedding":
        gradient = EmbeddingProduct(torch.randint(6, (records, positions), generator=generator), b, 6, -1)
    else:
        gradient = LinearProduct(torch.randn(records, positions, 3, generator=generator), b)
    exact = torch.einsum("n,npd->pd", factors.double(), gradient.in_float64(torch.arange(records)).grad_sample())
    with Contractions() as seen:
        if kind == "embedding":
            found = gradient.weighted_sum(factors)
        elif kind == "linear":
            found = ops.linear_weighted_sum.reference(gradient.activations, b, factors)
        else:
            a, b = (x.transpose(1, 2) for x in (gradient.activations, b))
            found = ops.conv_weighted_sum.reference(a, b, factors, [4, 3, 1], [1], [0], [1], 1, False)[:, :, 0]
    assert seen.terms == [n * (positions if kind == "linear" else 1) for n in (RECORDS_PER_PART, RECORDS_PER_PART, 3)]
    torch.testing.assert_close(found.float(), exact.float(), rtol=2.0**-23, atol=0)


@pytest.mark.parametrize("allowed", ["ieee", "tf32"])
def test_sums_on_tensor_cores_are_counted_where_they_may_be(allowed: str):
    products, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
    try:
        products.fp32_precision = allowed
        assert roundings_on(torch.device("cpu")) == 1
        assert roundings_on(torch.device("cuda")) == (3 if allowed == "tf32" else 1)
    finally:
        products.fp32_precision = before
    assert sum_rounding(256, roundings=3) > 2.5 * sum_rounding(256)


@pytest.mark.parametrize("expected", [1, 16, 256, 4096])
def test_draws_are_almost_never_larger_than_what_is_planned_for(expected: int):
    for size in (expected, 2 * expected, 1000 * expected):
        rate = expected / size
        assert binom.sf(records_at_most(expected), size, rate) < 2.0**-64
    assert records_at_most(expected) < 1.7 * expected + 60


def test_ops_and_sums_know_subnormal_numbers():
    values = torch.full((2, 4), 1e-42)
    norm_sq, error = ops.grad_sample_norm_sq(values)
    assert bool((values.double().square().sum(1) <= (norm_sq + error).double()).all())


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_norm_beyond_float32_bounds_its_record(kind: str, each_isa):
    """Products of two positions overflow to minus infinity where those of each with itself are held in double."""
    spikes = torch.zeros(1, 36)
    spikes[0, 7], spikes[0, 28] = 1e10, -3e10
    if kind == "linear":
        gradient: Gradient = LinearProduct(spikes.unsqueeze(2), torch.full((1, 36, 1), 1e10))
    else:
        geometry = ConvGeometry((1, 1, 2, 2), (1, 1), (0, 0), (1, 1), 1, False)
        gradient = ConvProduct(spikes.reshape(1, 1, 6, 6), torch.full((1, 1, 5, 5), 1e10), geometry=geometry)
    beside = Kept(torch.full((1, 1), 1e18))  # large, and its error is small: the record is not taken again
    for _ in each_isa():
        for second_look in (True, False):
            clipping = FlatClipping()
            clipping.second_look = second_look
            factors = clipping.factors({"beside": beside, "weight": gradient}, 1.0)["weight"]
            assert gradient.weighted_sum(factors, torch.float64).norm() <= 1.0
