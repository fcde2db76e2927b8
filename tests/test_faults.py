"""Known faults of DP-SGD engines: every scenario of benchmarks/faults.py passes here, and every layer takes the batches
that Poisson sampling and broken files make."""

from __future__ import annotations

import pytest
import torch
from cases import LAYER_CASES, LayerCase
from fault_harness import (
    Outcome,
    RecordLoss,
    Run,
    Scenario,
    clipped_sum,
    distance_gone,
    judged,
    make_private,
    one_step,
    outcome,
    randn,
    record_gradients,
)
from faults import SCENARIOS
from torch import Tensor, nn

D = torch.float64


def marked(scenario: Scenario):
    marks = [pytest.mark.xfail(strict=True, reason=scenario.fault)] if scenario.fault else []
    return pytest.param(scenario, id=scenario.name, marks=marks)


@pytest.mark.parametrize("scenario", [marked(s) for s in SCENARIOS])
def test_a_known_fault_is_none_here(scenario: Scenario):
    found = outcome(scenario, "ours")
    assert found.verdict == scenario.ours, found  # "refused" says too that no parameter had changed


def test_scenarios_have_names_of_their_own_and_no_verdict_but_the_good_ones():
    assert len({s.name for s in SCENARIOS}) == len(SCENARIOS)
    assert {s.ours for s in SCENARIOS} <= {"correct", "refused", "not possible"}


# The judge itself ----------------------------------------------------------------------------------------------------


def linear() -> nn.Module:
    return nn.Linear(4, 3)


def verdict_on(loop) -> Outcome:
    return outcome(Scenario("", "", judged(linear, randn(5, 4), loop=loop)), "ours")


def test_the_judge_sees_a_wrong_sum():
    def twice(run: Run, batch: Tensor) -> None:
        for _ in range(2):
            one_step(run, batch)

    def one_record_lost(run: Run, batch: Tensor) -> None:
        one_step(run, batch[:4])

    assert verdict_on(one_step).verdict == "correct"
    assert verdict_on(twice).verdict == verdict_on(one_record_lost).verdict == "wrong"
    assert "C" in verdict_on(twice).detail


def test_the_judge_tells_a_refusal_from_a_crash():
    def step_then_accumulate(run: Run, batch: Tensor) -> None:
        one_step(run, batch)
        run.module(batch.flatten())

    def crash(run: Run, batch: Tensor) -> None:
        raise ValueError("not from an engine")

    def refuse(run: Run, batch: Tensor) -> None:
        run.module.eval()
        one_step(run, batch)

    assert verdict_on(refuse).verdict == "refused"
    assert verdict_on(crash).verdict == "crashes"
    late = verdict_on(step_then_accumulate)
    assert late.verdict == "crashes" and "had changed" in late.detail


# Every layer ---------------------------------------------------------------------------------------------------------


def check(case: LayerCase, records: Tensor, want: Tensor, bound: float, train) -> None:
    model = built(case)
    moved = distance_gone(model, lambda: train(make_private("ours", model, records, bound=bound)))
    torch.testing.assert_close(moved, want, rtol=1e-9, atol=1e-12)


def built(case: LayerCase) -> nn.Module:
    torch.manual_seed(1)
    return case.make().to(D)


def oracle(case: LayerCase, records: Tensor) -> tuple[list[Tensor], float]:
    gradients = record_gradients(built(case), records, lambda model, record: RecordLoss()(model(record)))
    norms = sorted(float(g.norm()) for g in gradients)
    return gradients, norms[len(norms) // 2]


@pytest.mark.parametrize("case", LAYER_CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("first", [0, 1], ids=["after an empty batch", "after one record"])
def test_steps_on_few_records_and_then_on_many(case: LayerCase, first: int):
    """The first step moves nothing, for want of records or of a learning rate; the second is as if it had not been."""
    records = case.inputs(5, D)
    gradients, bound = oracle(case, records)
    if first == 0:
        try:
            built(case)(records[:0])
        except (RuntimeError, ValueError, IndexError) as error:
            pytest.skip(f"the framework itself refuses an empty batch: {error}")

    def train(run: Run) -> None:
        group = run.optimizer.param_groups[0]
        for lr, batch in ((0.0 if first else 1.0, records[:first]), (1.0, records)):
            group["lr"] = lr
            one_step(run, batch)

    check(case, records, clipped_sum(gradients, bound), bound, train)


@pytest.mark.parametrize("case", LAYER_CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("rank", [0, -1], ids=["clipped", "not clipped"])
def test_one_record_alone(case: LayerCase, rank: int):
    records = case.inputs(5, D)
    gradients, bound = oracle(case, records)
    i = sorted(range(5), key=lambda n: -float(gradients[n].norm()))[rank]
    want = clipped_sum([gradients[i]], bound)
    check(case, records, want, bound, lambda run: one_step(run, records[i : i + 1]))


@pytest.mark.parametrize("case", LAYER_CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize("place", ["input", "loss"])
def test_one_record_that_is_not_finite_among_others(case: LayerCase, value: float, place: str):
    if place == "input" and case.entries:
        pytest.skip("indices are finite")
    records, broken = case.inputs(5, D), 3
    gradients, bound = oracle(case, records)
    weights = torch.ones(5, dtype=D)
    if place == "input":
        records[broken].view(-1)[0] = value
        gradients, _ = oracle(case, records)  # nn.PReLU has none where its input is positive, however large
    else:
        weights[broken] = value
        gradients[broken].zero_()
    want = clipped_sum(gradients, bound)

    def train(run: Run) -> None:
        (weights * RecordLoss("none")(run.module(records))).sum().backward()
        run.optimizer.step()

    check(case, records, want, bound, train)
