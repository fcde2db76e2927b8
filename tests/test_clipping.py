"""The clipping modes: what each bounds, what it spends of the noise, and where the bound goes next."""

from __future__ import annotations

import math

import loops
import pytest
import torch
from cases import grads_one_by_one, record_loss
from torch import Tensor, nn

from dp2vae_fast import PrivacyEngine, ops
from dp2vae_fast.engine.clipping import AdaptiveClipping, FlatClipping, GroupClipping, bounded_norms
from dp2vae_fast.engine.gradients.gradient import Gradient, Kept
from dp2vae_fast.engine.gradients.products import ConvGeometry, ConvProduct, LinearProduct
from dp2vae_fast.engine.keystream import Keystream
from dp2vae_fast.ops import _op

D = torch.float64
N = 7


def model_and_batch() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(D)
    sizes = torch.logspace(-2, 1, N, dtype=D).unsqueeze(1)
    return model, sizes * torch.randn(N, 5, dtype=D)


def privatize(model: nn.Module, **kwargs):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return loops.privatize(model, optimizer, **({"expected_batch_size": N} | kwargs))


def one_step(private: nn.Module, optimizer, model: nn.Module, batch: Tensor) -> list[Tensor]:
    """By how much a step of learning rate 1 lowers each parameter."""
    before = [p.detach().clone() for p in model.parameters()]
    record_loss(private(batch)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return [old - p.detach() for old, p in zip(before, model.parameters(), strict=True)]


# Factors ---------------------------------------------------------------------------------------------

BACKENDS = ["reference", *([] if _op._native_gap else ["cpp"])]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("bound", [1e-18, 1e-20, 1e-22, 1e-24, 1e-26])
def test_huge_gradients_are_not_longer_than_a_tiny_bound(backend: str, normalize: bool, bound: float):
    """Numbers below the normal range are rounded by more than any norm can count, and up."""
    norm_sq = torch.logspace(36, 38, 300, dtype=D).float()[None]
    error = torch.zeros_like(norm_sq)
    if normalize:
        factors = ops.normalize_factors(norm_sq, error, bound, 1e-3, backend=backend)
    else:
        factors = ops.clip_factors(norm_sq, error, bound, backend=backend)
    assert (factors.double() * norm_sq[0].double().sqrt() <= bound).all()
    assert ((factors == 0) | (factors >= torch.finfo(torch.float32).tiny)).all()
    assert (factors > 0).any() == (bound > 1e-20) and (factors > 0).all() == (bound > 1e-19)


BAD = [math.nan, math.inf, 0.0, -1.0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bound", BAD)
def test_what_is_no_bound_is_refused_and_clips_to_nothing(backend: str, bound: float):
    norms = torch.tensor([[4.0, 1.0, 9.0]]), torch.zeros(1, 3)
    for op, more in ((ops.clip_factors, ()), (ops.normalize_factors, (0.01,))):
        with pytest.raises(ValueError, match=f"^{op.name}: max_grad_norm is {bound}: it must be positive and finite"):
            op(*norms, bound, *more, backend=backend)
        if op is ops.clip_factors and bound == math.inf:
            continue
        itself = getattr(getattr(torch.ops.dp2vae_fast, op.name), "default" if backend == "cpp" else backend)
        assert itself(*norms, bound, *more).tolist() == [0.0] * 3
    with pytest.raises(ValueError, match=r"stability is -0.5: it must be finite"):
        ops.normalize_factors(*norms, 1.0, -0.5, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sum_that_is_no_squared_norm_clips_to_nothing(backend: str):
    norm_sq, error = torch.tensor([[-4.0, 1.0], [1.0, 3.0]]), torch.zeros(2, 2)
    for op, more in ((ops.clip_factors, ()), (ops.normalize_factors, (0.01,))):
        factors = op(norm_sq, error, 1.0, *more, backend=backend)
        assert factors[0] == 0.0 and 0.49 < factors[1] <= 0.5
    zero, beyond_the_largest_number = torch.zeros(1, 1), (1e30, 1e-30)
    assert ops.normalize_factors(zero, zero, *beyond_the_largest_number, backend=backend).tolist() == [0.0]
    for wrong in (error[:1], error[0], error.T[:, :1]):
        with pytest.raises(ValueError, match=r"^clip_factors: norm_sq \[2, 2\], error .* expected \[L, N\] of both"):
            ops.clip_factors(norm_sq, wrong, 1.0, backend=backend)


# Per layer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bounds", "groups"),
    [
        ([0.3, 0.2, 0.7, 0.4], [[0], [1], [2], [3]]),
        ({"0": 0.5, "2": 0.1}, [[0, 1], [2, 3]]),
        ({"": 0.5, "2.bias": 0.1}, [[0, 1, 2], [3]]),
        (1.5, [[0], [1], [2], [3]]),
    ],
)
def test_each_group_is_clipped_to_its_own_bound(bounds, groups):
    model, batch = model_and_batch()
    exact = list(grads_one_by_one(model, batch).values())
    private, optimizer = privatize(model, clipping="per_layer", max_grad_norm=bounds)
    moved = one_step(private, optimizer, model, batch)
    values = [0.75] * 4 if isinstance(bounds, float) else list(bounds.values() if isinstance(bounds, dict) else bounds)
    for members, bound in zip(groups, values, strict=True):
        norms = torch.stack([exact[i].flatten(1).square().sum(1) for i in members]).sum(0).sqrt()
        factors = (bound / norms).clamp(max=1.0)
        assert 0 < int((factors < 1).sum())
        for i in members:
            torch.testing.assert_close(moved[i], torch.einsum("n,n...->...", factors, exact[i]), rtol=1e-8, atol=1e-12)
    assert math.hypot(*values) <= optimizer.sensitivity() <= 1.0001 * math.hypot(*values)


def test_a_schedule_scales_all_groups():
    model, batch = model_and_batch()
    private, optimizer = privatize(model, clipping="per_layer", max_grad_norm=[0.03, 0.02, 0.07, 0.04])
    first = one_step(private, optimizer, model, 1e3 * batch)
    optimizer.max_grad_norm *= 0.5
    sums = [p.norm() for p in one_step(private, optimizer, model, 1e3 * batch)]
    assert all(float(s) <= 0.5 * N * b for s, b in zip(sums, [0.03, 0.02, 0.07, 0.04], strict=True))
    assert all(float(moved.norm()) > 0 for moved in first)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([1.0, 2.0], "2 bounds for 4 trainable"),
        ({"0": 1.0}, r"no group for parameter '2\.weight'"),
        ({"": 1.0, "9": 1.0}, "'9', which is no trainable"),
        ([1.0, 1.0, 0.0, 1.0], "positive and finite"),
    ],
)
def test_bounds_that_do_not_fit_are_refused(bounds, message):
    with pytest.raises(ValueError, match=message):
        privatize(model_and_batch()[0], clipping="per_layer", max_grad_norm=bounds)
    with pytest.raises(ValueError, match="several bounds"):
        privatize(model_and_batch()[0], clipping="flat", max_grad_norm=bounds)


def test_bounds_belong_to_parameters_whatever_is_frozen_later():
    model, batch = model_and_batch()
    private, optimizer = privatize(model, clipping="per_layer", max_grad_norm=[5.0, 0.1, 5.0, 0.1])
    model[0].weight.requires_grad_(False)
    moved = one_step(private, optimizer, model, 1e3 * batch)
    assert float(moved[0].norm()) == 0.0 and 0 < float(moved[1].norm()) <= 0.1 * N and float(moved[2].norm()) > 0.1 * N


def test_a_parameter_without_a_bound_is_refused_when_it_is_trained():
    model, batch = model_and_batch()
    model[0].weight.requires_grad_(False)
    private, optimizer = privatize(model, clipping="per_layer", max_grad_norm=[0.1, 0.1, 0.1])
    model[0].weight.requires_grad_(True)
    record_loss(private(batch)).sum().backward()
    with pytest.raises(ValueError, match="frozen at make_private"):
        optimizer.step()


# Automatic -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_automatic_clipping_normalises_every_record(reduction: str):
    model, batch = model_and_batch()
    exact = list(grads_one_by_one(model, batch).values())
    private, optimizer = privatize(
        model, clipping="automatic", stability=0.05, max_grad_norm=0.4, loss_reduction=reduction, expected_batch_size=1
    )
    before = [p.detach().clone() for p in model.parameters()]
    losses = record_loss(private(batch))
    (losses.sum() if reduction == "sum" else losses.mean()).backward()
    optimizer.step()
    norms = torch.stack([g.flatten(1).square().sum(1) for g in exact]).sum(0).sqrt()
    for old, p, g in zip(before, model.parameters(), exact, strict=True):
        want = torch.einsum("n,n...->...", 0.4 / (norms + 0.05), g)
        torch.testing.assert_close(old - p, want, rtol=1e-8, atol=1e-12)


def test_automatic_clipping_never_exceeds_its_bound():
    values = torch.randn(200, 9) * torch.logspace(-16, 18, 200).unsqueeze(1)
    privatized = PrivacyEngine().privatize(
        model := nn.Linear(2, 1),
        torch.optim.SGD(model.parameters(), lr=0.1),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        sample_rate=0.1,
        expected_batch_size=1,
        clipping="automatic",
        stability=1e-30,
        loss_reduction="sum",
    )[1]
    factors = privatized.clipping.factors({0: Kept(values)}, 1.0)[0]
    norms = (factors.unsqueeze(1) * values).double().norm(dim=1)
    assert bool((norms <= 1.0).all()) and float(norms.min()) > 0.99
    tiny = privatized.clipping.factors({0: Kept(1e-43 * values[-1:])}, 1.0)[0]  # whose squares are all zero
    assert float((tiny.unsqueeze(1) * 1e-43 * values[-1:]).norm()) <= 1.0


# Adaptive --------------------------------------------------------------------------------------------


def test_the_bound_moves_to_the_quantile():
    stream = Keystream.seeded(1).stream("count")
    clipping = AdaptiveClipping(
        stream=stream, target_unclipped_quantile=0.7, clipbound_learning_rate=0.3, unclipped_num_std=1.0
    )
    values = torch.randn(500, 20, generator=torch.Generator().manual_seed(0))
    bound = 0.1
    for _ in range(60):
        clipping.factors({0: Kept(values)}, bound)
        bound = clipping.next_bound(bound, 500)
    norms = values.norm(dim=1)
    assert float(norms.quantile(0.65)) < bound < float(norms.quantile(0.75))


def test_one_record_moves_the_count_by_half_and_padding_by_nothing():
    counts = []
    for rows, mask in [
        (torch.ones(4, 2), None),
        (torch.ones(5, 2), None),
        (torch.ones(6, 2), torch.tensor([True] * 4 + [False] * 2)),
        (torch.cat([torch.ones(4, 2), 100 * torch.ones(1, 2)]), None),
    ]:
        clipping = AdaptiveClipping(stream=Keystream.secret().stream("count"))
        clipping.factors({0: Kept(rows)}, 10.0, 1.0, mask)
        counts.append(clipping.count)
    assert counts == [2.0, 2.5, 2.0, 1.5]


def test_the_step_as_a_whole_has_the_noise_multiplier_that_is_accounted():
    """Gradients and count are one Gaussian mechanism: (C / std)^2 + (1/2 / unclipped_num_std)^2 = 1 / z^2."""
    model, batch = model_and_batch()
    engine = PrivacyEngine()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    private, optimizer = engine.privatize(
        model,
        optimizer,
        noise_multiplier=1.3,
        max_grad_norm=2.0,
        sample_rate=0.1,
        expected_batch_size=N,
        clipping="adaptive",
        unclipped_num_std=0.9,
        min_clipbound=0.5,
        max_clipbound=2.5,
        clipbound_learning_rate=10.0,
        loss_reduction="sum",
    )
    std = optimizer._noise_std()
    assert (optimizer.sensitivity() / std) ** 2 + (0.5 / 0.9) ** 2 == pytest.approx(1.3**-2, rel=1e-12)
    for _ in range(5):
        record_loss(private(batch)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert 0.5 <= optimizer.max_grad_norm <= 2.5
    assert engine.accountant.history == [(1.3, 0.1, 5)]


def test_options_of_adaptive_clipping_are_checked():
    for option, message in [
        ({"unclipped_num_std": 0.6, "noise_multiplier": 1.3}, "above 0.65"),
        ({"min_clipbound": 2.0, "max_clipbound": 1.0}, "min_clipbound"),
        ({"target_unclipped_quantile": 1.5}, "fraction"),
    ]:
        with pytest.raises(ValueError, match=message):
            privatize(model_and_batch()[0], clipping="adaptive", **option)


# Error bounds ----------------------------------------------------------------------------------------


def incoherent(positions: int, records: int = 4) -> list[Gradient]:
    """Gradients whose positions share nothing, whose Gram error bound is T times as large as need be."""
    torch.manual_seed(1)
    side = math.isqrt(positions)
    geometry = ConvGeometry((8, 6, 1, 1), (1, 1), (0, 0), (1, 1), 1, False)
    maps = torch.randn(records, 6, side, side), torch.randn(records, 8, side, side)
    return [
        LinearProduct(torch.randn(records, positions, 6), torch.randn(records, positions, 8)),
        ConvProduct(*maps, geometry),
    ]


@pytest.mark.parametrize("positions", [64, 1024, 4096])
@pytest.mark.parametrize("kind", [0, 1])
def test_what_float32_cannot_bound_is_taken_again(positions: int, kind: int):
    gradient = incoherent(positions)[kind]
    rough_sq, rough_error = gradient.norm_sq()
    norm_sq, error = bounded_norms([gradient])
    exact = gradient.in_float64(torch.arange(4)).grad_sample().flatten(1).square().sum(1)
    assert bool((exact <= (norm_sq + error)[0].double()).all())
    assert bool((norm_sq + error <= 1.02 * exact).all())  # at most 1 % of the norm too short
    assert bool((rough_error > 0.01 * rough_sq).any()) == (positions > 64)


def test_a_record_is_taken_again_for_what_it_is_itself():
    """Its bound is the same whether or not others in the batch cancel."""
    gradient = incoherent(1024)[0]
    assert isinstance(gradient, LinearProduct)
    smooth = LinearProduct(torch.ones(4, 1024, 6), torch.ones(4, 1024, 8))
    alone = bounded_norms([smooth])
    mixed = bounded_norms(
        [
            LinearProduct(
                torch.cat([smooth.activations, gradient.activations]), torch.cat([smooth.backprops, gradient.backprops])
            )
        ]
    )
    for few, many in zip(alone, mixed, strict=True):
        torch.testing.assert_close(few, many[:, :4], rtol=1e-6, atol=0)


def test_norms_of_what_is_formed_stand():
    """So small that what underflow may have lost is most of the bound; an exact norm would not be that of the sum's
    part."""
    a, b = torch.randn(3, 70, 4) * 1e-10, torch.randn(3, 70, 5) * 1e-10
    gradient = LinearProduct(a, b).directly()
    norm_sq, error = bounded_norms([gradient])
    assert torch.equal(norm_sq[0], gradient.norm_sq()[0]) and bool((error > 0.01 * norm_sq).all())


def test_short_records_are_left_alone():
    gradient = incoherent(1024)[0]
    _, error = bounded_norms([gradient], harmless=1e6)
    assert torch.equal(error[0], gradient.norm_sq()[1])


@pytest.mark.parametrize("clipping", [FlatClipping(), GroupClipping(groups={0: 0, 1: 1}, bounds=[1.0, 1.0])])
def test_padding_has_weight_zero_whatever_it_holds(clipping):
    values = torch.tensor([[1.0], [float("nan")], [1e-9]])
    found = clipping.factors({0: Kept(values), 1: Kept(values)}, 1.0, 1.0, torch.tensor([True, False, False]))
    for factors in found.values():
        assert factors[0] > 0 and factors[1] == 0 and factors[2] == 0


@pytest.mark.parametrize("outputs, inputs", [(1, 1), (1, 33), (33, 1), (5, 7)])
@pytest.mark.parametrize("positions", [1, 2])
def test_no_term_of_a_sum_passes_through_many_additions(outputs: int, inputs: int, positions: int):
    """One long term, and short ones of which each alone vanishes beside it."""
    records, unit = 2048, 2.0**-24
    backprops = torch.full((records, positions, outputs), unit)
    backprops[0] = 1.0
    backprops[:, 1:] = 0.0
    product = LinearProduct(torch.ones(records, positions, inputs), backprops)
    exact = 1.0 + (records - 1) * unit
    for gradient in (product, product.kept()):
        total = gradient.weighted_sum(torch.ones(records)).double()
        assert float((total - exact).abs().max()) <= 144 * unit * exact
