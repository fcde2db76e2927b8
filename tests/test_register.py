"""This package's layer rules inside Opacus' own engine, against one ordinary backward a record in float64."""

from __future__ import annotations

from collections.abc import Callable

import opacus
import pytest
import torch
from cases import LAYER_CASES, LayerCase
from fault_harness import RecordLoss, clipped_sum, distance_gone, make_private, one_step, randn, record_gradients
from opacus.grad_sample import GradSampleHooks, GradSampleHooksFastGradientClipping
from torch import Tensor, nn

from dp2vae_fast import register_layer_rule, register_with_opacus
from dp2vae_fast.engine.gradients import layers
from dp2vae_fast.engine.opacus_samplers import grad_sampler, norm_sampler

pytestmark = pytest.mark.filterwarnings("ignore:Secure RNG turned off", "ignore:.*weight_norm")
MODES = ["opacus hooks", "opacus ghost"]
RULED = [case for case in LAYER_CASES if layers.find_rule(case.make()) is not None]
CASES = pytest.mark.parametrize("case", RULED, ids=lambda c: c.name)
GRADS, NORMS = GradSampleHooks.GRAD_SAMPLERS, GradSampleHooksFastGradientClipping.NORM_SAMPLERS


@pytest.fixture
def registered():
    with register_with_opacus():
        yield


def build(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return make().to(dtype)


def alone(case: LayerCase) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(case.make())


def stepped(mode: str, model: nn.Module, records: Tensor, bound: float, **options) -> Tensor:
    """By what one step without noise and with a learning rate of 1 moves the parameters."""
    run = make_private(mode, model, records, bound=bound, **options)
    if not options.get("wrap_model", True):
        run.module = model  # what came back is Opacus' object for taking the hooks off
    return distance_gone(model, lambda: one_step(run, records))


def judge(mode: str, make: Callable[[], nn.Module], records: Tensor, train: str = "", **options) -> None:
    """One step in float64 is the sum of the clipped gradients, of parameter ``train`` alone if named."""

    def prepared() -> nn.Module:
        model = build(make)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not train or name == train)
        return model

    loss = RecordLoss()
    gradients = record_gradients(prepared(), records, lambda model, record: loss(model(record)))
    bound = float(torch.stack(gradients).norm(dim=1).median())
    want = clipped_sum(gradients, bound)
    assert bool(want.any())
    moved = stepped(mode, prepared(), records, bound, **options)
    scale = len(records) if options.get("reduction") == "mean" else 1
    torch.testing.assert_close(scale * moved, want, rtol=0, atol=1e-5 * float(want.norm()))


@CASES
@pytest.mark.parametrize("mode", MODES)
def test_each_layer_with_a_rule(registered, case: LayerCase, mode: str):
    records = case.inputs(6, torch.float64)
    judge(mode, alone(case), records)
    for name, _ in case.make().named_parameters():
        judge(mode, alone(case), records, train=f"0.{name}")


@CASES
@pytest.mark.parametrize("mode", MODES)
def test_an_empty_batch_moves_nothing(registered, case: LayerCase, mode: str):
    model, records = build(alone(case)), case.inputs(6, torch.float64)
    if isinstance(model[0], nn.modules.instancenorm._InstanceNorm):
        pytest.skip("the framework itself refuses an empty batch")
    run = make_private(mode, model, records, bound=1.0)
    moved = distance_gone(model, lambda: one_step(run, records[:0]))
    assert not bool(moved.any())


def decoder() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 8 * 4),
        nn.Unflatten(1, (8, 2, 2)),
        nn.GroupNorm(2, 8),
        nn.SiLU(),
        nn.ConvTranspose2d(8, 4, 4, stride=2, padding=1),
        nn.GroupNorm(2, 4),
        nn.SiLU(),
        nn.ConvTranspose2d(4, 3, 4, stride=2, padding=1),
    )


def image_encoder() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        nn.SiLU(),
        nn.Conv2d(6, 4, 3, stride=2, groups=2),
        nn.Flatten(),
        nn.LayerNorm(16, bias=False),
        nn.Linear(16, 3),
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("wrap_model", [True, False])
def test_whole_models(registered, mode: str, reduction: str, wrap_model: bool):
    judge(mode, decoder, randn(7, 5), reduction=reduction, wrap_model=wrap_model)
    images = randn(6, 4, 6, 6).to(memory_format=torch.channels_last)
    judge(mode, image_encoder, images, reduction=reduction, wrap_model=wrap_model)


@pytest.mark.parametrize("mode", MODES)
def test_a_model_may_be_private_before_the_registration(mode: str):
    records, loss = randn(6, 5), RecordLoss()
    gradients = record_gradients(build(decoder), records, lambda model, record: loss(model(record)))
    model = build(decoder)
    run = make_private(mode, model, records, bound=0.1)
    with register_with_opacus():
        moved = distance_gone(model, lambda: one_step(run, records))
    want = clipped_sum(gradients, 0.1)
    torch.testing.assert_close(moved, want, rtol=0, atol=1e-4 * float(want.norm()))


@pytest.mark.parametrize("mode", MODES)
def test_batch_second(registered, mode: str):
    """Where every layer has the batch as its second axis, as Opacus' batch_first=False has it."""
    records, loss = randn(3, 5, 6), RecordLoss()  # sequences of 3 for 5 records

    def gradient(n: int) -> Tensor:
        model = build(lambda: nn.Sequential(nn.Linear(6, 4)))
        loss(model(records[:, n : n + 1]).transpose(0, 1)).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    gradients = [gradient(n) for n in range(5)]
    bound = float(gradients[0].norm())
    model = build(lambda: nn.Sequential(nn.Linear(6, 4)))
    run = make_private(mode, model, records, bound=bound, batch_first=False)
    run.optimizer.zero_grad()
    run.criterion(run.module(records).transpose(0, 1), records).backward()
    before = [p.detach().clone() for p in model.parameters()]
    run.optimizer.step()
    moved = torch.cat([(a - b).detach().flatten() for a, b in zip(before, model.parameters(), strict=True)])
    torch.testing.assert_close(moved, clipped_sum(gradients, bound), rtol=0, atol=1e-5 * bound)


def test_a_norm_is_an_upper_bound_where_its_sum_cancels(registered):
    layer = nn.Conv2d(3, 200, 3)
    inputs = randn(6, 3, 6, 6).float() + 1e2
    backprops = randn(6, 200, 4, 4, seed=1).float()
    backprops -= backprops.mean((2, 3), keepdim=True)
    bounds = norm_sampler(layer, [inputs], backprops)
    exact = grad_sampler(layer, [inputs.double()], backprops.double())
    for parameter, bound in bounds.items():
        norm = exact[parameter].flatten(1).norm(dim=1)
        assert bool((bound >= norm).all())
        if parameter is layer.weight:
            assert bool((bound <= 1.01 * norm).all())


def test_no_record_exceeds_the_bound_in_float32(registered):
    """Opacus' own factor of each record, times the exact norm of the very operands."""
    for case in RULED:
        layer = build(case.make, torch.float32)
        if type(layer) not in NORMS:
            continue
        run = make_private("opacus ghost", nn.Sequential(layer), case.inputs(6, torch.float32), bound=1e-2)
        seen = {}

        def spy(layer: nn.Module, activations: list[Tensor], backprops: Tensor, seen: dict = seen):
            wide = [a.double() if a.is_floating_point() else a for a in activations]
            seen.update(grad_sampler(layer, wide, backprops.double()))
            return norm_sampler(layer, activations, backprops)

        NORMS[type(layer)] = spy
        one_step(run, case.inputs(6, torch.float32))
        NORMS[type(layer)] = norm_sampler
        exact = torch.stack([g.flatten(1).norm(dim=1) for g in seen.values()]).norm(dim=0)
        factors = 1e-2 / (run.module.per_sample_gradient_norms + 1e-6)
        assert bool((factors.double() * exact <= 1e-2).all())


# The registry --------------------------------------------------------------------------------------------------------


def test_restoring_leaves_opacus_as_it_was():
    def results() -> list[Tensor]:
        found = []
        for mode in MODES:
            for make, records in ((decoder, randn(7, 5)), (alone(RULED[0]), randn(6, 7))):
                found.append(stepped(mode, build(make, torch.float32), records.float(), 0.1))
        return found

    registries = [dict(GRADS), dict(NORMS)]
    before = results()
    with register_with_opacus():
        assert GRADS[nn.ConvTranspose2d] is grad_sampler and NORMS[nn.Linear] is norm_sampler
        results()
    assert [dict(GRADS), dict(NORMS)] == registries
    assert all(torch.equal(a, b) for a, b in zip(before, results(), strict=True))


def test_registering_and_restoring_twice_changes_nothing():
    registries = [dict(GRADS), dict(NORMS)]
    first = register_with_opacus()
    ours = [dict(GRADS), dict(NORMS)]
    second = register_with_opacus()
    assert [dict(GRADS), dict(NORMS)] == ours
    second()
    assert [dict(GRADS), dict(NORMS)] == ours
    first()
    first()
    second()
    assert [dict(GRADS), dict(NORMS)] == registries


def test_what_somebody_else_registers_later_stays():
    def sampler(layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
        return {}

    before = GRADS[nn.Linear]
    try:
        with register_with_opacus():
            opacus.grad_sample.register_grad_sampler(nn.Linear)(sampler)
        assert GRADS[nn.Linear] is sampler
    finally:
        GRADS[nn.Linear] = before


class Twice(nn.Module):
    """One layer, used twice in one forward."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).tanh())


@pytest.mark.parametrize("conv_norms", [True, False])
def test_layers_that_are_used_twice_under_ghost(conv_norms: bool):
    with register_with_opacus(conv_norms=conv_norms):
        judge("opacus ghost", lambda: Twice(nn.GroupNorm(2, 4)), randn(5, 4, 3))
        judge("opacus hooks", lambda: Twice(nn.Conv2d(3, 3, 3, padding=1)), randn(5, 3, 4, 4))

        def conv() -> None:
            judge("opacus ghost", lambda: Twice(nn.Conv2d(3, 3, 3, padding=1)), randn(5, 3, 4, 4))

        if conv_norms:
            with pytest.raises(NotImplementedError, match="tying"):
                conv()
        else:
            conv()


def test_a_rule_of_the_users_own_is_registered_too():
    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.ones(3))
            self.child = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.child(x) + self.shift

    calls = []

    @register_layer_rule(Shift)
    def rule(layer: Shift, activations: Tensor, backprops: Tensor):
        calls.append(1)
        return {"shift": backprops}

    try:
        with register_with_opacus():
            for mode in MODES:
                judge(mode, lambda: nn.Sequential(Shift()), randn(5, 4))
    finally:
        del layers._RULES[Shift]
    assert len(calls) == 2


def test_what_a_rule_does_not_know_is_refused(registered):
    def patched() -> nn.Module:
        layer = nn.Linear(3, 2)
        layer.forward = lambda x: 2 * nn.functional.linear(x, layer.weight, layer.bias)
        return nn.Sequential(layer)

    def normed() -> nn.Module:
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 2)))

    for make in (patched, normed):
        with pytest.raises(NotImplementedError, match="its rule knows no parameter"):
            judge("opacus hooks", make, randn(4, 3))
    with pytest.raises(NotImplementedError, match="scale_grad_by_freq"):
        judge(
            "opacus hooks", lambda: nn.Sequential(nn.Embedding(4, 3, scale_grad_by_freq=True)), torch.ones(5, 2).long()
        )


def test_a_sharded_layers_type_is_made_on_the_spot(registered):
    layer = build(lambda: nn.Linear(3, 2))
    layer.__class__ = type("FSDPLinear", (nn.Linear,), {"__deepcopy__": lambda self, memo: self})
    inputs, backprops = randn(4, 3), randn(4, 2, seed=1)
    found = grad_sampler(layer, [inputs], backprops)
    torch.testing.assert_close(found[layer.weight], torch.einsum("np,nd->npd", backprops, inputs))
