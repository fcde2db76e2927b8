"""The planner: what it chooses, what it must not depend on, its budget of memory, its cache, and what it prints."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from loops import privatize
from torch import nn
from typer.testing import CliRunner

from dp2vae_fast.cli import app
from dp2vae_fast.engine.capture.capture import Capture
from dp2vae_fast.engine.clipping import bounded_norms
from dp2vae_fast.engine.gradients import timing
from dp2vae_fast.engine.gradients.cost import METHODS
from dp2vae_fast.engine.gradients.gradient import Kept
from dp2vae_fast.engine.gradients.plan import Plan, memory_overhead
from dp2vae_fast.engine.gradients.planning import plan_for
from dp2vae_fast.engine.gradients.products import LinearProduct


def decoder() -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 64 * 16),
        nn.Unflatten(1, (64, 4, 4)),
        nn.ConvTranspose2d(64, 32, 4, 2, 1),
        nn.GroupNorm(4, 32),
        nn.SiLU(),
        nn.ConvTranspose2d(32, 16, 4, 2, 1),
        nn.SiLU(),
        nn.ConvTranspose2d(16, 3, 4, 2, 1),
    )


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DP2VAE_FAST_CACHE", str(tmp_path))


def test_many_positions_and_few_numbers_are_kept_and_the_other_way_round_not():
    plan = plan_for(decoder(), torch.zeros(2, 8))
    chosen = {name: choice.method for name, choice in plan.choices.items()}
    assert chosen["0.weight"] == "gram"  # one position
    assert chosen["2.weight"] == "gram"  # 16 positions, 32,768 numbers
    assert chosen["7.weight"] == "kept"  # 256 positions, 768 numbers


def test_the_number_of_records_changes_nothing():
    plans = [plan_for(decoder(), torch.randn(n, 8)).choices for n in (1, 2, 33)]
    assert plans[0] == plans[1] == plans[2]


def test_what_is_forced_is_done_and_what_is_unknown_refused():
    plan = plan_for(decoder(), torch.zeros(2, 8), plan=Plan(forced={"2.weight": "kept", "7.weight": "direct"}))
    assert plan.choices["2.weight"].method == "kept" and plan.choices["7.weight"].method == "direct"
    with pytest.raises(ValueError, match="cannot force 'product'"):
        Plan(forced={"2.weight": "product"})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="max_memory_overhead is 0"):
        Plan(max_memory_overhead=0.5)


def test_a_name_that_no_parameter_has_is_refused():
    with pytest.raises(ValueError, match=r"forces '7.wieght', which is no parameter .* did you mean '7.weight'\?"):
        privatize(decoder(), plan=Plan(forced={"7.wieght": "kept"}))
    with pytest.raises(ValueError, match=r"forces 'encoder.bias', .* use the names of named_parameters\(\)"):
        privatize(decoder(), plan=Plan(forced={"encoder.bias": "kept", "7.weight": "kept"}))


@pytest.mark.parametrize("limit", [1.0, 1.1, 1.25, math.inf])
def test_the_budget_is_kept_where_it_can_be(limit: float):
    plan = plan_for(decoder(), torch.zeros(2, 8), plan=Plan(max_memory_overhead=limit))
    fastest = plan_for(decoder(), torch.zeros(2, 8), plan=Plan(max_memory_overhead=math.inf))
    choices = list(plan.choices.values())
    assert memory_overhead(choices) <= max(limit, 1.0)
    slower = sum(c.times[c.method] for c in choices) - sum(c.times[c.method] for c in fastest.choices.values())
    assert (slower > 0) == (memory_overhead(list(fastest.choices.values())) > limit)


def test_memory_overhead_of_what_is_known():
    """Two layers of equal operands: keeping as much as the operands hold changes nothing."""
    a = LinearProduct(torch.zeros(2, 4, 8), torch.zeros(2, 4, 8))
    plan = Plan(forced={"x": "kept", "y": "gram"})
    plan.prepare([("x", a), ("y", a)])
    assert plan.choices["x"].held == a.cost.operands == 256
    assert memory_overhead(list(plan.choices.values())) == 1.0
    wide = LinearProduct(torch.zeros(2, 4, 16), torch.zeros(2, 4, 16))
    plan.prepare([("x", wide), ("y", a)])
    # of x 512 bytes of operands and 1024 kept, of y 256: at the peak what is kept of x, and y's operands
    assert memory_overhead([plan.choices["x"], plan.choices["y"]]) == pytest.approx(1280 / 768)


def product(positions: int, inputs: int, outputs: int) -> LinearProduct:
    return LinearProduct(torch.zeros(1, positions, inputs), torch.zeros(1, positions, outputs))


def test_a_longer_record_is_refused_unless_sizes_are_public():
    """Where a batch is padded to its longest record, this one would decide how others are clipped."""
    model = nn.Linear(8, 8)
    for plan in (None, Plan(public_shapes=True)):
        private, optimizer = privatize(model, expected_batch_size=4, plan=plan)
        for positions in (3, 3, 5):
            private(torch.randn(4, positions, 8)).square().sum().backward()
            if positions == 5 and plan is None:
                with pytest.raises(ValueError, match="'weight' has 5 positions a record here and had 3 before"):
                    optimizer.step()
            else:
                optimizer.step()
            optimizer.zero_grad()
        model = private.to_standard_module()


def test_what_was_chosen_stays_whatever_else_appears():
    """With the sizes that another parameter has later, the budget would ask for another way; the choice was before."""
    steady, plan, fresh = ("steady", product(128, 256, 512)), Plan(public_shapes=True), Plan()
    plan.prepare([steady, ("x", product(16, 512, 32))])
    before = plan.choices["steady"]
    plan.prepare([steady, ("x", product(128, 512, 32))])
    fresh.prepare([steady, ("x", product(128, 512, 32))])
    assert plan.choices["steady"] == before and fresh.choices["steady"].method != before.method


def test_every_way_gives_the_same_step():
    inputs, found = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)), []
    for method in (*METHODS, None):
        torch.manual_seed(0)
        model = decoder()
        forced = {} if method is None else dict.fromkeys(("2.weight", "5.weight", "7.weight"), method)
        inner = torch.optim.SGD(model.parameters(), lr=0.01)
        private, optimizer = privatize(model, inner, expected_batch_size=6, plan=Plan(forced=forced))  # type: ignore[arg-type]
        for _ in range(2):  # the second step keeps gradients within the backward pass
            private(inputs).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-6)


def test_what_is_kept_lets_its_operands_go():
    model, plan = decoder(), Plan(forced={"7.weight": "kept"})
    capture = Capture(model, plan=plan, verify=False)
    for step in range(2):
        model(torch.randn(3, 8)).square().sum().backward()
        held = capture.book.uses[model[7].weight][0]
        assert isinstance(held, Kept) == (step > 0)
        capture.take(list(model.parameters()))


def test_times_are_measured_once_and_kept(tmp_path, monkeypatch):
    plan = plan_for(decoder(), torch.zeros(2, 8), plan=Plan(measure=True))
    choice = plan.choices["2.weight"]
    assert choice.measured and choice.method in choice.measured
    known = json.loads((tmp_path / "timings.json").read_text())
    assert all(value > 0 for value in known.values()) and any("(64, 32, 4, 4)" in key for key in known)
    monkeypatch.setattr(timing, "_time", lambda *_: pytest.fail("timed again"))
    assert plan_for(decoder(), torch.zeros(3, 8), plan=Plan(measure=True)).choices == plan.choices


@pytest.mark.parametrize("content", ["", "[1]", "{broken"])
def test_a_broken_cache_is_made_anew(tmp_path, content: str):
    (tmp_path / "timings.json").write_text(content)
    assert plan_for(nn.Linear(3, 2), torch.zeros(2, 4, 3), plan=Plan(measure=True)).choices["weight"].measured
    assert json.loads((tmp_path / "timings.json").read_text())


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch):
    monkeypatch.setenv("DP2VAE_FAST_CACHE", "/proc/nowhere")
    assert plan_for(nn.Linear(3, 2), torch.zeros(2, 4, 3), plan=Plan(measure=True)).choices["weight"].measured


def test_options_of_make_private():
    def plan_of(**options):
        return privatize(nn.Linear(3, 2), **options)[1].capture.plan

    assert plan_of(max_memory_overhead=1.5).max_memory_overhead == 1.5
    plan = Plan()
    assert plan_of(plan=plan) is plan
    with pytest.raises(ValueError, match="both given"):
        plan_of(plan=plan, max_memory_overhead=2.0)


def test_the_command_prints_the_plan():
    done = CliRunner().invoke(app, ["plan", "--recipe", "digits", "--measure"], env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    assert "body.0" in done.output and "gram" in done.output and "at most 1.25" in done.output


def test_the_command_plans_for_fewer_records_than_a_batch_and_explains_its_columns(tmp_path):
    np.savez(tmp_path / "few.npz", images=np.zeros((6, 8, 8), np.uint8), labels=np.arange(6) % 2)
    done = CliRunner().invoke(app, ["plan", "--data", str(tmp_path / "few.npz")], env={"COLUMNS": "160"})
    assert done.exit_code == 0 and "body.0" in done.output, done.output
    assert all(word in done.output for word in ("T positions of D inputs by P outputs", "gram: ", "direct: ", "kept: "))


class Twice(nn.Module):
    """One layer, two uses: their gradients are one of more positions."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


@pytest.mark.parametrize("positions", [4, 40, 300])
def test_a_batch_is_taken_alike_whether_it_is_the_first(positions: int):
    """A record that was drawn in the batch before must not change by which way this one is taken."""
    torch.manual_seed(0)
    model, x, found = Twice(), torch.randn(5, positions, 16), []
    for before in (0, 1):
        capture = Capture(copy.deepcopy(model))
        parameters = list(capture.module.parameters())
        for inputs in (x[:before], x):
            capture.module(inputs).square().sum().backward()
            gradients = capture.take(parameters)
        found.append([bounded_norms([g]) for g in gradients if g is not None])
    for one, other in zip(*found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_measuring_leaves_the_generators_alone():
    model = decoder()
    state = torch.get_rng_state()
    plan_for(model, torch.zeros(2, 8), plan=Plan(measure=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_way_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="which such gradients do not have"):
        plan_for(nn.Linear(3, 2), torch.zeros(2, 3), plan=Plan(forced={"weight": "direct"}))
    with pytest.raises(ValueError, match="5000 positions, more than 4096"):
        plan_for(nn.Linear(3, 2), torch.zeros(2, 5000, 3), plan=Plan(forced={"weight": "gram"}))
