"""Every layer under every use that a model makes of it: twice, tied, on two inputs in turn, in low precision."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import LAYER_CASES, LayerCase, grads_one_by_one, record_loss
from torch import Tensor, nn

from dp2vae_fast.engine.capture.capture import Capture
from dp2vae_fast.engine.gradients.layers import find_rule
from dp2vae_fast.engine.gradients.plan import Plan

D = torch.float64
N = 4
every_case = pytest.mark.parametrize("case", LAYER_CASES, ids=lambda c: c.name)


def build(case: LayerCase, dtype: torch.dtype = D) -> nn.Module:
    torch.manual_seed(1)
    return case.make().to(dtype)


def other(inputs: Tensor) -> Tensor:
    """A second input of the same shape, made from the first by record."""
    if inputs.dim() > 1 and inputs.shape[-1] > 1:
        return inputs.flip(-1)
    return inputs * 2 if inputs.is_floating_point() else (inputs - 1).clamp(min=0)


class Twice(nn.Module):
    """Two layers, or one in two roles, on two inputs; the results are joined record by record."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x), self.second(other(x))
        return torch.cat([part.flatten(1) for part in y], 1)


def tied(case: LayerCase) -> Twice:
    first, second = build(case), build(case)
    for name, p in first.named_parameters():
        owner, _, key = name.rpartition(".")
        setattr(second.get_submodule(owner), key, p)
    return Twice(first, second)


@every_case
@pytest.mark.parametrize("method", ["gram", "kept"])
@pytest.mark.parametrize("use", ["one module twice", "two modules with the same parameters"])
def test_gradients_of_all_uses_add_before_they_are_clipped(case: LayerCase, use: str, method: str):
    layer = build(case)
    model = tied(case) if use.startswith("two") else Twice(layer, layer)
    inputs = case.inputs(N, D)
    want = grads_one_by_one(model, inputs)
    capture = Capture(model, plan=Plan(forced=dict.fromkeys(want, method)))
    record_loss(model(inputs)).sum().backward()
    found = capture.take([model.get_parameter(name) for name in want])
    capture.check_first_batch()
    assert capture.first_batch.proved
    for (name, exact), gradient in zip(want.items(), found, strict=True):
        assert gradient is not None, name
        torch.testing.assert_close(gradient.grad_sample(), exact, rtol=1e-9, atol=1e-11)
        norm_sq, error = gradient.norm_sq()
        assert bool((norm_sq + error >= exact.flatten(1).square().sum(1) * (1 - 1e-12)).all())
        weights = torch.tensor([1.0, 0.0, 0.5, -2.0], dtype=D)
        summed = torch.einsum("n,n...->...", weights, exact)
        torch.testing.assert_close(gradient.weighted_sum(weights), summed, rtol=1e-9, atol=1e-11)


@every_case
def test_a_second_batch_leaves_nothing_of_the_first(case: LayerCase):
    """Of another size: no shape, no plan and no buffer is carried over."""
    model = build(case)
    twin = copy.deepcopy(model)
    capture = Capture(model)
    params = dict(model.named_parameters())
    for records, seed in ((5, 0), (3, 1), (5, 2)):
        inputs = case.inputs(records, D, seed)
        record_loss(model(inputs)).sum().backward()
        want = grads_one_by_one(twin, inputs)
        for name, gradient in zip(params, capture.take(list(params.values())), strict=True):
            assert gradient is not None
            torch.testing.assert_close(gradient.grad_sample(), want[name], rtol=1e-9, atol=1e-11)


@every_case
def test_layers_in_bfloat16_are_clipped_in_float32(case: LayerCase):
    """The gradients of the very operands that bfloat16 layers saw: widened, never summed in bfloat16."""
    if find_rule(build(case)) is None:
        pytest.skip("the fallback runs in the layer's own precision")
    model = build(case, torch.bfloat16)
    inputs = case.inputs(N, torch.bfloat16)
    try:
        record_loss(copy.deepcopy(model)(inputs).float()).sum().backward()
    except RuntimeError as error:
        pytest.skip(f"PyTorch: {error}")
    capture = Capture(model)
    record_loss(model(inputs).float()).sum().backward()
    params = dict(model.named_parameters())
    for gradient in capture.take(list(params.values())):
        assert gradient is not None
        norm_sq, error = gradient.norm_sq()
        exact = gradient.in_float64(torch.arange(N)).grad_sample().flatten(1).square().sum(1)
        assert norm_sq.dtype == torch.float32 and gradient.weighted_sum(torch.ones(N)).dtype in (torch.float32, D)
        assert bool(((norm_sq + error).double() >= exact).all())
        torch.testing.assert_close(norm_sq.double(), exact, rtol=1e-5, atol=0)
