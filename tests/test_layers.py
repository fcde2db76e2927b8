"""Every layer rule against two oracles, as norm, as kept gradient and as weighted sum; and what cannot be
supported is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import LAYER_CASES, BareScale, LayerCase, grads_by_vmap, grads_one_by_one, record_loss
from torch import Tensor, nn

from dp2vae_fast.engine.capture.capture import Capture
from dp2vae_fast.engine.gradients.gradient import Gradient
from dp2vae_fast.engine.gradients.layers import find_rule, register_layer_rule
from dp2vae_fast.engine.gradients.plan import Plan

DOUBLE = 1e-10  # relative, float64
FLOAT_FLOOR = 2e-6  # relative, float32: some ten rounded additions deep


def build(case: LayerCase, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(1)
    return case.make().to(dtype)


def captured(model: nn.Module, inputs: Tensor, plan: Plan | None = None, **kwargs) -> dict[str, Gradient | None]:
    """Per-sample gradients as the engine sees them, with no ordinary gradient left on any parameter."""
    capture = Capture(model, plan=plan, **kwargs)
    try:
        record_loss(model(inputs)).sum().backward()
        names, params = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad], strict=True)
        assert all(p.grad is None for p in params)
        return dict(zip(names, capture.take(list(params)), strict=True))
    finally:
        capture.remove()


def relative(got: Tensor, want: Tensor) -> float:
    scale = want.double().norm()
    return float((got.double() - want.double()).norm() / scale) if scale > 0 else float(got.double().norm())


@pytest.mark.parametrize("case", LAYER_CASES, ids=lambda c: c.name)
def test_rule_agrees_with_both_oracles_in_float64(case: LayerCase):
    model, inputs = build(case, torch.float64), case.inputs(5, torch.float64)
    by_loop, by_vmap = grads_one_by_one(model, inputs), grads_by_vmap(model, inputs)
    factors = torch.tensor([0.3, 1.0, 0.0, 2.0, 0.7], dtype=torch.float64)
    for method in ("gram", "kept"):
        plan = Plan(forced=dict.fromkeys(by_loop, method))
        for name, gradient in captured(model, inputs, plan).items():
            assert gradient is not None
            for oracle in (by_loop[name], by_vmap[name]):
                norm_sq, error = gradient.norm_sq()
                exact = oracle.flatten(1).square().sum(1)
                assert relative(norm_sq, exact) < DOUBLE
                assert bool((norm_sq + error >= exact * (1 - 1e-15)).all())
                assert relative(gradient.grad_sample(), oracle) < DOUBLE
                assert relative(gradient.weighted_sum(factors), torch.einsum("n,n...->...", factors, oracle)) < DOUBLE


@pytest.mark.parametrize("case", LAYER_CASES, ids=lambda c: c.name)
def test_rule_loses_no_more_than_the_framework_in_float32(case: LayerCase):
    model, inputs = build(case, torch.float32), case.inputs(6, torch.float32)
    exact_inputs = inputs if case.entries else inputs.double()
    exact = grads_one_by_one(build(case, torch.float64), exact_inputs)
    framework = grads_one_by_one(model, inputs)
    for method in ("gram", "kept"):
        for name, gradient in captured(model, inputs, Plan(forced=dict.fromkeys(exact, method))).items():
            assert gradient is not None
            allowed = 2 * relative(framework[name], exact[name]) + FLOAT_FLOOR
            assert relative(gradient.grad_sample(), exact[name]) < allowed
            assert relative(gradient.norm_sq()[0].sqrt(), exact[name].flatten(1).norm(dim=1)) < allowed
            assert relative(gradient.weighted_sum(torch.ones(6)), exact[name].sum(0)) < allowed


@pytest.mark.parametrize("case", LAYER_CASES, ids=lambda c: c.name)
def test_norm_bound_covers_what_float32_lost(case: LayerCase):
    """norm_sq + error is at least the squared norm of the exact gradient of the very operands, in float64."""
    model, inputs = build(case, torch.float32), case.inputs(6, torch.float32)
    plan = Plan(forced=dict.fromkeys((n for n, _ in model.named_parameters()), "gram"))
    for gradient in captured(model, inputs, plan).values():
        assert gradient is not None
        operands = {
            key: value.double()
            for key, value in vars(gradient).items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }
        exact = replace(gradient, **operands).grad_sample().flatten(1).square().sum(1)
        norm_sq, error = gradient.norm_sq()
        assert bool((norm_sq.double() + error.double() >= exact).all())


@pytest.mark.parametrize("case", LAYER_CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("records", [0, 1])
def test_empty_and_single_record_batches(case: LayerCase, records: int):
    model, inputs = build(case, torch.float64), case.inputs(records, torch.float64)
    if records == 0 and isinstance(
        model, nn.PReLU | nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d | nn.GroupNorm
    ):
        try:
            model(inputs)
        except (RuntimeError, ValueError, IndexError) as error:
            pytest.skip(f"the framework itself refuses an empty batch: {error}")
    for name, gradient in captured(model, inputs).items():
        assert gradient is not None and gradient.records == records
        weighted = gradient.weighted_sum(torch.ones(records, dtype=torch.float64))
        assert weighted.shape == dict(model.named_parameters())[name].shape
        if records == 0:
            assert bool((weighted == 0).all())


@pytest.mark.parametrize("case", LAYER_CASES, ids=lambda c: c.name)
def test_each_parameter_may_be_the_only_one_that_is_trained(case: LayerCase):
    model, inputs = build(case, torch.float64), case.inputs(3, torch.float64)
    want = grads_one_by_one(model, inputs)
    for name, parameter in model.named_parameters():
        model.requires_grad_(False)
        parameter.requires_grad_(True)
        (gradient,) = captured(model, inputs).values()
        assert gradient is not None
        assert relative(gradient.grad_sample(), want[name]) < DOUBLE
        assert relative(gradient.norm_sq()[0], want[name].flatten(1).square().sum(1)) < DOUBLE


@pytest.mark.parametrize("layer", [nn.Linear(4, 3), nn.Embedding(6, 4), nn.LayerNorm(4), nn.RMSNorm(4)], ids=repr)
def test_a_layer_that_is_used_at_no_position_has_no_gradient(layer: nn.Module):
    empty = torch.zeros(5, 0, dtype=torch.int64) if isinstance(layer, nn.Embedding) else torch.zeros(5, 0, 4)
    for name, gradient in captured(layer, empty).items():
        assert gradient is not None and gradient.records == 5
        assert bool((gradient.norm_sq()[0] == 0).all())
        weighted = gradient.weighted_sum(torch.ones(5))
        assert torch.equal(weighted, torch.zeros_like(layer.get_parameter(name)))
        assert gradient.grad_sample().shape == (5, *weighted.shape)


@pytest.mark.parametrize("case", LAYER_CASES, ids=lambda c: c.name)
def test_rows_of_one_record_fold_into_it(case: LayerCase):
    """Two consecutive rows a record: the gradient is that of their summed loss."""
    model, inputs = build(case, torch.float64), case.inputs(6, torch.float64)
    rows = grads_one_by_one(model, inputs)
    for method in ("gram", "kept"):
        plan = Plan(forced=dict.fromkeys(rows, method))
        for name, gradient in captured(model, inputs, plan, rows_per_record=2).items():
            assert gradient is not None and gradient.records == 3
            want = rows[name].unflatten(0, (3, 2)).sum(1)
            assert relative(gradient.norm_sq()[0], want.flatten(1).square().sum(1)) < DOUBLE
            assert relative(gradient.weighted_sum(torch.ones(3, dtype=torch.float64)), want.sum(0)) < DOUBLE


@pytest.mark.parametrize("case", LAYER_CASES, ids=lambda c: c.name)
def test_channels_last_and_strided_inputs(case: LayerCase):
    if case.entries or len(case.shape) not in (3, 4):
        pytest.skip("needs an image-like input")
    model, inputs = build(case, torch.float64), case.inputs(4, torch.float64)
    want = grads_one_by_one(model, inputs)
    layout = torch.channels_last if len(case.shape) == 3 else torch.channels_last_3d
    doubled = torch.stack([inputs, inputs], -1).flatten(-2)[..., ::2]  # every second element: strided
    for variant in (inputs.to(memory_format=layout), doubled):
        for name, gradient in captured(model, variant).items():
            assert gradient is not None
            assert relative(gradient.grad_sample(), want[name]) < DOUBLE
            assert relative(gradient.norm_sq()[0], want[name].flatten(1).square().sum(1)) < DOUBLE


def test_a_dropped_record_leaves_no_trace():
    for case in LAYER_CASES:
        model, inputs = build(case, torch.float64), case.inputs(4, torch.float64)
        if case.entries or find_rule(model) is None:
            continue
        clean = captured(model, inputs)
        inputs = inputs.clone()
        inputs[2] = float("inf")
        for name, gradient in captured(model, inputs).items():
            reference = clean[name]
            assert gradient is not None and reference is not None
            weights = torch.tensor([1.0, 0.5, 0.0, 2.0], dtype=torch.float64)
            assert relative(gradient.weighted_sum(weights), reference.weighted_sum(weights)) < DOUBLE


def test_subclasses_inherit_a_rule_only_if_they_compute_the_same():
    class Renamed(nn.Linear):
        def extra_repr(self) -> str:
            return "renamed"

    class Changed(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    assert find_rule(Renamed(2, 2)) is find_rule(nn.Linear(2, 2))
    assert find_rule(Changed(2, 2)) is None
    model = Changed(3, 2).double()
    inputs = torch.randn(4, 3, dtype=torch.float64)
    want = grads_one_by_one(model, inputs)
    for name, gradient in captured(model, inputs).items():
        assert gradient is not None and relative(gradient.grad_sample(), want[name]) < DOUBLE


def test_a_registered_rule_is_used():
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    calls = []

    @register_layer_rule(Scale)
    def rule(layer: nn.Module, activations: Tensor, backprops: Tensor):
        calls.append(1)
        return {"weight": activations * backprops}

    model, inputs = Scale().double(), torch.randn(4, 3, dtype=torch.float64)
    want = grads_one_by_one(model, inputs)
    gradient = captured(model, inputs)["weight"]
    assert calls and gradient is not None and relative(gradient.grad_sample(), want["weight"]) < DOUBLE


def test_the_fallback_refuses_a_layer_that_mixes_records():
    class Mixing(BareScale):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(0))

    with pytest.raises(NotImplementedError, match=r"independently|record by record"):
        captured(nn.Sequential(Mixing(6)).double(), torch.randn(4, 6, dtype=torch.float64))


@pytest.mark.parametrize("first", ["one record", "not finite", "no gradient"])
def test_a_first_batch_that_shows_nothing_verifies_nothing(first: str):
    class Mixing(BareScale):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(0))

    model, inputs = nn.Sequential(Mixing(6)).double(), torch.randn(4, 6, dtype=torch.float64)
    capture = Capture(model)
    blind = inputs[:1] if first == "one record" else inputs.clone()
    if first == "not finite":
        blind[0] = float("nan")
    (record_loss(model(blind)).sum() * (0 if first == "no gradient" else 1)).backward()
    capture.clear()
    with pytest.raises(NotImplementedError, match="independently"):
        record_loss(model(inputs)).sum().backward()


def test_embedding_options_that_mix_records_are_refused():
    for options in ({"scale_grad_by_freq": True}, {"max_norm": 1.0}):
        model = nn.Embedding(5, 3, **options)
        with pytest.raises(NotImplementedError, match="Embedding"):
            captured(model, torch.randint(5, (4, 2)))


def test_a_product_over_too_many_positions_cannot_be_forced():
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="5000 positions"):
        captured(model, torch.randn(1, 5000, 2), Plan(forced={"weight": "gram"}))
    assert captured(model, torch.randn(1, 5000, 2))["weight"] is not None
