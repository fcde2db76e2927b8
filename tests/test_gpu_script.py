"""What is kept ready for a GPU machine still starts: the script, its plan, the tables of block sizes and of records."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
SCRIPT = BENCHMARKS / "gpu.sh"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


def script(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(["bash", SCRIPT, *arguments], capture_output=True, text=True, env=environment, timeout=120)


def test_the_script_is_bash():
    assert subprocess.run(["bash", "-n", SCRIPT]).returncode == 0
    assert script("--nonsense").returncode == 2


def test_everything_that_it_would_run_is_there():
    done = script("--list")
    assert done.returncode == 0, done.stderr
    files = [word for word in done.stdout.split() if word.endswith(".py")]
    assert len(files) > 8 and all((ROOT / file).exists() for file in files), files
    for word in ("environment", "build", "tests", "tests-triton", "step", "ops", "tune", "sanitizer", "capacity"):
        assert any(line.startswith(word) for line in done.stdout.splitlines()), word


def test_without_time_every_step_is_skipped_and_says_why(tmp_path):
    done = script("--dry", "--minutes", "0", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert {"environment", "tests", "step", "ops", "tune"} <= {step["step"] for step in steps}
    assert all(step["status"] == "skipped" and step["why"] for step in steps)


def test_a_step_that_fails_is_said_and_stops_no_other(tmp_path):
    """With a Python that reports, and refuses everything else."""
    fake = tmp_path / "python"
    fake.write_text(
        f'#!/bin/sh\ncase "$2" in *json.dumps*) exec {sys.executable} "$@" ;; esac\necho refused to run >&2; exit 3\n'
    )
    fake.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(fake)}
    command = ["bash", SCRIPT, "--dry", "--minutes", "5", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    steps = {s["step"]: s for s in map(json.loads, (tmp_path / "steps.jsonl").read_text().splitlines())}
    assert done.returncode == 1
    for name in ("environment", "tests", "step", "ops", "tune"):
        assert steps[name]["status"] == "failed" and steps[name]["why"] == "refused to run", steps[name]
        assert (tmp_path / steps[name]["file"]).exists()


def test_tables_of_records_that_lie_elsewhere(tmp_path):
    shutil.copy(BENCHMARKS / "results" / "step_cpu.json", tmp_path)
    shutil.copy(BENCHMARKS / "results" / "ops_cpu.json", tmp_path)
    command = [sys.executable, BENCHMARKS / "report.py", "--from", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "## Time, step_cpu.json" in done.stdout and "## Ops, ops_cpu.json" in done.stdout
    assert "| ours |" in done.stdout and "`conv_norm_sq`" in done.stdout


def test_measured_block_sizes_are_read_as_they_were_written(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from dp2vae_fast.kernels import blocks

    rows = {
        "noise": [[None, {"BLOCK": 256, "num_warps": 8}]],
        "channels": [[16, {"BLOCK_C": 4}], [None, {"BLOCK_C": 1}]],
    }
    file = tmp_path / "sm_90.json"
    file.write_text(json.dumps({"environment": {}, "jobs": [], "rows": rows}))
    monkeypatch.setitem(blocks.TABLE, "sm_90", blocks.read(file))
    monkeypatch.setattr(blocks, "architecture", lambda like: "sm_90")
    x = torch.empty(0)
    assert blocks.choose("noise", x, 10**9) == {"BLOCK": 256, "num_warps": 8}
    assert blocks.choose("channels", x, 16) == {"BLOCK_C": 4} and blocks.choose("channels", x, 17) == {"BLOCK_C": 1}
    assert blocks.choose("factors", x) == blocks._DEFAULT["factors"][0][1]


def test_block_sizes_of_one_gpu_are_not_taken_for_another(monkeypatch):
    """An A100 (8.0) has 164 KiB of shared memory a multiprocessor, others of its generation (8.6, 8.9) have 100."""
    pytest.importorskip("triton")
    from dp2vae_fast.kernels import blocks

    for capability, name in (((8, 0), "sm_80"), ((8, 6), "sm_86"), ((9, 0), "sm_90"), ((10, 0), "sm_100")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert blocks.architecture(SimpleNamespace(is_cuda=True, device="cuda")) == name


@pytest.mark.parametrize(("fast", "chosen"), [(0.5, 256), (0.98, 128)])
def test_a_candidate_must_run_be_right_and_be_faster(monkeypatch, fast: float, chosen: int):
    """Clip factors whose block of 32 does not compile, of 64 is wrong, and of 256 takes a part of the time of 128."""
    pytest.importorskip("triton")
    import tune
    from bench_ops import Case
    from dp2vae_fast.kernels import blocks

    def block() -> int:
        return blocks.choose("factors", torch.empty(0))["BLOCK"]

    def op(*_, backend: str) -> int:
        if block() == 32:
            raise RuntimeError("out of resource: shared memory")
        return block()

    monkeypatch.setattr(tune, "OPS", {"some_op": op})
    monkeypatch.setattr(tune, "median", lambda *_, **__: fast if block() == 256 else 1.0)
    monkeypatch.setattr(blocks, "architecture", lambda like: "dry")
    job = tune.Job("factors", 0, Case("some_op", "", lambda: [torch.ones(2)], lambda a, result: result != 64))
    found = tune.tune(job, "dry", "cpu", 100, 60.0)
    assert found["options"]["BLOCK"] == chosen
    assert any("'BLOCK': 32" in why and "shared memory" in why for why in found["skipped"])
    assert any("'BLOCK': 64" in why and "wrong" in why for why in found["skipped"])
    assert not any("'BLOCK': 128" in why or "'BLOCK': 256" in why for why in found["skipped"])
    assert "factors" not in blocks.TABLE.get("dry", {})
    assert {job.kernel for job in tune.jobs(dry=True)} == set(blocks._DEFAULT)
