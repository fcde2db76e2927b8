"""A whole training step, private and not, of this package and of others.

    python benchmarks/bench_step.py [--short] [--workloads W2-decoder ...] [--variants ours opacus-ghost ...]
        [--threads 1 2] [--malloc default tuned] [--rounds 9] [--processes 3] [--fastdp PATH] [--out FILE] [--again]
        [--device cuda [--tf32] [--cudnn-benchmark]]

How it is measured: :mod:`harness`; that nothing wrong is timed: :mod:`gate`. Rows (workload, threads, allocator) are
written as they finish, and a run that was stopped goes on with what is missing. ``--short`` writes nothing: few rounds
of a few variants, printed as a table. On a GPU batches are a GPU's, a step lasts until the GPU has done it, and memory
is what PyTorch allocates there.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import variants
import workloads
from environment import commit
from harness import MALLOC, Settings, measure
from record import Record, rounded

SHORT = {
    "workloads": ["W1-decoder", "W2-decoder", "W3-decoder"],
    "variants": ["non-private", "ours", "opacus-hooks", "opacus-ghost"],
    "threads": [1],
    "malloc": ["default"],
}
SHORT_SETTINGS = {"rounds": 5, "processes": 1, "in_a_row": 1, "fewest": 3, "budget": 8.0}
SHORT_SETTINGS |= {"patience": 5.0, "warm_up": 1}
LONG = {
    "workloads": workloads.PRESETS,
    "variants": variants.ON_CPU,
    "threads": [1, 2],
    "malloc": list(MALLOC),
}
GPU = {"workloads": workloads.ON_GPU, "variants": variants.ON_GPU, "threads": [1], "malloc": ["default"]}
GPU_SETTINGS = {"device": "cuda", "in_a_row": 3, "rounds": 30, "processes": 1, "budget": 15.0}
GPU_SETTINGS |= {"patience": 10.0, "warm_up": 10}


def table(row: dict[str, Any]) -> str:
    """A row for the eyes: times, ratios to the non-private step, peak memory; or why not."""
    busy = f", others used {row['cores_used_elsewhere']} cores" if row["cores_used_elsewhere"] >= 0.1 else ""
    lines = [
        f"\n{row['workload']}: batch {row['batch']}, {row['parameters'] / 1e6:.2f} M parameters, "
        f"{row['threads']} threads, {row['malloc']} malloc{busy}",
        f"{'':42}{'ms, p50':>10}{'p20':>9}{'p80':>9}{'ratio':>8}{'peak MiB':>10}",
    ]
    for name, result in row["variants"].items():
        if result["status"] != "ok":
            lines.append(f"{variants.VARIANTS[name].title:42}{result['status']}: {result['why']}")
            continue
        ratio = f"{result['ratio']:.2f}" if "ratio" in result else ""
        times = "".join(f"{result[key]:{width}.1f}" for key, width in (("p50_ms", 10), ("p20_ms", 9), ("p80_ms", 9)))
        lines.append(f"{variants.VARIANTS[name].title:42}{times}{ratio:>8}{result['peak_mib']:10.0f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--workloads", nargs="+", help=f"{', '.join(workloads.PRESETS)}, with @BATCH")
    parser.add_argument("--variants", nargs="+", choices=variants.VARIANTS)
    parser.add_argument("--threads", type=int, nargs="+")
    parser.add_argument("--malloc", nargs="+", choices=MALLOC)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--processes", type=int, help="of each variant that is about as fast as the first")
    parser.add_argument("--patience", type=float, help="seconds for which rounds on a busy machine are repeated")
    parser.add_argument("--limit", type=float, help="seconds that a variant may take for one answer")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which no row is begun")
    parser.add_argument("--fastdp", default="", help="checkout of FastDP")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--tf32", action="store_true", help="let everybody multiply float32 as TF32")
    parser.add_argument("--cudnn-benchmark", action="store_true", help="let cuDNN try its algorithms out")
    parser.add_argument("--again", action="store_true", help="begin the record anew")
    arguments = parser.parse_args()
    on_gpu = arguments.device == "cuda"
    usual = SHORT if arguments.short else GPU if on_gpu else LONG
    chosen = {k: getattr(arguments, k) or v for k, v in usual.items()}
    chosen["variants"] = variants.in_order(chosen["variants"])
    numbers = ("rounds", "processes", "patience", "limit")
    given = {k: number for k in numbers if (number := getattr(arguments, k)) is not None}
    given |= {k: True for k in ("tf32", "cudnn_benchmark") if getattr(arguments, k)}
    usual_settings = (GPU_SETTINGS if on_gpu else {}) | (SHORT_SETTINGS if arguments.short else {})
    settings = Settings(**{**usual_settings, **given}, fastdp=arguments.fastdp)
    name = f"step_{arguments.device}.json"
    path = arguments.out or (None if arguments.short else Path(__file__).parent / "results" / name)
    about = {k: v for k, v in asdict(settings).items() if k != "fastdp"}
    key = ("workload", "threads", "malloc")
    shown = chosen["variants"] if on_gpu else variants.in_order([*variants.ON_CPU, *chosen["variants"]])
    about |= {"titles": variants.titles(shown), "fastdp": commit(arguments.fastdp)}
    end = time.monotonic() + 60 * arguments.minutes
    record = None if path is None else Record(path, key, again=arguments.again, **about)
    for workload in chosen["workloads"]:
        for threads in chosen["threads"]:
            for malloc in chosen["malloc"]:
                if record is not None and {"workload": workload, "threads": threads, "malloc": malloc} in record:
                    continue
                if time.monotonic() > end:
                    print(f"no time left for {workload}, {threads} threads, {malloc} malloc")
                    continue
                row = rounded(measure(workload, threads, malloc, chosen["variants"], settings))
                print(table(row), flush=True)
                if record is not None:
                    record.add(row)


if __name__ == "__main__":
    main()
