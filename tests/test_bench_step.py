"""The benchmark of whole steps: its gate finds planted faults, and its race survives variants that do not."""

import json
import os
import subprocess
from dataclasses import replace

import bench_floor
import environment
import gate
import harness
import planted
import pytest
import report_step
import torch
import variants
import workloads
from bench_scaling import largest, points
from contestant import Contestant
from harness import Lost, Process, Settings, measure
from record import Record
from test_captured import Again

from dp2vae_fast.engine import captured
from dp2vae_fast.engine.gradients.gradient import Kept
from dp2vae_fast.engine.gradients.products import LinearProduct
from dp2vae_fast.ops import _op

TINY = "W1-decoder@6"
ONE = Settings(rounds=3, processes=1, fewest=3, patience=0.0)
QUICK = Settings(rounds=2, processes=1, fewest=1, patience=0.0, warm_up=1, limit=60.0)


@pytest.fixture(scope="module")
def truth():
    return gate.oracle(workloads.make(TINY))


def verdict(truth: gate.Truth, variant: variants.Variant) -> gate.Verdict:
    run = variant.build(workloads.make(TINY), truth.bound)
    run.step()
    return gate.judge(variants.released(run), truth.of(variant.private, variant.half), variant.floor)


RIGHT = ["non-private", "non-private-bf16", "ours", "ours-channels-last", "ours-bf16", "opacus-hooks", "opacus-ghost"]


@pytest.mark.parametrize("name", [*RIGHT, "vmap"])
def test_the_gate_lets_right_steps_pass(truth, name):
    assert not verdict(truth, variants.VARIANTS[name]).wrong


@pytest.mark.parametrize("fault", ["CLIPS_TO_MORE", "DROPS_A_BIAS", "DOES_NOT_CLIP"])
def test_the_gate_is_a_gate_under_bfloat16_too(truth, fault):
    assert verdict(truth, replace(getattr(planted, fault), half=True)).wrong


def test_what_is_captured_is_judged_when_it_is_replayed(truth, monkeypatch):
    """With the stand-in for a graph of tests/test_captured.py where there is no GPU."""
    monkeypatch.setattr(captured, "_Graph", Again)
    monkeypatch.setattr(captured, "_why_no_graph", lambda device: "")
    Again.captures = 0
    assert not verdict(truth, variants.VARIANTS["ours-captured"]).wrong and Again.captures == 1


@pytest.mark.filterwarnings("ignore:batches are not captured")
@pytest.mark.parametrize("name", ["ours-captured", "non-private-graph"])
def test_without_a_gpu_nothing_is_captured(truth, name):
    with pytest.raises(NotImplementedError, match="there are no graphs on cpu"):
        verdict(truth, variants.VARIANTS[name])


@pytest.mark.parametrize(
    ("name", "noisy"), [("ours", True), ("opacus-hooks", True), ("opacus-ghost", True), ("ADDS_NO_NOISE", False)]
)
def test_the_gate_sees_whether_there_is_noise(truth, tmp_path, name, noisy):
    truth.save(tmp_path / "truth")
    contestant, name = Contestant(), name if noisy else f"planted:{name}"
    contestant.prepare(TINY, name, truth.bound)
    answer = contestant.check(name, str(tmp_path / "truth"))
    assert answer["wrong"] is not noisy
    assert answer["noise"] == pytest.approx(1.0 if noisy else 0.0, abs=0.05)


def test_a_variant_on_a_backend_stays_on_it():
    seen, problem = [], workloads.make(TINY)

    def losses(*given):
        seen.append(_op._requested)
        return problem.loss.of_records(*given)

    watched = replace(problem, loss=workloads.RecordLoss(losses))
    variants.VARIANTS["ours-reference"].build(watched, 1.0).step()
    assert seen == [("reference",)] and _op._requested is None


@pytest.mark.parametrize("fault", ["CLIPS_TO_MORE", "DROPS_A_BIAS", "DOES_NOT_CLIP"])
def test_the_gate_finds_planted_faults(truth, fault):
    assert verdict(truth, getattr(planted, fault)).wrong


def test_a_race_reports_who_got_through_and_why_the_others_did_not(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", planted.__file__.rpartition("/")[0])
    names = ["planted:RIGHT", "planted:CLIPS_TO_MORE", "planted:REFUSES", "planted:DIES"]
    row = measure(TINY, 1, "tuned", names, QUICK)
    right, wrong, refused, dead = (row["variants"][name] for name in names)
    assert right["status"] == "ok" and right["times"] == 2 and right["ratio"] == 1
    assert 0 < right["p20_ms"] <= right["p50_ms"] <= right["p80_ms"] and right["peak_mib"] > 0
    assert wrong["status"] == "wrong" and "p50_ms" not in wrong and wrong["error"] > 1e-3
    assert refused == {"status": "refused", "why": "NotImplementedError: no rule for this"}
    assert dead["status"] == "failed" and "ended with 3" in dead["why"]


class Actor:
    """Stands in for a process: every step takes as many seconds as it has been asked for steps."""

    def __init__(self, *_):
        self.process, self.steps, self.killed = self, 0, False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def kill(self):
        self.killed = True

    def processor_time(self):
        return 0.0

    def ask(self, do, **request):
        assert not self.killed
        self.steps += do == "step"
        answers = {
            "find_truth": {"max_grad_norm": 1.0, "batch": 6},
            "check": {"wrong": False},
            "step": {"seconds": self.steps},
        }
        return answers.get(do, {"peak_mib": 1.0})


@pytest.mark.parametrize(("free", "heats"), [(1.0, 1), (0.1, 2)])
def test_what_does_not_fit_together_races_in_heats(monkeypatch, free, heats):
    monkeypatch.setattr(harness, "Process", Actor)
    monkeypatch.setattr(harness, "free_memory", lambda device: free)
    row = measure(TINY, 1, "default", ["base", "one", "two"], ONE)
    assert row["heats"] == heats
    assert [result["times"] for result in row["variants"].values()] == [3, 3, 3]
    expected = [1.0, 1.0, 1.0 if heats == 1 else 3 / 6]  # the base has taken three steps more by then
    assert [result["ratio"] for result in row["variants"].values()] == pytest.approx(expected)


def test_a_ratio_is_of_steps_beside_each_other(monkeypatch):
    weather = [1.0, 1.0, 1.0, 5.0, 6.0, 7.0]  # a neighbour comes
    base, slow = ("base", 0), ("slow", 0)
    racers, seconds = {base: Actor(), slow: Actor()}, {base: iter(weather), slow: iter(weather[::2])}
    for (name, actor), speed in zip(racers.items(), (1.0, 1.5), strict=True):
        monkeypatch.setattr(actor, "ask", lambda do, n=name, s=speed, **_: {"seconds": s * next(seconds[n])})
    results = {base: {"status": "ok", "seconds": 0.1}, slow: {"status": "ok", "seconds": 2.0}}
    harness.race(racers, results, "base", Settings(rounds=6, budget=12.0, fewest=3, patience=0.0))
    found = [harness.pooled([results[racer]]) for racer in (base, slow)]
    assert [result["times"] for result in found] == [6, 3]
    assert [result["ratio"] for result in found] == pytest.approx([1.0, 1.5])


def test_processes_of_a_variant_are_taken_together(monkeypatch):
    """Three of what is about as fast as the first, in one of which every step takes longer, and the memory more."""

    class Actor2(Actor):
        started = 0

        def __init__(self, *_):
            super().__init__()
            Actor2.started += 1
            self.variant, self.slower = "", 1 + (Actor2.started > 4)  # those after the oracle and three variants

        def ask(self, do, **request):
            self.variant = request.get("variant", self.variant)
            speed = {"base": 1.0, "near": 1.2, "far": 5.0}.get(self.variant, 0.0)
            return {
                "find_truth": {"max_grad_norm": 1.0, "batch": 64},
                "check": {"wrong": False, "error": 0.1 * self.slower},
                "step": {"seconds": speed * (self.slower if self.variant == "near" else 1)},
            }.get(do, {"peak_mib": 100.0 * self.slower, "process_mib": 1.0})

    monkeypatch.setattr(harness, "Process", Actor2)
    monkeypatch.setattr(harness, "free_memory", lambda device: 1.0)
    row = measure(TINY, 1, "default", ["base", "near", "far"], Settings(rounds=4, patience=0.0, budget=1e3))
    base, near, far = row["variants"].values()
    assert [r["processes"] for r in (base, near, far)] == [3, 3, 1] and Actor2.started == 1 + 3 + 2 + 2
    assert [r["times"] for r in (base, near, far)] == [12, 12, 4]
    assert near["ratio"] == pytest.approx(2.4) and near["p20_ms"] == pytest.approx(1200)
    assert near["peak_mib"] == 200 and near["error"] == pytest.approx(0.2) and far["ratio"] == pytest.approx(5.0)


def test_a_variant_of_which_one_process_fails_has_failed():
    fine = {"status": "ok", "seconds": 1.0, "steps": {0: 1.0, 1: 3.0}, "ratios": {0: 1.0}}
    assert harness.pooled([fine])["p50_ms"] == 2000 and "steps" not in harness.pooled([fine])
    lost = {**fine, "status": "failed", "why": "no answer to step in 1 s"}
    assert harness.pooled([fine, lost]) == {"status": "failed", "why": "no answer to step in 1 s"}


def test_a_variant_that_hangs_is_given_up_and_ended(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", planted.__file__.rpartition("/")[0])
    with Process(1, "default", QUICK) as process:
        process.ask("prepare", workload=TINY, variant="planted:HANGS", bound=1.0)
        process.limit = 0.3
        with pytest.raises(Lost, match="no answer to step"):
            process.ask("step")
    assert process.process.returncode is not None


def test_a_record_goes_on_where_it_was_stopped(tmp_path):
    file = tmp_path / "record.json"
    Record(file, ("workload",), rounds=3).add({"workload": "W1", "variants": {}})
    again = Record(file, ("workload",), rounds=3)
    assert {"workload": "W1"} in again and {"workload": "W2"} not in again
    with pytest.raises(SystemExit, match="otherwise"):
        Record(file, ("workload",), rounds=4)
    assert Record(file, ("workload",), rounds=4, again=True).content["rows"] == []
    assert json.loads(file.read_text())["rows"]  # until a new row is there


def test_records_that_grow_are_of_the_same_commit(tmp_path):
    record, code = tmp_path / "benchmarks" / "results" / "step.json", tmp_path / "code.py"
    record.parent.mkdir(parents=True)
    for file in (record, code):
        file.write_text("before")
    me = ["-c", "user.name=me", "-c", "user.email=me@here"]
    for arguments in (["init", "-q"], ["add", "."], [*me, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True)
    clean = environment.commit(tmp_path / "benchmarks")
    record.write_text("after")
    assert environment.commit(tmp_path / "benchmarks") == clean
    code.write_text("after")
    assert environment.commit(tmp_path / "benchmarks") == f"{clean} dirty"


def test_a_variant_that_is_too_slow_is_left_out_of_larger_points():
    asked = []

    def row(workload, names):
        asked.append(list(names))
        size = int(workload)
        times = {"ours": 1.0, "opacus-ghost": 100.0 * size, "vmap": 1.0}
        results = {name: {"status": "ok", "p50_ms": times[name]} for name in names}
        if size == 3:
            results["vmap"] = {"status": "failed", "why": "out of memory"}
        return {"variants": results}

    found = points({n: str(n) for n in range(1, 5)}, ["ours", "opacus-ghost", "vmap"], 0.15, row)
    assert asked == [["ours", "opacus-ghost", "vmap"]] * 2 + [["ours", "vmap"], ["ours"]]
    assert found[3]["variants"]["opacus-ghost"] == {"status": "skipped", "why": "0.2 s a step at 2"}
    assert found[3]["variants"]["vmap"]["status"] == "failed" and found[3]["variants"]["ours"]["status"] == "ok"


@pytest.mark.parametrize("most", [0, 1, 7, 100, 12_345])
def test_the_largest_batch_is_found_within_five_percent(most):
    asked = []

    def peak(batch: int) -> float:
        asked.append(batch)
        return 300.0 + 2.0 * batch

    found = largest(peak, 300.0 + 2.0 * most)
    assert found <= most <= max(found + 1, 1.05 * found + 1) and len(asked) < 12


def test_the_floor_of_norms_is_the_cheapest_way(monkeypatch):
    """At a rate of one multiply-add and of one byte a second."""
    monkeypatch.setattr(bench_floor, "product_rate", lambda: 1.0)
    monkeypatch.setattr(bench_floor, "copying", lambda count: count)
    one, few, more, many = (LinearProduct(torch.zeros(2, t, 3), torch.zeros(2, t, 5)) for t in (1, 2, 4, 500))
    assert bench_floor.least(one) == 2 * 4 * (3 + 5)  # its operands are read
    assert bench_floor.least(few) == 2 * 2**2 * (3 + 5) / 2  # half of both Gram matrices
    assert bench_floor.least(more) == 2 * 4 * 15  # formed
    assert bench_floor.least(many) == 2 * 2 * 4 * 15  # kept
    assert bench_floor.least(Kept(torch.zeros(2, 3))) == 0


def test_a_floor_is_above_the_plain_step():
    before = dict(os.environ)
    row = bench_floor.in_a_process("W3-decoder@4", 1, "tuned", rounds=3)
    assert dict(os.environ) == before  # its allocator's settings are that process's alone
    assert row["parameters"] == sum(p.numel() for p in workloads.make("W3-decoder@4").model.parameters())
    assert row["norms_ms"] > 0 and row["noise_ms"] > 0 and row["ratio"] > 1
    table = report_step.floors({"rows": [row], "rounds": 3, "environment": environment.environment()})
    assert "| 1 thread, tuned malloc |" in table and f"| W3-decoder@4 | {row['ratio']:.2f} (" in table


def test_tables_say_where_ours_loses():
    def result(ratio: float) -> dict:
        return {"status": "ok", "ratio": ratio}

    row = {"variants": {"ours": result(2.0), "vmap": result(1.0), "opacus-ghost": result(3.0)}}
    titles = variants.titles(list(row["variants"]))
    assert report_step.against_rivals(row, titles) == "**0.50 (vmap(grad)), a loss**"
    row["variants"]["vmap"] = {"status": "wrong", "why": ""}
    assert report_step.against_rivals(row, titles) == "1.50 (Opacus ghost)"


def test_a_table_says_which_rivals_were_measured(tmp_path):
    record = {"environment": environment.environment(), "fastdp": "1a2b3c4"}
    assert report_step.made(record).endswith(f"opacus {record['environment']['versions']['opacus']}, FastDP 1a2b3c4.")
    assert "FastDP" not in report_step.made(record | {"fastdp": ""})
    assert environment.commit("") == "" and environment.commit(tmp_path) == "unknown"
