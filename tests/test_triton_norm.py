"""Triton norms and gradients against float64: the error bound is the tolerance, and must hold where sums cancel."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from test_products import SHAPES, Shape, conv_product
from test_triton import DEVICE
from torch import Tensor

from dp2vae_fast import ops
from dp2vae_fast.engine.gradients.products import ConvProduct

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from dp2vae_fast.kernels import _common  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

Norms = tuple[Tensor, Tensor]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BOUND = 0.7


def linear_calls(a: Tensor, b: Tensor) -> dict[str, Callable[[], Norms]]:
    return {
        "gram": lambda: ops.linear_norm_sq(a, b, backend="triton"),
        "direct": lambda: ops.linear_direct_norm_sq(a, b, backend="triton"),
    }


def conv_calls(product: ConvProduct) -> dict[str, Callable[[], Norms]]:
    arguments = (product.activations.to(DEVICE), product.backprops.to(DEVICE), *product.geometry.arguments())
    return {
        "gram": lambda: ops.conv_norm_sq(*arguments, backend="triton"),
        "direct": lambda: ops.conv_direct_norm_sq(*arguments, backend="triton"),
    }


def squares(values: Tensor) -> Tensor:
    return values.double().flatten(1).square().sum(1)


def linear_reach(a: Tensor, b: Tensor) -> Tensor:
    """The square of the lengths of a record's terms, added up: what the error is in proportion to."""
    return (a.double().norm(dim=2) * b.double().norm(dim=2)).sum(1).square()


def assert_bounded(norms: Norms, exact: Tensor, reach: Tensor) -> None:
    """The error covers the difference, and is of use: some hundreds of roundings, of which 2,000 are 1.2e-4."""
    norm_sq, error = norms
    assert norm_sq.dtype == error.dtype == torch.float32
    assert bool(((norm_sq.double() - exact).abs() <= error.double()).all())
    assert bool((error.double() <= 2000 * 2.0**-24 * reach + 1e-20).all())


def pair(t: int, d: int, p: int, dtype: torch.dtype = torch.float32, records: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(t + d + p)
    a, b = (torch.randn(records, t, f, generator=generator) for f in (d, p))
    return a.to(dtype).to(DEVICE), b.to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t, d, p", [(1, 7, 5), (1, 1100, 3), (2, 1, 1), (16, 33, 17), (33, 100, 3), (70, 16, 65)])
def test_linear_layers(t: int, d: int, p: int, dtype: torch.dtype):
    a, b = pair(t, d, p, dtype)
    exact = squares(b.double().mT @ a.double())
    for call in linear_calls(a, b).values():
        assert_bounded(call(), exact, linear_reach(a, b))
    values, *norms = ops.linear_kept(a, b, backend="triton")
    lengths = b.double().abs().mT @ a.double().abs()
    assert bool(((values - b.double().mT @ a.double()).abs() <= 3 * t * 2.0**-24 * lengths).all())
    assert_bounded((norms[0], norms[1]), squares(values), squares(values))


def test_linear_layers_of_two_dtypes_and_any_strides():
    a, b = pair(37, 19, 21)
    exact = squares(b.double().mT @ a.double())
    for strided in (lambda x: x.mT.contiguous().mT, lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)):
        for call in linear_calls(strided(a), strided(b)).values():
            assert_bounded(call(), exact, linear_reach(a, b))
    exact = squares(b.half().double().mT @ a.double())
    for call in linear_calls(a, b.half()).values():
        assert_bounded(call(), exact, linear_reach(a, b))


# Tiles in one dimension, in two and in three; strides, phases, groups; a linear layer at every position.
CONVOLUTIONS = ["1-d", "1x1 strided", "1x1 padded", "dilated", "wide stride", "decoder", "lopsided"]
CONVOLUTIONS += ["one position", "3x3", "transposed, all at once", "3-d transposed", "padding only in part"]


def convolution_cases(names: list[str]) -> list[tuple[Shape, str, torch.dtype]]:
    """Shapes of these names; two of them lie in memory in every way and have every type."""
    cases = [(s, "contiguous", torch.float32) for s in SHAPES if s.name in names]
    for s in SHAPES:
        if s.name in ("dilated", "decoder"):
            cases += [(s, memory, torch.float32) for memory in ("channels last", "strided")]
            cases += [(s, "contiguous", dtype) for dtype in DTYPES[1:]]
    return cases


@pytest.mark.parametrize(
    "shape, memory, dtype", convolution_cases(CONVOLUTIONS), ids=lambda x: getattr(x, "name", str(x))
)
def test_convolutions(shape: Shape, memory: str, dtype: torch.dtype):
    whole = conv_product(shape, dtype, memory)
    product = ConvProduct(whole.activations[:2], whole.backprops[:2], whole.geometry)
    exact = product.in_float64(torch.arange(2)).grad_sample().to(DEVICE)
    magnitudes = ConvProduct(product.activations.abs(), product.backprops.abs(), product.geometry)
    reach = squares(magnitudes.in_float64(torch.arange(2)).grad_sample().to(DEVICE))
    for call in conv_calls(product).values():
        norms = call()
        torch.testing.assert_close(norms[0].double(), squares(exact), rtol=1e-5, atol=0)  # as tests/test_products.py
        assert bool(((norms[0].double() - squares(exact)).abs() <= norms[1]).all())
        assert bool((norms[1].double() <= 2000 * 2.0**-24 * 100 * reach).all())
    arguments = (product.activations.to(DEVICE), product.backprops.to(DEVICE), *product.geometry.arguments())
    values, *norms = ops.conv_kept(*arguments, backend="triton")
    size = float(exact.abs().max())
    assert float((values - exact).abs().max()) <= 1e-6 * size * max(1, exact.shape[1:].numel() ** 0.25)
    assert_bounded((norms[0], norms[1]), squares(values), squares(values))


def cancelling(t: int, d: int, p: int, size: float) -> tuple[Tensor, Tensor]:
    """Activations with a mean and backprops that add up to zero, as before a normalisation."""
    a, b = pair(t, d, p, records=4)
    return (a + size), b - b.mean(1, keepdim=True)


@pytest.mark.parametrize("way", ["gram", "direct"])
@pytest.mark.parametrize("size", [1e3, 1e6])
@pytest.mark.parametrize("t", [5, 67])
def test_the_error_covers_sums_that_cancel(t: int, size: float, way: str):
    a, b = cancelling(t, 20, 12, size)
    for scale_a, scale_b in ((1.0, 1.0), (1e12, 1e-10), (1e-12, 1e-20)):
        x, y = a * scale_a, b * scale_b
        gradients = y.double().mT @ x.double()
        norm_sq, error = linear_calls(x, y)[way]()
        assert bool(((norm_sq.double() - squares(gradients)).abs() <= error.double()).all())
        factors = ops.clip_factors(norm_sq[None], error[None], 1e-9, backend="triton")
        realised = (y.double() * factors.double().reshape(-1, 1, 1)).mT @ x.double()
        assert bool((squares(realised).sqrt() <= 1e-9).all())


def test_a_norm_without_its_error_would_not_do():
    a, b = cancelling(67, 20, 12, 1e6)
    norm_sq, _ = ops.linear_norm_sq(a, b, backend="triton")
    assert bool((norm_sq.double() < 0.9 * squares(b.double().mT @ a.double())).any())


@pytest.mark.parametrize("t", [1, 4])
def test_squares_below_the_normal_range_are_counted(t: int):
    a, b = torch.full((2, t, 40), 1.5e17, device=DEVICE), torch.full((2, t, 90), 2.6e-23, device=DEVICE)
    for call in linear_calls(a, b).values():
        norm_sq, error = call()
        assert bool((squares(b.double().mT @ a.double()) <= (norm_sq + error).double()).all())


@pytest.mark.parametrize("shape", [(3, 1), (3, 7, 5), (2, 50, 400), (1, 17000), (2, 3, 4, 5), (0, 4), (4, 0), (3,)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_formed_gradients(shape: tuple[int, ...], dtype: torch.dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(DEVICE)
    turned = x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() > 2 else x
    gaps = torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
    for memory in (x, turned, gaps):
        exact = squares(x.reshape(shape[0], -1)) if x.numel() else torch.zeros(shape[0], device=DEVICE).double()
        assert_bounded(ops.grad_sample_norm_sq(memory, backend="triton"), exact, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("indices", [torch.int64, torch.int32])
@pytest.mark.parametrize("t, d", [(1, 3), (9, 3), (70, 20)])
def test_embeddings(t: int, d: int, indices: torch.dtype, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(4, (3, t), generator=generator).to(indices).to(DEVICE)
    b = torch.randn(3, t, d, generator=generator).to(dtype).to(DEVICE)
    for padding_idx in (-1, 2):
        dense = torch.zeros(3, 4, d, dtype=torch.float64, device=DEVICE)
        kept = b.double().masked_fill((rows == padding_idx).unsqueeze(2), 0)
        dense.scatter_add_(1, rows.long().unsqueeze(2).expand_as(kept), kept)
        lengths = torch.zeros(3, 4, dtype=torch.float64, device=DEVICE).scatter_add_(1, rows.long(), kept.norm(dim=2))
        norms = ops.embedding_norm_sq(rows, b, padding_idx, backend="triton")
        assert_bounded(norms, squares(dense), lengths.square().sum(1))


@triton.jit
def tile_pair_kernel(ks, pairs, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i, j = _common.tile_pair(tl.load(ks + at, mask=at < n, other=0))
    tl.store(pairs + 2 * at, i, mask=at < n)
    tl.store(pairs + 2 * at + 1, j, mask=at < n)


def test_every_tile_on_and_above_the_diagonal_is_made_once():
    small = [(i, j) for j in range(200) for i in range(j + 1)]
    large = [(i, j) for j in (4095, 23_170, 46_339) for i in (0, 1, j - 1, j)]
    ks = torch.tensor([j * (j + 1) // 2 + i for i, j in small + large], dtype=torch.int32, device=DEVICE)
    assert ks[: len(small)].tolist() == list(range(len(small)))
    pairs = torch.empty(len(ks), 2, dtype=torch.int32, device=DEVICE)
    _common.launch(tile_pair_kernel, math.ceil(len(ks) / 1024), ks, ks, pairs, len(ks), BLOCK=1024)
    assert pairs.tolist() == [list(pair) for pair in small + large]


def test_empty_batches_and_no_positions():
    for a, b in (pair(3, 4, 5, records=0), pair(0, 4, 5), pair(1, 4, 5, records=0)):
        norm_sq, error = ops.linear_norm_sq(a, b, backend="triton")
        assert norm_sq.shape == error.shape == a.shape[:1] and not norm_sq.any() and not error.any()
    product = conv_product(SHAPES[6])
    for call in conv_calls(ConvProduct(product.activations[:0], product.backprops[:0], product.geometry)).values():
        assert call()[0].shape == (0,)


def check_a_records_norm_is_its_own(a: Tensor, b: Tensor, make: Callable[..., dict], bad: float) -> None:
    """Bit for bit the same alone, among others and beside a record that is not finite, which has no finite norm."""
    others = torch.tensor([0, 1, 3, 4], device=DEVICE)
    broken = a.clone()
    broken[2, -1] = bad
    for way, call in make(a, b).items():
        before, again, after, alone = call(), call(), make(broken, b)[way](), make(a[3:4], b[3:4])[way]()
        for one, same, beside, single in zip(before, again, after, alone, strict=True):
            assert torch.equal(one, same)
            assert torch.equal(one[others], beside[others])
            assert torch.equal(one[3:4], single)
        assert not bool(after[0][2].isfinite())
        factors = ops.clip_factors(after[0][None], after[1][None], BOUND, backend="triton")
        assert factors[2] == 0 and bool((factors[others] > 0).all())


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("t", [1, 19])
def test_a_linear_layers_norm_is_its_records_own(t: int, bad: float):
    check_a_records_norm_is_its_own(*pair(t, 19, 5, records=5), linear_calls, bad)


def test_a_convolutions_norm_is_its_records_own():
    product = conv_product(SHAPES[-1])
    make = lambda a, b: conv_calls(ConvProduct(a, b, product.geometry))  # noqa: E731
    check_a_records_norm_is_its_own(product.activations, product.backprops, make, float("nan"))


# --- what tensor cores do, which the interpreter does not -------------------------------------------------------------


def block_products(x: Tensor, y: Tensor, group: int) -> Tensor:
    """``sum_k x[., k] y[., k]`` as tensor cores add: `group` exact products and the accumulator are aligned to the
    largest, cut to 24 bits, added, and cut again. Float64 in which every step is exact."""

    def cut(value: Tensor, like: Tensor) -> Tensor:
        spacing = torch.exp2(like.abs().clamp(min=1e-300).log2().floor() - 23)
        return (value / spacing).trunc() * spacing

    total = x.new_zeros(x.shape[0], dtype=torch.float64)
    for few in (x.double() * y.double()).split(group, dim=1):
        terms = torch.cat((few, total[:, None]), 1)
        total = cut(terms, terms.abs().amax(1, keepdim=True)).sum(1)
        total = cut(total, total)
    return total


@pytest.mark.parametrize("group", [4, 8, 16])
@pytest.mark.parametrize("length", [16, 333, 2048])
def test_three_roundings_a_term_cover_tensor_cores(group: int, length: int):
    generator = torch.Generator().manual_seed(length)
    x, y = (torch.rand(50, length, generator=generator).bfloat16() for _ in range(2))  # all cut the same way
    signs = torch.randint(2, (50, length), generator=generator) * 2 - 1
    dot = _common.Dot(torch.empty(1, dtype=torch.float16))
    assert dot.mma
    for one in (x, x * signs):
        terms = one.double() * y.double()
        error = (block_products(one, y, group) - terms.sum(1)).abs()
        assert bool((error <= dot.depth(length) * 2.0**-24 * terms.abs().sum(1)).all())


def test_tf32_operands_are_counted(monkeypatch):
    """The interpreter ignores TF32: the operands are cut here, as the hardware does, and the exact norm is theirs."""
    monkeypatch.setattr(_common, "tf32_allowed", lambda *_: True)

    def cut(x: Tensor) -> Tensor:
        return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)

    a, b = (x.abs().add(1).mul(1 + 2.0**-10 - 2.0**-22) for x in pair(40, 20, 12))
    assert not torch.equal(cut(a), a)
    exact = squares(b.double().mT @ a.double())
    for way, call in linear_calls(cut(a), cut(b)).items():
        norm_sq, error = call()
        assert bool((exact <= (norm_sq + error).double()).all()), way
        assert bool((exact > norm_sq.double() * (1 + 1e-4)).all()), way
