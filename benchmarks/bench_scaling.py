"""How a step's cost grows: with the batch, the image, the parameters and the depth; and the batch that fits in memory.

    python benchmarks/bench_scaling.py [--parts size capacity ...] [--variants ours ...] [--cap 4] [--step-cap 20]
        [--threads 1] [--malloc default] [--rounds 7] [--fastdp PATH] [--out FILE] [--again]

Each point is a row as in ``bench_step.py``, gate included. A variant whose step took longer than ``--step-cap``
seconds, or that did not get through a point, is not asked for the larger points of its axis, and the record says so.
``fixed`` is W1 at 1 to 8 records: the straight line through the medians meets a batch of none at the fixed cost of a
step. ``capacity`` is the largest batch, within 5 %, for which the whole process stays under ``--cap`` GiB in its first
two steps; each that is tried has a fresh process.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import variants
from environment import commit
from harness import MALLOC, Lost, Process, Settings, measure
from record import Record, rounded

AXES: dict[str, dict[int, str]] = {
    "batch of W1-decoder": {n: f"W1-decoder@{n}" for n in (16, 64, 256, 1024)},
    "batch of W2-decoder": {n: f"W2-decoder@{n}" for n in (8, 16, 32, 64, 128)},
    "size": {n: f"family:size={n},width=16@32" for n in (16, 32, 64, 128)},
    "width": {n: f"family:size=32,width={n}@32" for n in (16, 32, 64, 128)},
    "depth": {n: f"family:size=32,width=32,depth={n}@32" for n in (1, 2, 4, 8)},
    "fixed": {n: f"W1-decoder@{n}" for n in range(1, 9)},
}
CAPACITY = {n: f"W{n}-decoder" for n in range(1, 5)}
DEFAULT = ["non-private", "ours", "opacus-hooks", "opacus-ghost", "vmap", "fastdp-mixopt"]


def points(
    axis: dict[int, str], names: list[str], step_cap: float, row: Callable[[str, list[str]], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Rows along an axis; a variant that became too slow is left out from there on."""
    left, dropped, rows = list(names), {}, []
    for value, workload in axis.items():
        found = row(workload, left)
        for name, result in found["variants"].items():
            if result["status"] in ("failed", "refused", "wrong"):
                dropped[name] = result
            elif result["p50_ms"] > 1e3 * step_cap:
                why = f"{result['p50_ms'] / 1e3:.2g} s a step at {value}"
                dropped[name] = {"status": "skipped", "why": why}
        later = {name: dropped[name] for name in names if name not in left}
        rows.append({**found, "value": value, "variants": found["variants"] | later})
        medians = {n: r.get("p50_ms", r["status"]) for n, r in rows[-1]["variants"].items()}
        print(workload, rounded(medians), flush=True)
        left = [name for name in left if name not in dropped]
    return rows


def largest(peak: Callable[[int], float], cap: float, start: int = 16, near: float = 0.05, most: int = 2**20) -> int:
    """The largest number whose ``peak`` is at most ``cap``, up to ``near`` of itself and to ``most``; 0 if not even 1.

    A straight line through the last two that fit says where to look; a guess outside what is still open is halved.
    """
    low, high, guess = 0, most + 1, start
    fitting: list[tuple[int, float]] = []
    while high - low > max(1, near * low):
        if (found := peak(guess)) <= cap:
            low = guess
            fitting.append((guess, found))
        else:
            high = guess
        guess = 4 * low
        if len(fitting) > 1:
            (n1, peak1), (n2, peak2) = fitting[-2:]
            guess = int(n2 + (cap - peak2) * (n2 - n1) / (peak2 - peak1)) if peak2 > peak1 else guess
        guess = min(max(guess, low + 1 + int(near * low)), 16 * max(low, 1))
        if guess >= high:
            guess = (low + high) // 2
    return low


def capacity(workload: str, variant: str, bound: float, cap: float, start: Callable[[], Process]) -> dict[str, Any]:
    """Largest batch under ``cap`` GiB, what the process took at it, and why larger ones do not run."""
    tried: dict[int, float] = {}
    reasons: dict[int, str] = {}

    def peak(batch: int) -> float:
        with start() as process:
            try:
                for do, what in (
                    ("prepare", {"workload": f"{workload}@{batch}", "variant": variant, "bound": bound}),
                    ("measure_memory", {}),
                ):
                    answer = process.ask(do, **what)
                    if "refused" in answer:
                        raise Lost(answer["refused"])
                tried[batch] = answer["process_mib"]
            except Lost as lost:
                tried[batch], reasons[batch] = math.inf, str(lost)
        return tried[batch]

    batch = largest(peak, 1024 * cap)
    why = next((reasons[n] for n in sorted(reasons) if n > batch), "memory")
    return {"status": "ok", "batch": batch, "process_mib": tried.get(batch), "limited_by": why}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=[*AXES, "capacity"], default=[*AXES, "capacity"])
    parser.add_argument("--variants", nargs="+", choices=variants.VARIANTS, default=DEFAULT)
    parser.add_argument("--workloads", nargs="+", default=list(CAPACITY.values()), help="of the part capacity")
    parser.add_argument("--cap", type=float, default=4.0, help="GiB")
    parser.add_argument("--step-cap", type=float, default=20.0, help="seconds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--malloc", choices=MALLOC, default="default")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--patience", type=float, default=20.0)
    parser.add_argument("--limit", type=float, default=180.0)
    parser.add_argument("--fastdp", default="")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, help="scaling_cpu.json or scaling_cuda.json in results/")
    parser.add_argument("--again", action="store_true")
    chosen = parser.parse_args()
    chosen.variants = variants.in_order(chosen.variants)
    out = chosen.out or Path(__file__).parent / "results" / f"scaling_{chosen.device}.json"
    settings = Settings(
        rounds=chosen.rounds,
        processes=1,
        fewest=3,
        budget=30.0,
        patience=chosen.patience,
        limit=chosen.limit,
        fastdp=chosen.fastdp,
        device=chosen.device,
    )

    def row(workload: str, names: list[str], how: Settings = settings) -> dict[str, Any]:
        return measure(workload, chosen.threads, chosen.malloc, names, how)

    def start() -> Process:
        return Process(chosen.threads, chosen.malloc, settings)

    about = {"threads": chosen.threads, "malloc": chosen.malloc, "titles": variants.titles(chosen.variants)}
    about |= {"fastdp": commit(chosen.fastdp)}
    record = Record(
        out,
        ("part",),
        again=chosen.again,
        **about,
        rounds=chosen.rounds,
        cap_gib=chosen.cap,
        step_cap_s=chosen.step_cap,
    )
    for part in chosen.parts:
        if {"part": part} in record:
            continue
        if part != "capacity":
            record.add(rounded({"part": part, "points": points(AXES[part], chosen.variants, chosen.step_cap, row)}))
            continue
        found: dict[str, dict[str, Any]] = {}
        for workload in chosen.workloads:
            # the gate, at few records
            small = row(f"{workload}@8", chosen.variants, replace(settings, rounds=1, fewest=1, patience=0.0))
            found[workload] = small["variants"]
            for name, result in found[workload].items():
                if result["status"] == "ok":
                    found[workload][name] = capacity(workload, name, small["max_grad_norm"], chosen.cap, start)
            print(workload, {name: r.get("batch", r["status"]) for name, r in found[workload].items()}, flush=True)
        record.add(rounded({"part": part, "workloads": found}))


if __name__ == "__main__":
    main()
