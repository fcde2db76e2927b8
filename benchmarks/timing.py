"""How long a call takes, on a GPU by its own clock and between calls that empty its cache; the rates of a CPU that
floors are made of; and what others use of the machine meanwhile."""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

FLUSHED = 2**30  # bytes written between two calls: more than any L2, and for as long as the host may need


def seconds(call: Callable[[], object], device: str, budget: float = 0.2, fewest: int = 5) -> list[float]:
    """Times of single calls, as many as ``budget`` seconds allow and at least ``fewest``, after some that are not
    counted. On a GPU each is measured by events, with its launches queued behind a write that empties the L2: what is
    timed is the work there, not the host, as long as the host needs no longer than the write."""
    start = time.perf_counter()
    call()
    _wait(device)
    once = time.perf_counter() - start
    for _ in range(2 if once < budget else 0):
        start = time.perf_counter()
        call()
        _wait(device)
        once = time.perf_counter() - start
    times = max(fewest, min(200, int(budget / max(once, 1e-6))))
    return _by_events(call, times) if device == "cuda" else _by_the_clock(call, times)


def median(call: Callable[[], object], device: str, budget: float = 0.2, fewest: int = 5) -> float:
    return statistics.median(seconds(call, device, budget, fewest))


def _by_the_clock(call: Callable[[], object], times: int) -> list[float]:
    found = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return found


def _by_events(call: Callable[[], object], times: int) -> list[float]:
    cache = torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]
    for before, after in marks:
        cache.zero_()
        before.record()
        call()
        after.record()
    torch.cuda.synchronize()
    return [1e-3 * before.elapsed_time(after) for before, after in marks]


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@functools.cache
def copying(count: int) -> float:
    """Seconds in which half of so many bytes are read and the other half written."""
    source, target = torch.ones(count // 2, dtype=torch.uint8), torch.empty(count // 2, dtype=torch.uint8)
    return min(_by_the_clock(lambda: target.copy_(source), 9))


@functools.cache
def product_rate() -> float:
    """Multiply-adds a second of a 1024³ product in float32."""
    a, b = torch.randn(2, 1024, 1024)
    return 1024**3 / min(_by_the_clock(lambda: a @ b, 9))


def used_elsewhere() -> float:
    """Core-seconds that everything but this process has used since the machine started; 0 where /proc is missing."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, irq, soft_irq, steal = map(int, stat.read_text().split(maxsplit=9)[1:9])
    busy = user + nice + system + irq + soft_irq + steal
    return busy / os.sysconf("SC_CLK_TCK") - sum(os.times()[:2])
