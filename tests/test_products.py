"""The native kernels of products, on every instruction set: against float64, and record by record."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from cases import lying
from torch import Tensor, nn

from dp2vae_fast import ops
from dp2vae_fast.engine.gradients.products import ConvGeometry, ConvProduct, EmbeddingProduct, LinearProduct
from dp2vae_fast.ops import _op
from dp2vae_fast.ops.gradient import PARTS_PER_BLOCK, RECORDS_PER_PART

pytestmark = pytest.mark.skipif(bool(_op._native_gap), reason=_op._native_gap)
N = 5


class Shape(NamedTuple):
    name: str
    layer: nn.Module
    size: tuple[int, ...]  # of a record's input


def shapes() -> list[Shape]:
    conv, transposed = nn.Conv2d, nn.ConvTranspose2d
    return [
        Shape("1-d", nn.Conv1d(3, 5, 3, stride=2, padding=1), (3, 17)),
        Shape("1-d long", nn.Conv1d(20, 18, 5, padding=2), (20, 131)),
        Shape("one position", conv(3, 4, 4), (3, 4, 4)),
        Shape("1x1", conv(33, 17, 1), (33, 5, 7)),
        Shape("1x1 strided", conv(17, 31, 1, stride=2), (17, 7, 5)),
        Shape("1x1 padded", conv(5, 6, 1, padding=1), (5, 3, 4)),
        Shape("3x3", conv(16, 29, 3, padding=1), (16, 8, 8)),
        Shape("3x3 many positions", conv(19, 3, 3, padding=1), (19, 15, 13)),
        Shape("valid", conv(32, 15, 3), (32, 6, 9)),
        Shape("dilated", conv(8, 9, 3, dilation=2, padding=3, stride=2), (8, 11, 9)),
        Shape("wide stride", conv(4, 3, 2, stride=3), (4, 9, 8)),
        Shape("grouped", conv(12, 8, 3, groups=4, stride=2, padding=2), (12, 7, 7)),
        Shape("depthwise", conv(9, 18, 3, groups=9, padding=1), (9, 6, 5)),
        Shape("few channels", conv(1, 34, 5, padding=2), (1, 9, 10)),
        Shape("one channel, no whole row of taps", conv(1, 5, (3, 5), padding=(1, 2)), (1, 4, 3)),
        Shape("one channel, far padding", conv(1, 6, 3, stride=2, padding=2, dilation=(2, 1)), (1, 6, 7)),
        Shape("decoder, one channel", transposed(20, 1, 4, stride=2, padding=1), (20, 5, 6)),
        Shape("decoder", transposed(40, 24, 4, stride=2, padding=1), (40, 4, 4)),
        Shape("decoder, one number over", transposed(20, 6, 4, stride=2, padding=1), (20, 7, 7)),
        Shape("four numbers over", conv(5, 4, 3, padding=1), (5, 4, 13)),
        Shape("decoder, last", transposed(31, 3, 4, stride=2, padding=1), (31, 8, 9)),
        Shape("transposed, all at once", transposed(12, 8, 3, 3, 2, 1, groups=4, dilation=2), (12, 5, 4)),
        Shape("lopsided", conv(6, 7, (1, 4), stride=(2, 1), padding=(0, 3)), (6, 5, 8)),
        Shape("3-d", nn.Conv3d(5, 6, 3, padding=1, stride=(1, 2, 1)), (5, 4, 5, 6)),
        Shape("3-d transposed", nn.ConvTranspose3d(3, 4, 2, stride=2), (3, 3, 2, 4)),
        Shape("padding only in part", conv(2, 3, 1, stride=2, padding=1), (2, 2, 2)),
    ]


SHAPES = shapes()


def conv_product(shape: Shape, dtype: torch.dtype = torch.float32, memory: str = "contiguous") -> ConvProduct:
    layer, generator = shape.layer, torch.Generator().manual_seed(1)
    x = torch.randn(N, *shape.size, generator=generator)
    y = layer(x).detach()
    b = torch.randn(y.shape, generator=generator)
    dims = layer.weight.dim() - 2
    lists = [tuple(ops.per_dim(getattr(layer, key), dims, key)) for key in ("stride", "padding", "dilation")]
    geometry = ConvGeometry(tuple(layer.weight.shape), *lists, layer.groups, layer.transposed)
    x, b = (lying(t.to(dtype), memory) for t in (x, b))
    return ConvProduct(x, b, geometry)


def linear_product(t: int, d: int, p: int, dtype: torch.dtype = torch.float32) -> LinearProduct:
    generator = torch.Generator().manual_seed(2)
    return LinearProduct(
        torch.randn(N, t, d, generator=generator).to(dtype), torch.randn(N, t, p, generator=generator).to(dtype)
    )


@pytest.fixture(params=["avx512", "avx2", "portable"])
def isa(request):
    from dp2vae_fast import _C

    best = _C.build_info()["isa"]
    if not _C.select_isa(request.param):
        pytest.skip(f"this machine has no {request.param}")
    yield
    _C.select_isa(best)


def check(product: ConvProduct | LinearProduct) -> None:
    """Every op of the product against float64, with the error bounds that it states."""
    exact = product.in_float64(torch.arange(N))
    values = exact.grad_sample()
    squares = values.flatten(1).square().sum(1)
    size = float(values.abs().max()) + 1e-30
    kept = product.kept()
    assert float((kept.values - values).abs().max()) <= 1e-6 * size * max(1, values.shape[1:].numel() ** 0.25)
    for norm_sq, error in (
        product.norm_sq(),
        kept.norm_sq(),
        type(product)(**{**vars(product), "direct": True}).norm_sq(),
    ):
        torch.testing.assert_close(norm_sq.double(), squares, rtol=1e-5, atol=0)
        assert bool((squares <= (norm_sq + error).double()).all())
        assert bool((norm_sq.double() - squares <= error).all())
    check_sums(product, torch.tensor([0.5, 1.0, 0.0, 2.0, 0.25]))


def check_sums(product: ConvProduct | LinearProduct, factors: Tensor) -> None:
    """To 50 units of 2^-24: rounding errors of n terms, of either sign, come to about sqrt(n / 6), and n < 15,000."""
    values = product.in_float64(torch.arange(len(factors))).grad_sample()
    total = torch.einsum("n,n...->...", factors.double(), values)
    size = float(values.abs().max()) if len(factors) else 0.0
    for found in (product.weighted_sum(factors), product.kept().weighted_sum(factors)):
        assert found.shape == total.shape
        torch.testing.assert_close(found.double(), total, rtol=1e-5, atol=3e-6 * size)


@pytest.mark.parametrize("memory", ["contiguous", "channels last", "strided"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def test_convolutions(isa, shape: Shape, memory: str):
    check(conv_product(shape, memory=memory))


@pytest.mark.parametrize("memory", ["contiguous", "channels last"])
@pytest.mark.parametrize("shape", SHAPES[::2], ids=lambda s: s.name)
def test_bfloat16_operands_are_multiplied_as_they_are(isa, shape: Shape, memory: str):
    check(conv_product(shape, torch.bfloat16, memory))


@pytest.mark.parametrize(
    "t, d, p",
    [
        (1, 1, 1),
        (1, 33, 5),
        (1, 300, 1100),
        (2, 1, 1),
        (7, 33, 5),
        (16, 16, 16),
        (50, 8, 8),
        (64, 3, 70),
        (65, 17, 14),
        (200, 9, 31),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_layers(isa, t: int, d: int, p: int, dtype: torch.dtype):
    check(linear_product(t, d, p, dtype))


PRODUCTS = [conv_product(s) for s in SHAPES] + [linear_product(7, 33, 5), linear_product(200, 9, 31)]


@pytest.mark.parametrize("product", PRODUCTS, ids=lambda p: type(p).__name__)
def test_a_records_part_is_its_own(product):
    """Bit for bit the same, alone and among others, kept and added up; a bad record stays with itself."""
    rows = {f: getattr(product, f) for f in ("activations", "backprops")}
    alone = type(product)(**{**vars(product), **{f: x[3:4] for f, x in rows.items()}})
    kept = product.kept().values
    assert torch.equal(kept[3:4], alone.kept().values)
    assert torch.equal(product.norm_sq()[0][3:4], alone.norm_sq()[0])
    assert torch.equal(product.norm_sq()[1][3:4], alone.norm_sq()[1])
    one_hot = torch.eye(N)[3]
    assert torch.equal(product.weighted_sum(one_hot), kept[3])
    for bad in (float("inf"), float("nan")):
        broken = type(product)(**{**vars(product), **{f: x.clone() for f, x in rows.items()}})
        broken.activations[2], broken.backprops[2] = bad, bad
        others = torch.tensor([0, 1, 3, 4])
        for taken in (broken.norm_sq(), broken.kept().norm_sq()):
            assert not bool(taken[0][2].isfinite())
        for after, before in zip(broken.norm_sq(), product.norm_sq(), strict=True):
            assert torch.equal(after[others], before[others])
        factors = torch.tensor([0.5, 1.0, 0.0, 2.0, 0.25])
        assert torch.equal(broken.weighted_sum(factors), product.weighted_sum(factors))
        assert torch.equal(broken.kept().weighted_sum(factors), product.kept().weighted_sum(factors))


def test_norms_of_one_position(isa):
    """Each record's is its own, whatever the others are; and bounded where squares are out of range."""
    product = linear_product(1, 300, 70)
    a, b = product.activations, product.backprops
    whole = ops.linear_norm_sq(a, b, backend="cpp")
    a[2], b[2] = float("nan"), 1e30
    a[3, 0, :2], b[3] = 1e18, 1e-25  # the squares of these are below float32's range, and their product is not
    norm_sq, error = ops.linear_norm_sq(a, b, backend="cpp")
    others = torch.tensor([0, 1, 4])
    assert torch.equal(norm_sq[others], whole[0][others]) and torch.equal(error[others], whole[1][others])
    assert not bool(norm_sq[2].isfinite())
    exact = float(a[3].double().square().sum() * b[3].double().square().sum())
    assert 0 < exact <= float(norm_sq[3] + error[3])


# Records, D, P: parts, blocks and panels of the kernel, whole and not.
OUTER = [(1, 3, 1), (3, 17, 5), (128, 64, 33), (129, 1, 9), (512, 16, 300), (513, 50, 257), (200, 1600, 20)]
OUTER += [(2048, 7, 12), (2049, 31, 13), (4100, 5, 3)]


def outer_operands(records: int, d: int, p: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(records)
    a, b = (torch.randn(records, 1, n, generator=generator) for n in (d, p))
    factors = torch.rand(records, generator=generator)
    factors[1::3] = 0
    return a, b, factors


@pytest.mark.parametrize("how", ["reference", "cpp", "engine"])
@pytest.mark.parametrize("records, d, p", OUTER)
def test_sums_of_outer_products_keep_their_bound(isa, how: str, records: int, d: int, p: int):
    """No term passes through more additions than `sum_rounding` counts, besides its product's two roundings. The engine
    leaves a single part to the vendor library."""
    a, b, factors = outer_operands(records, d, p)
    a[factors == 0], b[factors == 0] = torch.nan, torch.inf
    if how == "engine":
        found = LinearProduct(a, b).weighted_sum(factors)
    else:
        found = ops.outer_weighted_sum(a, b, factors, backend=how)
    left, right = (x[factors != 0, 0].double() for x in (a, b))
    scaled = right * factors[factors != 0].double()[:, None]
    bound = (RECORDS_PER_PART + PARTS_PER_BLOCK + 2) * 2.0**-24 * scaled.abs().T @ left.abs()
    assert found.shape == (p, d) and bool(((found.double() - scaled.T @ left).abs() <= bound).all())


def test_terms_of_an_outer_sum_pass_through_few_additions(isa):
    """One record holds a half, 2,000 others less than half a unit in its last place each: what one accumulator rounds
    away is what its own part adds to that record, not what the other parts hold."""
    records, small = 2001, 2.0**-26
    a = torch.ones(records, 1, 40)
    b = torch.full((records, 1, 21), small)
    b[0] = 0.5
    found = ops.outer_weighted_sum(a, b, torch.ones(records), backend="cpp").double()
    lost = 0.5 + small * (records - 1) - found
    assert bool((lost <= small * RECORDS_PER_PART).all()) and bool((found <= 0.5 + small * records).all())


def test_outer_sums_of_any_operands(isa):
    """bfloat16, features apart, one row for all records: the sum of the same numbers in plain tensors, to the bit."""
    a, b, factors = outer_operands(300, 45, 29)
    rounded = [x.bfloat16() for x in (a, b)]
    expected = ops.outer_weighted_sum(*(x.float() for x in rounded), factors, backend="cpp")
    assert torch.equal(ops.outer_weighted_sum(*rounded, factors, backend="cpp"), expected)
    apart = [torch.stack([x, x], -1)[..., 0] for x in (a, b)]
    expected = ops.outer_weighted_sum(a, b, factors, backend="cpp")
    assert torch.equal(ops.outer_weighted_sum(*apart, factors, backend="cpp"), expected)
    same = ops.outer_weighted_sum(a[:1].repeat(300, 1, 1), b, factors, backend="cpp")
    assert torch.equal(ops.outer_weighted_sum(a[:1].expand(300, 1, 45), b, factors, backend="cpp"), same)


def test_outer_sums_of_no_record():
    a, b, factors = outer_operands(4, 6, 5)
    for how in ("reference", "cpp"):
        assert ops.outer_weighted_sum(a, b, torch.zeros(4), backend=how).count_nonzero() == 0
        assert ops.outer_weighted_sum(a[:0], b[:0], factors[:0], backend=how).shape == (5, 6)


@pytest.mark.parametrize("records, d, p", [(3000, 900, 300), (100, 20, 30)])
def test_threads_do_not_change_a_bit_of_outer_sums(records: int, d: int, p: int):
    operands, before, found = outer_operands(records, d, p), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(ops.outer_weighted_sum(*operands, backend="cpp"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_outer_sums_refuse_several_positions():
    with pytest.raises(RuntimeError, match=r"\[N, 1, D\]"):
        torch.ops.dp2vae_fast.outer_weighted_sum(torch.ones(2, 3, 4), torch.ones(2, 3, 5), torch.ones(2))
    with pytest.raises(RuntimeError, match="2 contiguous float32 numbers"):
        torch.ops.dp2vae_fast.outer_weighted_sum(torch.ones(2, 1, 4), torch.ones(2, 1, 5), torch.ones(3))


def test_one_position_counts_the_vendors_rounding():
    """Kept gradients are the vendor's product: its rounding of operands is in the bound, which kernels do not state."""
    product = linear_product(1, 300, 70)
    tight = product.norm_sq()[1]
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        with pytest.raises(NotImplementedError, match="which products do not round"):
            ops.linear_norm_sq(product.activations, product.backprops, backend="cpp")
        assert bool((product.norm_sq()[1] > 100 * tight).all())
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "none"


def test_threads_do_not_change_a_bit():
    product, factors = conv_product(SHAPES[6]), torch.rand(N)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append([product.weighted_sum(factors), *product.norm_sq(), product.kept().values])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("records", [0, 1, 127, 300])
def test_any_number_of_records(records: int):
    generator = torch.Generator().manual_seed(3)
    product = LinearProduct(
        torch.randn(records, 6, 5, generator=generator), torch.randn(records, 6, 4, generator=generator)
    )
    factors = torch.rand(records, generator=generator)
    check_sums(product, factors)
    assert product.norm_sq()[0].shape == (records,)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not say what is resident")
def test_what_is_kept_is_given_back_with_its_last_use():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    product = LinearProduct(torch.randn(64, 2, 512), torch.randn(64, 2, 512))
    product.kept()
    before, kept = resident(), product.kept()
    held, size = resident(), kept.values.numel() * 4
    del kept
    assert held - before >= 0.9 * size and resident() - before <= 0.1 * size


@pytest.mark.parametrize("channels, size, records", [(80, 32, 7), (24, 40, 9), (20, 30, 77), (36, 28, 131)])
def test_the_last_block_of_records_may_be_smaller(isa, channels: int, size: int, records: int):
    """Blocks and column tiles of several sizes: padding stays zero, and each record's part its own."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(records, channels, size, size, generator=generator)
    b = torch.randn(records, 4, size, size, generator=generator)
    product = ConvProduct(x, b, ConvGeometry((4, channels, 3, 3), (1, 1), (1, 1), (1, 1), 1, False))
    factors = torch.rand(records, generator=generator)
    check_sums(product, factors)
    last = torch.eye(records)[-1]
    assert torch.equal(product.weighted_sum(last), product.kept().values[-1])
    factors[-1] = 0.0
    fewer = ConvProduct(x[:-1], b[:-1], product.geometry).weighted_sum(factors[:-1])
    assert torch.equal(product.weighted_sum(factors), fewer)


def test_arguments_that_do_not_fit_are_refused():
    x, b = torch.randn(2, 4, 5, 5), torch.randn(2, 6, 5, 5)
    how: tuple[Tensor, Tensor, list[int]] = (x, b, [6, 4, 3, 3])
    with pytest.raises(RuntimeError, match="do not fit the channels"):
        torch.ops.dp2vae_fast.conv_norm_sq(x, b, [5, 4, 3, 3], [1, 1], [1, 1], [1, 1], 1, False)
    with pytest.raises(RuntimeError, match="for each"):
        torch.ops.dp2vae_fast.conv_norm_sq(*how, [1], [1, 1], [1, 1], 1, False)
    with pytest.raises(RuntimeError, match="factors"):
        torch.ops.dp2vae_fast.conv_weighted_sum(x, b, torch.ones(3), how[2], [1, 1], [1, 1], [1, 1], 1, False)
    with pytest.raises(RuntimeError, match="are not of one convolution"):
        torch.ops.dp2vae_fast.conv_norm_sq(x, b, [6, 4, 1, 1], [2, 1], [0, 0], [1, 1], 1, False)
    with pytest.raises(RuntimeError, match="are not of one convolution"):
        torch.ops.dp2vae_fast.conv_kept(x, b, [6, 4, 3, 3], [1, 1], [0, 1], [1, 1], 1, False)
    with pytest.raises(RuntimeError, match="are not of one convolution"):
        torch.ops.dp2vae_fast.conv_norm_sq(x, b[..., :4], [6, 4, 3, 3], [1, 1], [1, 1], [1, 1], 1, False)
    with pytest.raises(RuntimeError, match="empty"):
        torch.ops.dp2vae_fast.linear_kept(torch.ones(2, 0, 3), torch.ones(2, 0, 4))


@pytest.mark.parametrize(
    "n, t, d, padding_idx", [(0, 3, 2, -1), (1, 1, 1, -1), (4, 9, 5, 2), (3, 17, 1, 0), (2, 64, 33, -1)]
)
def test_embeddings(n: int, t: int, d: int, padding_idx: int):
    generator = torch.Generator().manual_seed(4)
    indices = torch.randint(5, (n, t), generator=generator)
    wide = torch.randn(n, t, 2 * d, generator=generator)
    for backprops in (wide[:, :, :d], wide[:, :, ::2]):
        gradient = EmbeddingProduct(indices, backprops, 5, padding_idx)
        exact = gradient.in_float64(torch.arange(n)).grad_sample().flatten(1).square().sum(1)
        norm_sq, error = ops.embedding_norm_sq(indices, backprops, padding_idx, backend="cpp")
        _, reference = ops.embedding_norm_sq(indices, backprops, padding_idx, backend="reference")
        torch.testing.assert_close(norm_sq.double(), exact, rtol=1e-6, atol=0)
        torch.testing.assert_close(error, reference, rtol=1e-4, atol=1e-30)
        assert bool((exact <= (norm_sq + error).double()).all())
