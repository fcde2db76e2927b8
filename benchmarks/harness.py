"""Races of whole training steps: live fresh processes of each variant, few steps in turn, the order rotating.

A row is one workload, number of threads and allocator. In it each variant is set up in a process of its own, passes
the gate (:mod:`gate`) or is not timed, and warms up; then all step in turn. A ratio is the median over rounds of a
step's time to that of the first variant's step in the same round: a neighbour that slows the machine for a while
slows both. Where a process happens to have its memory decides how many of its pages a step faults in, some tenth of
its time: variants about as fast as the first have several processes, whose times are taken together. Rounds during
which other processes used more than a tenth of a core are repeated while patience lasts; the row says how much it
was. A slow variant sits some rounds out, to keep within its budget of time. Peak memory is taken afterwards, in steps
that are not timed, the median of processes. What refuses, fails the gate, dies or hangs is reported with one line.
"""

from __future__ import annotations

import json
import math
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from timing import used_elsewhere

QUIET = 0.1  # cores that others may use
BLOCK_S = 1.0  # rounds are judged in blocks of so many seconds at least, as the system counts in hundredths
FIRST_RECORDS = 32  # an engine may check its first gradients, ours those of so many records: no part of a step's time
CLOSE = 1.5  # a step of so many of the first variant's is worth several processes
ROOM = 0.45  # of the machine's memory must be free for another variant to be set up beside those that are
LARGE = str(2**32)
MALLOC = {"default": {}, "tuned": {"MALLOC_MMAP_THRESHOLD_": LARGE, "MALLOC_TRIM_THRESHOLD_": LARGE}}


@dataclass(frozen=True)
class Settings:
    """How a row is measured. Times in seconds.

    Args:
        rounds: steps of each process that are timed.
        processes: of each variant whose step is no longer than ``CLOSE`` of the first one's.
        budget: what one process may take of a row's steps; it still has ``fewest`` that are timed.
        patience: how long noisy rounds are repeated.
        limit: the longest that a variant may take for one answer.
        warm_up: steps before the timed ones, at least; more where batches are small (``FIRST_RECORDS``).
        fastdp: a checkout of FastDP.
        device: "cpu" or "cuda".
        in_a_row: steps that a process takes in its turn, of which the last is timed: first it makes the caches its own
            again, or the GPU.
        tf32: whether a GPU may multiply float32 as TF32, by everybody.
        cudnn_benchmark: whether cuDNN tries its algorithms out.
    """

    rounds: int = 9
    processes: int = 3
    budget: float = 15.0
    fewest: int = 5
    patience: float = 120.0
    limit: float = 300.0
    warm_up: int = 2
    fastdp: str = ""
    device: str = "cpu"
    in_a_row: int = 2
    tf32: bool = False
    cudnn_benchmark: bool = False


def surroundings(threads: int, malloc: str) -> dict[str, str]:
    """The environment of a process with so many threads and this allocator."""
    count = str(threads)
    others = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    return {**others, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, **MALLOC[malloc]}


class Lost(Exception):
    """A process that died, or did not answer in time."""


class Process:
    """A contestant's process; ends with the ``with`` block, whatever happened."""

    def __init__(self, threads: int, malloc: str, settings: Settings) -> None:
        environment = surroundings(threads, malloc)
        here = Path(__file__).parent
        environment["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parent), environment.get("PYTHONPATH", "")])
        environment["DP2VAE_BENCH_FASTDP"] = settings.fastdp
        self.limit = settings.limit
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [sys.executable, str(here / "contestant.py"), json.dumps(self._arguments(threads, settings))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=environment,
            start_new_session=True,
        )

    @staticmethod
    def _arguments(threads: int, settings: Settings) -> dict[str, Any]:
        return {"threads": threads, **{k: getattr(settings, k) for k in ("device", "tf32", "cudnn_benchmark")}}

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """One request and its answer.

        Raises:
            Lost: none came in time.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **request}).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise Lost(self._last_words(do)) from None
        if not select.select([self.process.stdout], [], [], self.limit)[0]:
            raise Lost(f"no answer to {do} in {self.limit:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            raise Lost(self._last_words(do))
        return json.loads(line)

    def processor_time(self) -> float:
        """Core-seconds it has used."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _last_words(self, do: str) -> str:
        code = self.process.wait(timeout=10)
        self.errors.seek(0)
        lines = [line for line in self.errors.read().decode(errors="replace").splitlines() if line.strip()]
        return f"the process ended with {code} during {do}" + (f": {lines[-1].strip()}" if lines else "")


WHILE_RACING = ("seconds", "steps", "ratios")  # what a process's result holds beside what is recorded
Racer = tuple[str, int]
"""A variant's name and the number of its process, from 0."""


def measure(workload: str, threads: int, malloc: str, names: list[str], settings: Settings) -> dict[str, Any]:
    """One row: what every variant made of the workload; ``ratio`` is to the first one's step in the same round.

    Where their memory together is too much for the machine they race in heats, the first one in each.
    """
    row: dict[str, Any] = {"workload": workload, "threads": threads, "malloc": malloc}
    with ExitStack() as stack:

        def start() -> Process:
            return stack.enter_context(Process(threads, malloc, settings))

        path = str(Path(stack.enter_context(tempfile.TemporaryDirectory())) / "truth")
        oracle, *processes = (start() for _ in range(1 + len(names)))
        row |= oracle.ask("find_truth", workload=workload, path=path)
        oracle.process.kill()
        if "refused" in row:
            raise ValueError(row["refused"])
        racers: dict[Racer, Process] = {}
        results: dict[Racer, dict[str, Any]] = {}
        busy: list[float] = []

        def enter(name: str, process: Process, number: int = 0) -> None:
            done = results[name, number] = set_up(process, workload, name, row, path, settings)
            if done["status"] == "ok":
                racers[name, number] = process
            else:
                process.process.kill()

        for name, process in zip(names, processes, strict=True):
            enter(name, process)
            if _is_close(results[name, 0], results[names[0], 0]):
                for number in range(1, settings.processes):
                    enter(name, start(), number)
            others = [racer for racer in racers if racer[0] != names[0]]
            if name == names[-1] or (free_memory(settings.device) < ROOM and others):
                busy.append(heat(racers, results, names[0], settings))
                for racer in others:
                    racers.pop(racer).process.kill()
    return {
        **row,
        "rounds": settings.rounds,
        "cores_used_elsewhere": max(busy),
        "heats": len(busy),
        "variants": {name: pooled([r for (own, _), r in results.items() if own == name]) for name in names},
    }


def _is_close(result: dict[str, Any], first: dict[str, Any]) -> bool:
    both = result["status"] == first["status"] == "ok"
    return both and result["seconds"] <= CLOSE * first["seconds"]


def pooled(results: list[dict[str, Any]]) -> dict[str, Any]:
    """What a variant's processes found, as one: the first that did not get through, or all their times together, the
    median of their memory, and the verdict of the gate on the worst of them."""
    lost = next((r for r in results if r["status"] != "ok"), None)
    shown = lost or max(results, key=lambda r: r.get("error", 0.0))
    found = {k: v for k, v in shown.items() if k not in WHILE_RACING}
    if lost:
        return found
    found |= {k: statistics.median(r[k] for r in results) for k in ("peak_mib", "process_mib") if k in found}
    steps, ratios = ([x for r in results for x in r[what].values()] for what in ("steps", "ratios"))
    found |= {"processes": len(results), "times": len(steps), **quantiles(steps)}
    return found | ({"ratio": statistics.median(ratios)} if ratios else {})


def heat(racers: dict[Racer, Process], results: dict[Racer, dict[str, Any]], base: str, settings: Settings) -> float:
    """A race of those that are set up, and their memory; returns the cores that others used meanwhile."""
    busy = race(racers, results, base, settings)
    for racer, process in racers.items():
        if results[racer]["status"] == "ok":
            results[racer] |= _answer(process, "measure_memory")
    return busy


def free_memory(device: str) -> float:
    """Part of the memory that is free, the GPU's or the machine's; all of it where the system does not say."""
    if device == "cuda":
        free, all_of_it = torch.cuda.mem_get_info()
        return free / all_of_it
    file = Path("/proc/meminfo")
    if not file.exists():
        return 1.0
    sizes = {line.split(":")[0]: int(line.split()[1]) for line in file.read_text().splitlines()}
    return sizes["MemAvailable"] / sizes["MemTotal"]


def set_up(
    process: Process, workload: str, variant: str, row: dict[str, Any], path: str, settings: Settings
) -> dict[str, Any]:
    """Build, gate, warm-up; the result so far, with how long a step takes."""
    done = _answer(process, "prepare", workload=workload, variant=variant, bound=row["max_grad_norm"])
    if done["status"] != "ok":
        return done
    if (done := _answer(process, "check", variant=variant, path=path))["status"] != "ok":
        return done
    if done.pop("wrong"):
        why = f"off by {done['error']:.2g} of the sum, {done['worst']} most"
        if "noise" in done:
            why = f"noise of {done['noise']:.2g} times the bound instead of 1"
        return {**done, "status": "wrong", "why": why}
    return done | _answer(process, "step", times=max(settings.warm_up, math.ceil(FIRST_RECORDS / row["batch"])))


def _answer(process: Process, do: str, **request: Any) -> dict[str, Any]:
    try:
        answer = process.ask(do, **request)
    except Lost as lost:
        return {"status": "failed", "why": str(lost)}
    if "refused" in answer:
        return {"status": "refused", "why": answer["refused"]}
    return {"status": "ok", **answer}


def race(racers: dict[Racer, Process], results: dict[Racer, dict[str, Any]], base: str, settings: Settings) -> float:
    """Time steps in turn; adds to ``results`` each round's seconds and ratio to the process of ``base`` with the same
    number, or its first. Returns the cores that others used meanwhile."""
    every = {racer: _every(results[racer]["seconds"], settings) for racer in racers}
    seconds: dict[Racer, dict[int, float]] = {racer: {} for racer in racers}
    order, turn, give_up, used, lasted = list(racers), 0, time.monotonic() + settings.patience, 0.0, 0.0
    while turn < settings.rounds and order:
        start, before, first = time.monotonic(), _used_by_others(racers), turn
        block: dict[Racer, dict[int, float]] = {racer: {} for racer in racers}
        while turn < settings.rounds and (turn == first or time.monotonic() - start < BLOCK_S):
            order = order[1:] + order[:1]
            for racer in [racer for racer in order if turn % every[racer] == 0]:
                answer = _answer(racers[racer], "step", times=settings.in_a_row)
                if answer["status"] == "ok":
                    block[racer][turn] = answer["seconds"]
                else:
                    results[racer] |= answer
                    order.remove(racer)
            turn += 1
        length = time.monotonic() - start
        others = max(0.0, _used_by_others(racers) - before)
        if others >= QUIET * length and time.monotonic() < give_up:
            turn = first  # again
            continue
        used, lasted = used + others, lasted + length
        for racer, times in block.items():
            seconds[racer] |= times
    for racer, times in seconds.items():
        beside = seconds.get((base, racer[1])) or seconds.get((base, 0), {})
        ratios = {turn: time / beside[turn] for turn, time in times.items() if turn in beside}
        results[racer] |= {"steps": times, "ratios": ratios}
    return round(used / lasted, 2) if lasted else 0.0


def _every(step: float, settings: Settings) -> int:
    """A process whose steps take so long takes part in every so-many-th round."""
    wanted = int(settings.budget / max(step * settings.in_a_row, 1e-9))
    times = min(settings.rounds, max(settings.fewest, wanted))
    return max(1, settings.rounds // times)


def _used_by_others(racers: dict[Racer, Process]) -> float:
    return used_elsewhere() - sum(process.processor_time() for process in racers.values())


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Milliseconds that a fifth, half and four fifths of the steps took at most."""
    tenths = statistics.quantiles(seconds * 2 if len(seconds) < 2 else seconds, n=10, method="inclusive")
    return {f"p{p}_ms": 1e3 * tenths[p // 10 - 1] for p in (20, 50, 80)}
