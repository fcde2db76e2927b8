"""Batches that are captured and replayed: steps as they would be without, and a reason where that cannot be.

Where there is no GPU a stand-in for the graph runs the same function on the same memory again.
"""

from __future__ import annotations

import warnings

import pytest
import small
import torch
from cases import record_loss
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dp2vae_fast import PrivacyEngine, Trainer
from dp2vae_fast.engine import captured, clipping
from dp2vae_fast.engine.captured import CapturedBatches
from dp2vae_fast.engine.gradients.products import LinearProduct
from dp2vae_fast.engine.keystream import Keystream
from dp2vae_fast.runs.keys import RunKeys

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
N = 48


class Again:
    """Runs the function again at every replay, into the tensors that it returned at first. That nothing is looked at,
    only a real capture can tell."""

    captures = 0

    def __init__(self, function) -> None:
        Again.captures += 1
        self.function = function
        self.result = function()

    def replay(self):
        losses, sums = self.function()
        self.result[0].copy_(losses)
        for p, total in sums.items():
            self.result[1][p].copy_(total)
        return self.result


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    Again.captures = 0
    if not GPU:
        monkeypatch.setattr(captured, "_Graph", Again)
        monkeypatch.setattr(captured, "_why_no_graph", lambda device: "")


def make(physical: int | None = 6, *, epochs_seed: int = 0, noise: float = 0.7, batch_size: int = 8, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    images = torch.randn(N, 1, 8, 8) * torch.linspace(0.1, 3, N).reshape(N, 1, 1, 1)
    model.to(DEVICE)
    engine = PrivacyEngine(accountant="rdp", keystream=Keystream.seeded(1 + epochs_seed))
    module, optimizer, loader = engine.make_private(
        module=model,
        optimizer=options.pop("optimizer", torch.optim.Adam)(model.parameters(), lr=0.02),
        data_loader=DataLoader(TensorDataset(images), batch_size=batch_size),
        noise_multiplier=noise,
        max_grad_norm=1.0,
        physical_batch_size=physical,
        **options,
    )
    return engine, model, module, optimizer, loader


def losses_of(module: nn.Module):
    return lambda x: record_loss(module(x))


def train(capture: bool, epochs: int = 3, **options) -> tuple[list[Tensor], float, list[Tensor]]:
    """Parameters, epsilon and losses after some epochs, with batches that are captured or an ordinary loop."""
    engine, model, module, optimizer, loader = make(**options)
    batches, seen = CapturedBatches(optimizer, losses_of(module)) if capture else None, []
    for _ in range(epochs):
        for (x,) in loader:
            if batches is not None:
                seen.append(batches(x))
            else:
                losses = losses_of(module)(x.to(DEVICE))
                if optimizer.mask is not None:
                    losses = torch.where(optimizer.mask.to(DEVICE), losses, 0.0)
                (losses.sum() if options.get("loss_reduction") == "sum" else losses.mean()).backward()
                seen.append(losses.detach())
            optimizer.step()
            optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()], engine.get_epsilon(1e-5), seen


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("physical", [6, 12, 40])  # draws of several batches, of one or two, of one
def test_replayed_steps_are_the_steps_that_would_have_been_taken(physical: int, reduction: str):
    want = train(False, physical=physical, loss_reduction=reduction)
    got = train(True, physical=physical, loss_reduction=reduction)
    if not GPU:
        assert Again.captures == 1
    assert got[1] == want[1]
    for a, b in zip(got[0] + got[2], want[0] + want[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5 if GPU else 0, atol=1e-6 if GPU else 0)


def test_what_a_graph_returned_is_not_changed_by_the_next_batch():
    _, _, module, optimizer, loader = make(40)
    batches, kept = CapturedBatches(optimizer, losses_of(module)), []
    for _ in range(2):
        for (x,) in loader:
            kept.append((batches(x), x, optimizer.mask, [p.detach().clone() for p in module.parameters()]))
            optimizer.step()
            optimizer.zero_grad()
    for losses, x, mask, parameters in kept:
        with torch.no_grad():
            for p, before in zip(module.parameters(), parameters, strict=True):
                p.copy_(before)
            again = torch.where(mask.to(DEVICE), losses_of(module)(x.to(DEVICE)), 0.0)
        torch.testing.assert_close(losses, again)


def test_a_bound_that_a_schedule_changes_is_captured_anew():
    def run(capture: bool) -> list[Tensor]:
        _, model, module, optimizer, loader = make(40, noise=0.0)
        batches = CapturedBatches(optimizer, losses_of(module))
        for epoch in range(3):
            optimizer.max_grad_norm = 0.5**epoch
            for (x,) in loader:
                if capture:
                    batches(x)
                else:
                    torch.where(optimizer.mask.to(DEVICE), losses_of(module)(x.to(DEVICE)), 0.0).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        return [p.detach().clone() for p in model.parameters()]

    for a, b in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert GPU or Again.captures == 3


def test_a_parameter_that_is_frozen_gets_no_more_of_the_graph():
    _, model, module, optimizer, loader = make(40, noise=0.0)
    batches = CapturedBatches(optimizer, losses_of(module))
    frozen = model[0].weight
    for epoch in range(2):
        frozen.requires_grad_(epoch == 0)
        before = frozen.detach().clone()
        for (x,) in loader:
            batches(x)
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(before, frozen) == (epoch == 1)


# One draw a step ------------------------------------------------------------------------------------------------------


def replaying(**options):
    """What a loop has in hand whose last batch was replayed, and stepped on."""
    _, _, module, optimizer, _ = make(**{"physical": None, **options})
    optimizer.pending.one_draw_at_a_time = False  # the batches are of nobody's draw
    batches = CapturedBatches(optimizer, losses_of(module))
    x = torch.randn(8, 1, 8, 8)
    for _ in range(12):
        batches(x)
        if optimizer._replayed:
            break
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer._replayed
    return batches, module, optimizer, x


@pytest.mark.parametrize("second", ["replayed", "eager"])
def test_two_batches_before_a_step_are_refused(second: str):
    batches, module, optimizer, x = replaying()
    with pytest.raises(ValueError, match="does not compose by accumulation"):
        if second == "replayed":
            batches(x)
        else:
            losses_of(module)(x.to(DEVICE)).mean().backward()
            optimizer.step()


@pytest.mark.parametrize("second", ["replayed", "eager"])
def test_or_counted_where_sampling_allows_them(second: str):
    batches, module, optimizer, x = replaying(poisson_sampling=False)
    assert optimizer.accumulated_iterations == 1
    if second == "replayed":
        batches(x)
    else:
        losses_of(module)(x.to(DEVICE)).mean().backward()
    assert optimizer.accumulated_iterations == 2
    optimizer.step()
    optimizer.zero_grad()
    assert optimizer.accumulated_iterations == 1 and not optimizer._replayed


def test_zero_grad_forgets_a_replayed_batch():
    _, module, optimizer, _ = replaying(noise=0.0, optimizer=torch.optim.SGD)
    optimizer.zero_grad()
    before = [p.detach().clone() for p in module.parameters()]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_two_steps_on_one_draw_are_accounted_together_when_replayed_too():
    def spent(capture: bool, steps: int) -> float:
        engine, _, module, optimizer, loader = make(None)
        given = loader.draws.next_in_use
        loader.draws.next_in_use = lambda size: given(8)  # whatever was drawn, it is as large as the batch below
        batches, x = CapturedBatches(optimizer, losses_of(module)), torch.randn(8, 1, 8, 8)
        for _ in range(2):
            for _ in loader:
                for _ in range(steps):
                    if capture:
                        batches(x)
                    else:
                        losses_of(module)(x.to(DEVICE)).mean().backward()
                    optimizer.step()
                    optimizer.zero_grad()
        return engine.get_epsilon(1e-5)

    assert spent(True, 1) == spent(False, 1) < spent(True, 2) == spent(False, 2)
    assert GPU or Again.captures == 2


# Bounds ---------------------------------------------------------------------------------------------------------------


def cancelling() -> LinearProduct:
    """Positions that cancel: Gram norms are all rounding error."""
    generator = torch.Generator().manual_seed(5)
    half, b = torch.randn(6, 32, 12, generator=generator), torch.randn(6, 32, 9, generator=generator)
    return LinearProduct(torch.cat([half, half * (1 + 1e-6)], 1), torch.cat([b, -b], 1))


def test_a_norm_that_nobody_looks_at_is_still_an_upper_bound():
    gradient = cancelling()
    exact = gradient.in_float64(torch.arange(6)).norm_sq()[0]
    looked, unseen = (clipping.bounded_norms([gradient], second_look=how) for how in (True, False))
    for norm_sq, error in (looked, unseen):
        assert (norm_sq[0].double() + error[0].double() >= exact).all()
    assert (unseen[0] + unseen[1] > looked[0] + looked[1]).all()


def test_a_clip_factor_does_not_depend_on_whether_batches_are_replayed_yet():
    """When the first replay comes depends on how many batches were drawn before, which is nobody's to know."""
    _, _, _, optimizer, _ = make(40)
    before = optimizer.clipping.factors({"p": cancelling()}, 1.0)["p"]
    CapturedBatches(optimizer, lambda x: x)
    after = optimizer.clipping.factors({"p": cancelling()}, 1.0)["p"]
    assert (after < before).all()  # from the first batch on, captured or not


# The trainer ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"iwae_samples": 2, "encoder": "dp"}])
def test_a_trainer_captures_its_batches(settings: dict, monkeypatch):
    monkeypatch.setattr(RunKeys, "keystream", lambda self, stage: Keystream.seeded(len(stage), once=False))  # for both
    settings = small.SETTINGS | {"steps": 12, "device": DEVICE} | settings
    want, got = (Trainer(small.digits(), recipe="digits", **settings, compile=how).fit() for how in ("none", "graph"))
    if not GPU:
        assert Again.captures == (2 if settings.get("encoder") == "dp" else 1)
    assert [row["records"] for row in got.history] == [row["records"] for row in want.history]
    assert got.report["epsilon"] == want.report["epsilon"]
    for a, b in zip(got.decoder.parameters(), want.decoder.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4 if GPU else 0, atol=1e-5 if GPU else 0)


# What cannot be captured ----------------------------------------------------------------------------------------------


def test_without_a_gpu_batches_run_as_they_would_and_the_reason_is_said_once(monkeypatch):
    monkeypatch.setattr(captured, "_why_no_graph", lambda device: f"there are no graphs on {device.type}")
    with pytest.warns(UserWarning, match="there are no graphs on") as seen:
        got = train(True, physical=40)
    assert sum("captured" in str(w.message) for w in seen) == 1 and Again.captures == 0
    for a, b in zip(got[0], train(False, physical=40)[0], strict=True):
        assert torch.equal(a, b)


def test_adaptive_clipping_is_not_captured():
    options = dict(
        clipping="adaptive",
        target_unclipped_quantile=0.5,
        clipbound_learning_rate=0.2,
        max_clipbound=10.0,
        min_clipbound=0.01,
        unclipped_num_std=4.0,
    )
    with pytest.warns(UserWarning, match="adaptive clipping"):
        train(True, epochs=2, physical=40, **options)
    assert Again.captures == 0


def test_a_capture_that_fails_is_said_and_changes_nothing(monkeypatch):
    def fail(function):
        function()
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(captured, "_Graph", fail)
    with pytest.warns(UserWarning, match=r"capturing failed \(operation not permitted when stream is capturing\)"):
        got = train(True, physical=40)
    for a, b in zip(got[0], train(False, physical=40)[0], strict=True):
        assert torch.equal(a, b)


def test_batches_of_changing_size_are_never_captured():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "this process has drawn noise")
        _, _, module, optimizer, loader = make(None)
        batches = CapturedBatches(optimizer, losses_of(module))
        sizes = set()
        for (x,) in loader:
            sizes.add(len(x))
            batches(x)
            optimizer.step()
            optimizer.zero_grad()
    assert len(sizes) > 2 and Again.captures == 0
