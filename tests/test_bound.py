"""No record contributes more than the bound in the arithmetic really done: the float32 operands as they are multiplied,
their product in float64."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import LAYER_CASES, LayerCase, record_loss
from torch import Tensor, nn

from dp2vae_fast import PrivacyEngine, ops
from dp2vae_fast.engine.capture.capture import Capture
from dp2vae_fast.engine.clipping import FlatClipping
from dp2vae_fast.engine.gradients.gradient import Gradient
from dp2vae_fast.engine.gradients.plan import Plan
from dp2vae_fast.engine.gradients.products import ConvGeometry, ConvProduct, LinearProduct, Product
from dp2vae_fast.engine.precision import BATCHES_IN_FLOAT32

BOUND = 0.7
RECORDS = 6
OPERANDS = ("activations", "backprops", "values")


def flat_factors(gradients: list[Gradient], bound: float, scale: float = 1.0) -> Tensor:
    return FlatClipping().factors(dict(enumerate(gradients)), bound, scale)[0]


def privatized(model: nn.Module, expected_batch_size: int) -> tuple[nn.Module, Any]:
    """The model and its optimizer, private without noise."""
    return PrivacyEngine().privatize(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=BOUND,
        sample_rate=0.1,
        expected_batch_size=expected_batch_size,
        loss_reduction="sum",
    )


def realised(gradients: list[Gradient], factors: Tensor) -> Tensor:
    """``|c_n g_n|`` of every record, [N]: the factor goes into the backprops (or the kept gradient) in float32, what
    follows is exact to float64."""
    total = torch.zeros(RECORDS, dtype=torch.float64)
    for gradient in gradients:
        operands = {key: ops.widen(x) for key, x in vars(gradient).items() if key in OPERANDS}
        for key, x in operands.items():
            scaled = x * factors.reshape(-1, *[1] * (x.dim() - 1)) if key != "activations" else x
            operands[key] = scaled.double()
        total += replace(gradient, **operands).grad_sample().flatten(1).square().sum(1)
    return total.sqrt()


def captured(model: nn.Module, inputs: Tensor, weigh, method) -> list[Gradient]:
    params = dict(model.named_parameters())
    capture = Capture(model, plan=Plan(forced=dict.fromkeys(params, method)), verify=False)  # sizes beyond rounding
    weigh(model(inputs)).backward()
    gradients = capture.take(list(params.values()))
    capture.remove()
    return [g for g in gradients if g is not None]


def zero_sum(output: Tensor) -> Tensor:
    """A loss whose backprops add up to zero over the positions, as before a normalisation: the Gram sum cancels."""
    weights = torch.randn(output.shape[1:], generator=torch.Generator().manual_seed(2)).expand(output.shape)
    if output.dim() > 2:
        axis = tuple(range(2, output.dim())) if output.dim() > 3 else (1,)
        weights = weights - weights.mean(axis, keepdim=True)
    return (weights * output).sum()


@pytest.mark.parametrize("method", ["gram", "kept"])
@pytest.mark.parametrize("case", LAYER_CASES, ids=lambda c: c.name)
def test_each_layer_under_cancellation_and_extreme_sizes(case: LayerCase, method: str):
    torch.manual_seed(1)
    model = case.make()
    plain = case.inputs(RECORDS, torch.float32)
    variants = [plain] if case.entries else [plain, plain + 1e3, plain + 1e6, plain * 1e-12, plain * 1e12]
    for inputs in variants:
        for size in (1.0, 1e8, 1e-25):
            gradients = captured(model, inputs, lambda out, s=size: s * zero_sum(out), method)
            for bound in (BOUND, 1e-6):
                for scale in (1, 1000):
                    factors = flat_factors(gradients, bound, scale)
                    assert bool((realised(gradients, factors) <= bound).all())


@pytest.mark.parametrize("case", LAYER_CASES, ids=lambda c: c.name)
def test_what_is_formed_and_forgotten_stays_within_the_bound(case: LayerCase):
    """By the direct way the product as it is formed again counts, with its rounding: here each record by itself."""
    torch.manual_seed(1)
    model = case.make()
    plain = case.inputs(RECORDS, torch.float32)
    for inputs in [plain] if case.entries else [plain, plain + 1e3, plain + 1e6, plain * 1e-12]:
        gradients = captured(model, inputs, zero_sum, "gram")
        if not any(isinstance(g, Product) and "direct" in g.ways() for g in gradients):
            pytest.skip("it has no such way")
        gradients = [g.directly() if isinstance(g, Product) and "direct" in g.ways() else g for g in gradients]
        for bound in (BOUND, 1e-6):
            factors = flat_factors(gradients, bound)
            assert bool((factors > 0).any())
            for n in range(RECORDS):
                alone = torch.where(torch.arange(RECORDS) == n, factors, 0.0)
                sums = [g.weighted_sum(alone).double().norm() for g in gradients]
                assert float(torch.stack(sums).norm()) <= bound


@pytest.mark.parametrize("positions", [1, 4])
def test_squares_below_the_normal_range_are_counted(positions: int):
    """Huge activations and vanishing backprops: the norm is not zero though a squared backprop is."""
    activations = torch.full((RECORDS, positions, 400), 1.5e17)
    for size in (1e-24, 2.6e-23, 1e-21, 1e-20):
        backprops = torch.full((RECORDS, positions, 900), size)
        layers = {
            "linear": (nn.Linear(400, 900), activations, backprops),
            "conv": (nn.Conv1d(400, 900, 1), activations.transpose(1, 2), backprops.transpose(1, 2)),
        }
        for layer, inputs, weights in layers.values():
            gradients = captured(layer, inputs, lambda out, w=weights: (out * w).sum(), "gram")
            assert bool((realised(gradients, flat_factors(gradients, 1e-3)) <= 1e-3).all())


@pytest.mark.parametrize("inside", ["backward", "step", "both"])
def test_autocast_around_backward_and_step_changes_no_norm(inside: str):
    torch.manual_seed(3)
    for seed in range(8):
        private, optimizer = privatized(nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 16)), 1)
        inputs = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(seed))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = 100 * record_loss(private(inputs).float()).sum()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside != "step"):
            loss.backward()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside != "backward"):
            optimizer.clip_and_accumulate()
        sums = optimizer._pending_sums()
        assert all(s.dtype == torch.float32 for s in sums)
        assert float(torch.stack([s.double().norm() for s in sums]).norm()) <= BOUND


@pytest.mark.parametrize("case", LAYER_CASES, ids=lambda c: c.name)
def test_a_record_more_changes_no_other_records_factor(case: LayerCase):
    """A choice of algorithm by the size of the draw would: its error bounds differ."""
    torch.manual_seed(1)
    model, plan = case.make(), Plan()
    inputs = case.inputs(40, torch.float32)
    inputs = inputs if case.entries else inputs + 1e3
    factors = []
    for batch in (inputs[:1], inputs[:7], inputs):
        params = dict(model.named_parameters())
        capture = Capture(model, plan=plan, verify=False)
        zero_sum(model(batch)).backward()
        gradients = [g for g in capture.take(list(params.values())) if g is not None]
        factors.append(flat_factors(gradients, 1e-3))
        capture.remove()
    for few in factors[:2]:
        torch.testing.assert_close(few, factors[2][: len(few)], rtol=1e-5, atol=0)


def test_one_dominant_layer_leaves_no_room_for_the_others():
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3))
    with torch.no_grad():
        model[0].weight.mul_(1e8)
    gradients = captured(model, torch.randn(RECORDS, 6), zero_sum, "gram")
    assert bool((realised(gradients, flat_factors(gradients, BOUND)) <= BOUND).all())


@pytest.mark.parametrize("setting", ["medium", "high", "matmul", "conv"])
def test_reduced_precision_products_widen_the_error_bound(setting: str):
    operands = torch.randn(2, 1, 8), torch.randn(2, 1, 5)  # with more positions the native kernels multiply in float32
    _, exact = ops.linear_norm_sq(*operands)
    before = torch.get_float32_matmul_precision()
    try:
        if setting in ("matmul", "conv"):
            getattr(torch.backends.mkldnn, setting).fp32_precision = "bf16"
        else:
            torch.set_float32_matmul_precision(setting)
        _, widened = ops.linear_norm_sq(*operands)
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = torch.backends.mkldnn.conv.fp32_precision = "none"
        torch.set_float32_matmul_precision(before)
    assert bool((widened > 100 * exact).all())


@pytest.mark.parametrize("backend", ["reference", "cpp,reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_direct_norm_is_that_of_what_is_added_up(kind: str, dtype: torch.dtype, backend: str):
    """Two large terms that cancel swallow a third one in float32, but not in the sum's float64."""
    large = 2.0**13
    a = torch.tensor([large, 4.0, -large], dtype=dtype).reshape(1, 3, 1)
    b = torch.tensor([large, 1.0, large], dtype=dtype).reshape(1, 3, 1)
    product: Gradient = LinearProduct(a, b)
    if kind == "conv":
        product = ConvProduct(a.mT, b.mT, ConvGeometry((1, 1, 1), (1,), (0,), (1,), 1, False))
    with ops.backend(backend):
        for gradient in (product, product.directly(), product.kept()):
            factors = flat_factors([gradient], BOUND)
            assert float(gradient.weighted_sum(factors).norm()) <= BOUND


def test_layers_of_two_precisions_are_clipped_together():
    """Factors of a wider type than the operands of some gradients."""
    for t in (1, 3):
        narrow, wide = torch.randn(RECORDS, t, 4), torch.randn(RECORDS, t, 5, dtype=torch.float64)
        pair = [LinearProduct(narrow, narrow), LinearProduct(wide, wide)]
        for gradients in (pair, [g.kept() for g in pair]):
            factors = flat_factors(gradients, BOUND)
            alone = torch.eye(RECORDS, dtype=torch.float64) * factors
            for one in alone:
                total = sum(float(g.weighted_sum(one).double().square().sum()) for g in gradients)
                assert total**0.5 <= BOUND * (1 + 2.0**-23)


@pytest.mark.parametrize("batches, wide", [(1, False), (BATCHES_IN_FLOAT32, False), (BATCHES_IN_FLOAT32 + 1, True)])
def test_sums_of_many_physical_batches_are_added_in_float64(monkeypatch, batches: int, wide: bool):
    """As many as the sensitivity counts are added in float32, which holds half as much memory."""
    torch.manual_seed(5)
    private, optimizer = privatized(nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 3)), 40)
    each: list[list[Tensor]] = []  # of the parts as they are added
    add = optimizer._add

    def recorded(sums: Iterable[tuple[Tensor, Tensor]]) -> None:
        found = list(sums)
        each.append([total.double() for _, total in found])
        add(found)

    monkeypatch.setattr(optimizer, "_add", recorded)
    for inputs in torch.randn(40, 20).chunk(batches):
        optimizer.signal_skip_step(True)
        optimizer.zero_grad()
        record_loss(private(inputs)).sum().backward()
        optimizer.step()
    assert len(each) == batches
    additions = min(batches, BATCHES_IN_FLOAT32) - 1
    for found, parts in zip(optimizer._sums.values(), zip(*each, strict=True), strict=True):
        assert found.dtype == (torch.float64 if wide else torch.float32)
        exact, reach = sum(parts), sum(part.abs() for part in parts)
        assert bool(((found.double() - exact).abs() <= additions * 2.0**-24 * reach + 1e-15).all())
