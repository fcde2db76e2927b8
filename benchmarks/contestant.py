"""A process of the race: sets one variant up, passes the gate, and then steps when it is told to.

Requests come in on standard input, answers go out on the descriptor that standard output was; both are lines of JSON.
What the variant prints goes to standard error.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gate
import memory
import torch
import variants
import workloads
from environment import multiply_float32
from gate import Truth


class Contestant:
    """The requests: each is a method, with the request's other entries as arguments."""

    def __init__(self, device: str = "cpu", tf32: bool = False) -> None:
        self.device, self.tf32 = device, tf32 and device == "cuda"
        self.run: variants.Run
        self.before = 0.0  # MiB after set-up, before the first step, without code

    def find_truth(self, workload: str, path: str) -> dict[str, Any]:
        """Write the oracle's sums to ``path``."""
        problem = workloads.make(workload).to(self.device)
        truth = gate.oracle(problem)
        truth.save(Path(path))
        parameters = sum(p.numel() for p in problem.model.parameters())
        own = truth.sums[True].own_error
        return {"batch": problem.batch, "parameters": parameters, "max_grad_norm": truth.bound, "own_error": own}

    def prepare(self, workload: str, variant: str, bound: float) -> dict[str, Any]:
        """Build; memory from here on is what steps take."""
        problem, chosen = workloads.make(workload).to(self.device), find(variant)
        _load_libraries(problem)
        self.run = chosen.build(problem, bound)
        memory.give_back()
        self.before = memory.resident(self.device) - memory.code(self.device)
        return {}

    def check(self, variant: str, path: str) -> dict[str, Any]:
        """Take the first step, without noise, and judge it; from then on there is noise, of the size asked for."""
        self.run.step()
        chosen = find(variant)
        found, truth = variants.released(self.run), Truth.load(Path(path))
        floor = max(chosen.floor, gate.HALF) if self.tf32 else chosen.floor
        verdict = gate.judge(found, truth.of(chosen.private, chosen.half), floor)
        self.run.set_noise(1.0)
        answer = {**vars(verdict), "wrong": verdict.wrong}
        if chosen.private and not verdict.wrong:
            self.run.step()
            answer["noise"] = variants.noise_level(self.run, found) / truth.bound
            answer["wrong"] = not 0.9 <= answer["noise"] <= 1.2
        return answer

    def step(self, times: int = 1) -> dict[str, Any]:
        """Seconds of a single step, the last of ``times``."""
        seconds = 0.0
        for _ in range(times):
            self._wait()
            start = time.perf_counter()
            self.run.step()
            self._wait()
            seconds = time.perf_counter() - start
        return {"seconds": seconds}

    def _wait(self) -> None:
        """Until the GPU has done what it was told to."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def measure_memory(self) -> dict[str, Any]:
        """Peak MiB of a step above set-up, code that was loaded since left out; and of the whole process."""
        if self.run.in_graph_mib is not None:
            peak, kind = self.before + self.run.in_graph_mib, "of the step that was captured"
        else:
            peak, kind = memory.peak_of(self.run.step, self.device)
        return {
            "peak_mib": peak - memory.code(self.device) - self.before,
            "process_mib": peak,
            "peak": kind,
        }


def find(variant: str) -> variants.Variant:
    """The variant of that name; ``module:NAME`` is one from elsewhere, such as a test's."""
    module, _, name = variant.rpartition(":")
    return getattr(__import__(module), name) if module else variants.VARIANTS[variant]


def _load_libraries(problem: workloads.Problem) -> None:
    """One small ordinary backward, so that code that is loaded on first use is not counted as a step's memory."""
    model = copy.deepcopy(problem.model)
    output = model(*(t[:2] for t in problem.inputs))
    problem.loss.of_records(output, *(t[:2] for t in problem.targets)).sum().backward()


def set_products(tf32: bool, cudnn_benchmark: bool) -> None:
    """How a GPU multiplies float32, and whether cuDNN tries its algorithms out: the same for every variant."""
    multiply_float32(tf32)
    torch.backends.cudnn.benchmark = cudnn_benchmark


def first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip() if lines else ''}"


def main(threads: int, device: str, tf32: bool, cudnn_benchmark: bool) -> None:
    torch.set_num_threads(threads)
    set_products(tf32, cudnn_benchmark)
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    contestant = Contestant(device, tf32)
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        method: Callable[..., dict[str, Any]] = getattr(contestant, request.pop("do"))
        try:
            answer = method(**request)
        except Exception as error:
            answer = {"refused": first_line(error)}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
