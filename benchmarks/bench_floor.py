"""How little a private step could cost: what it must do more than the plain one, at the rates of this machine.

    python benchmarks/bench_floor.py [--workloads W1-decoder ...] [--threads 1 2] [--malloc default tuned]
        [--rounds 15] [--out FILE] [--again]

A private step needs, beyond a plain one's forward, backward and Adam:

* norms: of each weight the cheapest exact way that is known, its multiply-adds at the rate of a matrix product (of Gram
  matrices one half), or its bytes at the rate of a copy;
* noise: one normal a parameter. It is the time of noise and Adam in one pass, less that of ``torch``'s fused Adam.

Nothing else is counted: no memory, no Python. Sums over records are taken to cost what the plain step's weight
gradients cost: a private step falls below this floor where its own are faster. Everything of a row (workload, threads,
allocator) is timed in turn, in a fresh process, and a floor is the median over rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import variants
import workloads
from bench_noise import one_pass
from harness import MALLOC, surroundings
from record import Record, rounded
from timing import copying, product_rate

from dp2vae_fast.engine.gradients.gradient import Gradient
from dp2vae_fast.engine.gradients.products import Product


def least(gradient: Gradient) -> float:
    """Seconds that the norms of a parameter's gradients take at least, beside the plain step's work."""
    if not isinstance(gradient, Product):  # of biases and norm layers: a small part of the plain step's sums
        return 0.0
    cost, records = gradient.cost, gradient.records
    if cost.positions == 1:
        return copying(records * cost.operands)
    formed = records * cost.positions * cost.numbers
    products = min(records * cost.gram / 2, formed) / product_rate()
    return min(products, copying(2 * records * 4 * cost.numbers))  # or kept: written once, read once


def floor(name: str, rounds: int) -> dict[str, Any]:
    """A row: medians of the parts in ms, and of the floor over the plain step."""
    problem = workloads.make(name)
    plain = variants.VARIANTS["non-private"].build(problem, 1.0)
    _, module, optimizer = variants.privatized(workloads.make(name), 1.0)
    problem.losses(module).sum().backward()
    uses = optimizer.capture.book.uses.values()
    norms = sum(least(gradient) for gradients in uses for gradient in gradients)
    parameters = [p.detach() for p in problem.model.parameters()]
    parts: dict[str, Callable[[], object]] = {
        "plain": plain.step,
        "adam": plain.optimizer.step,
        "noise_adam": one_pass("Adam", *([torch.zeros_like(p) for p in parameters] for _ in range(2))),
    }
    for call in parts.values():
        call()
    times = [{part: _once(call) for part, call in parts.items()} for _ in range(rounds)]
    noise = [t["noise_adam"] - t["adam"] for t in times]
    return {
        "parameters": sum(p.numel() for p in parameters),
        "plain_ms": 1e3 * statistics.median(t["plain"] for t in times),
        "norms_ms": 1e3 * norms,
        "noise_ms": 1e3 * statistics.median(noise),
        "ratio": statistics.median(1 + (norms + n) / t["plain"] for t, n in zip(times, noise, strict=True)),
    }


def _once(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_a_process(name: str, threads: int, malloc: str, rounds: int) -> dict[str, Any]:
    """The row of :func:`floor`, from a fresh process."""
    usual = dict(os.environ)
    os.environ.clear()
    os.environ.update(surroundings(threads, malloc))
    try:
        with ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (threads,)) as alone:
            row = alone.submit(floor, name, rounds).result()
    finally:
        os.environ.clear()
        os.environ.update(usual)
    return {"workload": name, "threads": threads, "malloc": malloc, **row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=workloads.PRESETS)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--malloc", nargs="+", choices=MALLOC, default=["default"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "floor_cpu.json")
    parser.add_argument("--again", action="store_true")
    chosen = parser.parse_args()
    record = Record(chosen.out, ("workload", "threads", "malloc"), again=chosen.again, rounds=chosen.rounds)
    for threads in chosen.threads:
        for malloc in chosen.malloc:
            for name in chosen.workloads:
                if {"workload": name, "threads": threads, "malloc": malloc} not in record:
                    record.add(row := rounded(in_a_process(name, threads, malloc, chosen.rounds)))
                    print(row, flush=True)


if __name__ == "__main__":
    main()
