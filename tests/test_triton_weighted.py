"""Triton sums over records: against float64 within the roundings that norms count, and record by record."""

from __future__ import annotations

import pytest
import torch
from test_attack import adversarial, hostile_sum, tf32
from test_products import SHAPES, Shape, conv_product
from test_triton import DEVICE
from test_triton_norm import DTYPES, convolution_cases, pair
from torch import Tensor

from dp2vae_fast import ops
from dp2vae_fast.engine import clipping
from dp2vae_fast.engine.clipping import FlatClipping
from dp2vae_fast.engine.gradients.gradient import Kept
from dp2vae_fast.engine.gradients.products import ConvGeometry, ConvProduct, LinearProduct
from dp2vae_fast.engine.precision import RECORDS_PER_PART, sum_rounding
from dp2vae_fast.ops import norm as norm_ops

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from dp2vae_fast.kernels import _common, weighted  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
Gradient = LinearProduct | ConvProduct | Kept


def added(gradient: Gradient, factors: Tensor) -> Tensor:
    with ops.backend("triton"):
        return gradient.weighted_sum(factors.to(gradient.device))


def op_of(product: LinearProduct, factors: Tensor) -> Tensor:
    """The op itself, which the engine does not ask where there is one position."""
    return ops.linear_weighted_sum(product.activations, product.backprops, factors.to(DEVICE), backend="triton")


def some_factors(records: int) -> Tensor:
    factors = torch.rand(records, generator=torch.Generator().manual_seed(records)) + 0.1
    factors[1::3] = 0.0
    return factors


def exact_sum(gradient: Gradient, factors: Tensor) -> Tensor:
    values = gradient.in_float64(torch.arange(gradient.records, device=DEVICE)).grad_sample()
    return torch.tensordot(factors.double().to(DEVICE), values, 1)


def magnitudes(gradient: Gradient) -> Gradient:
    return type(gradient)(
        **{k: v.abs() if isinstance(v, Tensor) else v for k, v in vars(gradient).items() if k not in ("norms", "cost")}
    )


def assert_near(found: Tensor, gradient: Gradient, factors: Tensor) -> None:
    """Each term passes through the roundings of its product, the one with its factor, and those of the sum: of each
    number the part that norms and ``sum_rounding`` count."""
    exact, lengths = exact_sum(gradient, factors), exact_sum(magnitudes(gradient), factors.abs())
    depth = 0 if isinstance(gradient, Kept) else norm_ops.product_depth(gradient.cost.positions, found.device)
    assert found.dtype == torch.float32 and found.shape == exact.shape
    assert bool(
        ((found.double() - exact).abs() <= 1.01 * (depth + 1 + RECORDS_PER_PART + 4) * 2.0**-24 * lengths).all()
    )


@pytest.fixture(params=[1, 1000])
def processors(request, monkeypatch):
    """Too few to take more parts than there must be, and any number."""
    monkeypatch.setattr(weighted, "_PROGRAMS", request.param)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t, d, p", [(1, 7, 5), (16, 33, 17), (65, 100, 3), (200, 9, 66), (48, 1, 1)])
def test_linear_layers(t: int, d: int, p: int, dtype: torch.dtype):
    product, factors = LinearProduct(*pair(t, d, p, dtype, records=10)), some_factors(10)
    assert_near(op_of(product, factors), product, factors)


@pytest.mark.parametrize("records", [0, 1, 3, 130, 300])
def test_any_number_of_records(records: int, processors):
    product, factors = LinearProduct(*pair(2, 5, 4, records=records)), some_factors(records)
    assert_near(op_of(product, factors), product, factors)
    values = torch.randn(records, 259, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    assert_near(added(Kept(values), factors), Kept(values), factors)


def test_operands_of_two_dtypes_and_any_strides():
    a, b = pair(37, 19, 21)
    factors = some_factors(3)
    for strided in (lambda x: x.mT.contiguous().mT, lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)):
        product = LinearProduct(strided(a), strided(b))
        assert torch.equal(op_of(product, factors), op_of(LinearProduct(a, b), factors))
    for product in (LinearProduct(a.half(), b), LinearProduct(a, b.bfloat16())):
        assert_near(op_of(product, factors), product, factors)
    for values in (a[:, 0], a[:, :, 0], a[:1, 0].expand(3, -1)):
        found = ops.kept_weighted_sum(values, factors.to(DEVICE), backend="triton")
        assert torch.equal(found, ops.kept_weighted_sum(values.contiguous(), factors.to(DEVICE), backend="triton"))
    spread = torch.stack([factors, torch.full_like(factors, torch.nan)], 1)[:, 0]
    assert torch.equal(op_of(LinearProduct(a, b), spread), op_of(LinearProduct(a, b), factors))


FEW = ["1-d", "1-d long", "one position", "1x1 strided", "1x1 padded", "dilated", "wide stride", "grouped", "lopsided"]
FEW += ["3x3 many positions", "depthwise", "decoder", "transposed, all at once", "3-d", "3-d transposed"]


@pytest.mark.parametrize("shape, memory, dtype", convolution_cases(FEW), ids=lambda x: getattr(x, "name", str(x)))
def test_convolutions(shape: Shape, memory: str, dtype: torch.dtype):
    product = on_device(conv_product(shape, dtype, memory))
    factors = some_factors(product.records)
    assert_near(added(product, factors), product, factors)


def on_device(product: ConvProduct) -> ConvProduct:
    return ConvProduct(product.activations.to(DEVICE), product.backprops.to(DEVICE), product.geometry)


def rows_of(gradient: Gradient, rows: Tensor) -> Gradient:
    """Some of the records, in that order."""
    return type(gradient)(
        **{
            k: v[rows.to(DEVICE)] if isinstance(v, Tensor) else v
            for k, v in vars(gradient).items()
            if k not in ("norms", "cost")
        }
    )


def gradients() -> list[Gradient]:
    shape = next(s for s in SHAPES if s.name == "transposed, all at once")
    values = torch.randn(5, 300, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return [LinearProduct(*pair(70, 20, 12, records=5)), on_device(conv_product(shape)), Kept(values)]


@pytest.mark.parametrize("gradient", gradients(), ids=lambda g: type(g).__name__)
def test_a_records_part_is_its_own(gradient: Gradient, processors):
    """Bit for bit the same alone, among others and wherever it stands; a bad record without weight is not there."""
    alone = added(rows_of(gradient, torch.tensor([3])), torch.ones(1))
    records = 141 if isinstance(gradient, Kept) else 12  # interpreted products take their time
    for place in (0, 7, records - 1):
        rows = torch.arange(records) % 5
        rows[place] = 3
        among = torch.zeros(records)
        among[place] = 1.0
        assert torch.equal(added(rows_of(gradient, rows), among), alone)
    factors = torch.tensor([0.5, 1.0, 0.0, 2.0, 0.25])
    others = torch.tensor([0, 1, 3, 4])
    for bad in (float("inf"), float("nan")):
        broken = rows_of(gradient, torch.arange(5))
        for operand in vars(broken).values():
            if isinstance(operand, Tensor):
                operand[2] = bad
        before = added(gradient, factors)
        assert torch.equal(added(broken, factors), before)
        assert torch.equal(added(broken, torch.where(factors == 0, -0.0, factors)), before)
        assert torch.equal(added(rows_of(gradient, others), factors[others]), before)
        factors[2] = 1.0
        assert not bool(added(broken, factors).isfinite().all())
        factors[2] = 0.0


@pytest.mark.parametrize("records", [3, RECORDS_PER_PART + 1, 1000])
def test_the_rounding_of_a_sum_is_within_what_is_stated(records: int, processors):
    values = hostile_sum(records, torch.Generator().manual_seed(0)).to(DEVICE)
    a, b = torch.full((records, 2, 1), 0.5, device=DEVICE), values.unsqueeze(1).expand(-1, 2, -1)
    for gradient in (Kept(values), LinearProduct(a, b))[: 1 if records == 1000 else 2]:
        off = float((added(gradient, torch.ones(records)).double() - exact_sum(gradient, torch.ones(records))).norm())
        assert off <= 0.5 * sum_rounding(records)  # each of the two neighbours' sums may be off by half


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["gram", "direct"])
def test_no_adversarial_record_adds_more_than_the_bound(way: str, dtype: torch.dtype):
    """Norms, factors and what is really added, by some records in a sum of their own each."""
    generator = torch.Generator().manual_seed(0)

    def operands(positions: int, features: int) -> list[Tensor]:
        return [x[:15].to(dtype).to(DEVICE) for x in adversarial(generator, positions, features, 4.0)]

    maps = [x.mT.unflatten(2, (4, 4)) for x in operands(16, 3)]
    products = [
        LinearProduct(*operands(70, 3)),
        ConvProduct(*maps, ConvGeometry((3, 3, 3, 3), (1, 1), (1, 1), (1, 1), 1, False)),
    ]
    taken = [p.directly() for p in products] if way == "direct" else products
    bound = 0.7
    with ops.backend("triton,reference"):
        factors = FlatClipping().factors(dict(enumerate(taken)), bound)[0]
        squares = torch.zeros(len(factors), dtype=torch.float64, device=DEVICE)
        for n in range(len(factors)):
            for product in taken:
                one = rows_of(product, torch.tensor([n]))
                squares[n] += one.weighted_sum(factors[n : n + 1]).double().square().sum()
    assert bool((squares.sqrt() <= bound).all())
    assert int((factors > 0).sum()) > 7 and float(squares.max().sqrt()) > 0.5 * bound


@triton.jit
def rounding_kernel(x, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x + at, weighted.rounded_to_tf32(tl.load(x + at, mask=at < n)), mask=at < n)


def test_operands_are_rounded_to_tf32():
    x = torch.randn(500, generator=torch.Generator().manual_seed(1)) * 1e3
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-42, 1 + 2.0**-11, -1 - 2.0**-11, 3.4e38])
    x = torch.cat((x, special))
    rounded, nan = x.to(DEVICE, copy=True), torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    bad = nan.to(DEVICE)
    for values in (rounded, bad):
        _common.launch(rounding_kernel, 1, values, values, len(values), BLOCK=512)
    assert torch.equal(rounded.cpu(), tf32(x)) and bool(bad.isnan().all())
    normal = x.abs().gt(_common.TINY) & rounded.cpu().isfinite()
    assert bool(((rounded.cpu() - x).abs() <= 2.0**-11 * x.abs())[normal].all())


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU's own setting is left alone")
@pytest.mark.parametrize("positions", [12, 80])
def test_under_tf32_a_norm_that_is_taken_again_counts_what_products_round(positions: int, monkeypatch):
    """As on a GPU where the user allows it: three quarters of the terms are rounded up, twice, and the others, of the
    other sign, down. The exact gradient is far enough below their lengths for its norm to be taken in float64."""
    monkeypatch.setattr(_common, "tf32_allowed", lambda *_: True)
    monkeypatch.setattr(norm_ops, "operand_roundoff", lambda like: 2.0**-11 * (like.dtype != torch.float64))
    up, down = 1 + 0.51 * 2.0**-10, 1 + 0.49 * 2.0**-10
    a = torch.tensor([up, up, up, down] * (positions // 4)).reshape(1, -1, 1)
    product = LinearProduct(a, a * torch.tensor([1.0, 1.0, 1.0, -1.0] * (positions // 4)).reshape(1, -1, 1))
    with ops.backend("triton,reference"):
        uncounted = FlatClipping().factors({0: product}, 0.7)[0]
        as_on_a_gpu = lambda t, like: norm_ops.product_error(t, like.to("meta"))  # noqa: E731
        monkeypatch.setattr(clipping, "product_error", as_on_a_gpu)
        counted = FlatClipping().factors({0: product}, 0.7)[0]
        assert float(product.weighted_sum(uncounted).norm()) > 0.7 * (1 + 2.0**-10)
        assert 0.69 < float(product.weighted_sum(counted).norm()) <= 0.7


def test_on_a_gpu_a_product_counts_the_roundings_of_tensor_cores():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for positions, depth in {1: 1, 64: 64, 65: 66, 200: 68}.items():
        assert norm_ops.product_depth(positions, cpu) == depth
        assert norm_ops.product_depth(positions, gpu) == norm_ops.MMA_ROUNDINGS * depth
