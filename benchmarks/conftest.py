"""For bench_ops.py: ``--record FILE`` writes what pytest-benchmark has measured as a record of this project's own."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
from record import Record, rounded


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, help="write the medians there, such as results/ops_cpu.json")


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--record")
    if path is None:
        return
    record = Record(path, ("op", "what", "how"), again=True)
    for bench in session.config._benchmarksession.benchmarks:  # type: ignore[attr-defined]
        times = [1e3 * t for t in bench.stats.data]
        row = {"op": bench.group, **bench.extra_info, "times": len(times), "p50_ms": statistics.median(times)}
        record.content["rows"].append(rounded(row))
    record.write()
