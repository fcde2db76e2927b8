"""Measure the block sizes of the Triton kernels on the GPU at hand, and write them where ``kernels/blocks.py`` looks.

    python benchmarks/tune.py [--minutes 10] [--only noise product] [--out FILE] [--copy DIR] [--dry]

A job is one row of the table, on work of a size that the row is for. Its candidates are the options in use and others
near them; each must first pass the gate of bench_ops.py, against float64, and is timed by the GPU's clock. One that
does not compile (too much shared memory) or is wrong is skipped and named; one replaces what is in use where it is
faster by 3 %. Jobs come in the order of their weight in a step, so that a budget that ends early has done those that
count; the file grows job by job. ``--dry`` runs tiny jobs with two candidates each on the CPU, under the interpreter.
"""

from __future__ import annotations

import os
import sys

if "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import argparse
import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_ops
import torch
from bench_gpu_ops import on
from bench_ops import Case, conv, linear
from dp2vae_fast.kernels import blocks
from environment import environment, multiply_float32
from record import rounded
from timing import median

from dp2vae_fast.ops._op import OPS

ENOUGH = 0.97  # of the time of what is in use
PRODUCTS = {"ieee": torch.float32, "tf32": torch.float32, "narrow": torch.bfloat16}
# What may stand in place of each option; those not named stay.
NEAR: dict[str, dict[str, list[int]]] = {
    "noise": {"BLOCK": [64, 128, 256, 512], "num_warps": [1, 2, 4, 8]},
    "product": {"BLOCK_P": [32, 64, 128], "BLOCK_D": [32, 64, 128, 256], "BLOCK_T": [16, 32, 64], "num_warps": [4, 8]},
    "weighted": {"BLOCK_P": [32, 64, 128], "BLOCK_D": [32, 64, 128], "BLOCK_T": [16, 32, 64], "num_warps": [4, 8]},
    "kept": {"ROWS": [4, 8, 16, 32], "BLOCK": [128, 256, 512], "num_warps": [4, 8]},
    "add_parts": {"ROWS": [8, 16, 32], "BLOCK": [64, 128, 256], "num_warps": [2, 4, 8]},
    "gram": {"BLOCK_K": [32, 64, 128], "num_warps": [2, 4, 8], "num_stages": [2, 3, 4], "BLOCK_T": [16, 32, 64, 128]},
    "channels": {"BLOCK_C": [1, 4, 8, 16, 64], "BLOCK_S": [16, 64, 256, 1024], "num_warps": [1, 2, 4, 8]},
    "square_sums": {"BLOCK": [512, 1024, 2048, 4096], "CHUNK": [4096, 8192, 16384, 65536], "num_warps": [4, 8]},
    "combine": {"BLOCK_T": [16, 32, 64], "num_warps": [2, 4, 8]},
    "one_position": {"BLOCK": [128, 256, 512, 1024], "num_warps": [1, 2, 4]},
    "layer_norm": {"ROWS": [4, 8, 16, 32, 64], "num_warps": [2, 4, 8, 16]},
    "reach": {"BLOCK_T": [16, 32, 64], "BLOCK_K": [64, 128, 256], "num_warps": [2, 4, 8]},
    "group_norm": {"BLOCK": [32, 64, 128, 256], "num_warps": [1, 2, 4]},
    "finish": {"BLOCK": [64, 128, 256, 512], "num_warps": [1, 2, 4]},
    "factors": {"BLOCK": [32, 64, 128, 256], "num_warps": [1, 2, 4]},
}


@dataclass(frozen=True)
class Job:
    """Row number ``row`` of ``kernel``, on a case whose size that row is for."""

    kernel: str
    row: int
    case: Case
    dtype: torch.dtype = torch.float32
    tf32: bool = False


def jobs(dry: bool) -> Iterator[Job]:
    """The most important first."""

    def n(records: int) -> int:
        return 2 if dry else records

    def pick(cases: list[Case], how: str) -> Case:
        return next(case for case in cases if case.op.endswith(how))

    parameters = 2048 if dry else 2**24
    adam = (1 / 64, 3, 1e-3, 0.9, 0.999, 1e-8, 0.0, False, False)
    side = 4 if dry else 16
    image = conv("product", n(512), *((4, 4) if dry else (128, 64)), side, 4, 2, transposed=True)
    yield Job("noise", 0, bench_ops._noise_case("noise_adam_", parameters, 7, adam))
    for kind, dtype in PRODUCTS.items():
        yield Job(f"product {kind}", 0, pick(image, "kept"), dtype, kind == "tf32")
    for kind, dtype in PRODUCTS.items():
        for row, positions in ((1, 70 if dry else 256), (0, 16)):
            case = pick(linear("weighted", n(512), positions, *((8, 8) if dry else (512, 256))), "weighted_sum")
            yield Job(f"weighted {kind}", row, case, dtype, kind == "tf32")
    for kind, dtype in PRODUCTS.items():
        for row, (largest, _) in reversed(list(enumerate(blocks._DEFAULT[f"gram {kind}"]))):
            positions = min(largest, 20 if dry else 256)
            case = pick(linear("gram", n(256), positions, *((8, 8) if dry else (256, 512))), "_norm_sq")
            yield Job(f"gram {kind}", row, case, dtype, kind == "tf32")
    records = n(1024)
    for row, sites in ((1, 40 if dry else 1024), (0, 16)):
        yield Job("channels", row, _norm_case("group_norm_grad_sample", (records, 16 if dry else 128, sites), 8))
    for row, numbers in ((1, 5000 if dry else 2**17), (0, 100 if dry else 4096)):
        yield Job("square_sums", row, _formed(records, numbers))
    yield Job("kept", 0, _weighted(n(1024), 300 if dry else 2**16))
    yield Job("add_parts", 0, _weighted(30 if dry else 4096, 40 if dry else 2**10))
    yield Job("combine", 0, pick(image, "conv_norm_sq"))
    for row, features in ((1, 1100 if dry else 2048), (0, 40 if dry else 512)):
        case = pick(linear("one position", n(4096), 1, features, features), "_norm_sq")
        yield Job("one_position", row, case)
    for row, features in ((0, 40 if dry else 768), (1, 1100 if dry else 4096)):
        yield Job("layer_norm", row, _norm_case("layer_norm_grad_sample", (n(256), 40 if dry else 64, features), False))
    yield Job("reach", 0, pick(image, "direct_norm_sq"))
    yield Job("group_norm", 0, _norm_case("group_norm_grad_sample", (records, 16 if dry else 128, 64), 8))
    yield Job("finish", 0, _formed(n(4096), 40 if dry else 2**14))
    yield Job("factors", 0, next(case for case in bench_ops.CASES if case.op == "clip_factors"))


def _formed(records: int, numbers: int) -> Case:
    """Norms of gradients that are there."""

    def check(arguments: list[Any], result: Any) -> bool:
        return bench_ops._bounded(result, arguments[0][:2].double())

    return Case("grad_sample_norm_sq", f"N={records}, {numbers}", lambda: [bench_ops._normal(records, numbers)], check)


def _weighted(records: int, numbers: int) -> Case:
    """Their sum with a factor a record."""

    def check(arguments: list[Any], result: Any) -> bool:
        values, factors = (x.double() for x in arguments)
        return bench_ops._close(result, factors @ values)

    factors = torch.linspace(0.1, 1, records)
    return Case(
        "kept_weighted_sum", f"N={records}, {numbers}", lambda: [bench_ops._normal(records, numbers), factors], check
    )


def _norm_case(op: str, shape: tuple[int, ...], how: int) -> Case:
    """A normalisation layer, held against the reference in float64."""

    def check(arguments: list[Any], result: Any) -> bool:
        exact = OPS[op].reference(arguments[0][:2].double(), arguments[1][:2].double(), *arguments[2:])
        return all(bench_ops._close(one, other) for one, other in zip(result, exact, strict=True))

    return Case(op, str(shape), lambda: [*(bench_ops._normal(*shape) for _ in range(2)), how, 1e-5], check)


def candidates(kernel: str, now: blocks.Options) -> Iterator[blocks.Options]:
    """What is in use, then what differs in one option, in two, and so on."""
    near = {name: values for name, values in NEAR[kernel.partition(" ")[0]].items() if name in now}
    every = [now | dict(zip(near, values, strict=True)) for values in itertools.product(*near.values())]
    yield from sorted([now, *(c for c in every if c != now)], key=lambda c: sum(c[k] != now[k] for k in now))


@contextmanager
def using(architecture: str, job: Job, options: blocks.Options) -> Iterator[None]:
    """The table with that row replaced."""
    table = blocks.TABLE.setdefault(architecture, {})
    before = table.get(job.kernel)
    rows = list(before or blocks._DEFAULT[job.kernel])
    rows[job.row] = (rows[job.row][0], options)
    table[job.kernel] = rows
    try:
        yield
    finally:
        if before is None:
            del table[job.kernel]
        else:
            table[job.kernel] = before


def rows_now(architecture: str, kernel: str) -> list[tuple[int, blocks.Options]]:
    return blocks.TABLE.get(architecture, {}).get(kernel) or blocks._DEFAULT[kernel]


def tune(job: Job, architecture: str, device: str, most: int, seconds: float) -> dict[str, Any]:
    """The fastest right candidate, and what became of the others."""
    multiply_float32(job.tf32)
    now, end = rows_now(architecture, job.kernel)[job.row][1], time.monotonic() + seconds
    op, given = OPS[job.case.op], job.case.arguments()
    times: list[tuple[float, blocks.Options]] = []
    skipped: list[str] = []
    for options in itertools.islice(candidates(job.kernel, now), most):
        if times and time.monotonic() > end:
            break
        with using(architecture, job, options):
            arguments = on(device, job.dtype, given)
            call: Callable[[], Any] = lambda a=arguments: op(*a, backend="triton")  # noqa: E731
            try:
                if not right(job, arguments, call()):
                    skipped.append(f"{options}: wrong")
                    continue
                times.append((median(call, device, 0.03, fewest=1 if device == "cpu" else 9), options))
            except Exception as error:  # whatever the compiler raises
                skipped.append(f"{options}: {type(error).__name__}: {str(error).strip().splitlines()[0][:100]}")
    about = {"kernel": job.kernel, "row": job.row, "on": job.case.what, "skipped": skipped}
    if not times:
        return {**about, "failed": True}
    before = next((t for t, options in times if options == now), None)
    best, options = min(times, key=lambda pair: pair[0])
    if before is not None and best > ENOUGH * before:
        best, options = before, now
    return {**about, "options": options, "before_ms": before and 1e3 * before, "ms": 1e3 * best, "tried": len(times)}


def right(job: Job, arguments: list[Any], result: Any) -> bool:
    """The gate of bench_ops.py; where operands are cut to TF32, its error bound alone, which must know of that, and the
    distance of a sum, each of whose two operands may be off by 2^-11."""
    if not job.tf32:
        return job.case.check(arguments, result)
    with_exact = OPS[job.case.op].reference(*(x.double() if isinstance(x, torch.Tensor) else x for x in arguments))
    if isinstance(result, torch.Tensor):
        return bool((result - with_exact).norm() <= 2.0**-10 * with_exact.norm())
    norm_sq, error = (x.double() for x in result[-2:])
    return bool(((norm_sq - with_exact[-2]).abs() <= error + 0.01 * with_exact[-2]).all())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--only", nargs="+", default=[""], help="kernels whose name has one of these in it")
    parser.add_argument("--out", type=Path, help="kernels/tuned/sm_XX.json unless given")
    parser.add_argument("--copy", type=Path, help="folder for a copy of it")
    parser.add_argument("--dry", action="store_true")
    chosen = parser.parse_args()
    device = "cpu" if chosen.dry else "cuda"
    architecture = blocks.architecture(torch.empty(0, device=device))
    out = chosen.out or blocks.TUNED / f"{architecture}.json"
    if chosen.dry:
        out, architecture = Path(tempfile.mkdtemp()) / "dry.json", "dry"
        blocks.architecture = lambda like: "dry"
    content: dict[str, Any] = {"environment": environment(), "jobs": [], "rows": {}}
    end = time.monotonic() + 60 * chosen.minutes
    todo = [job for job in jobs(chosen.dry) if any(word in job.kernel for word in chosen.only)]
    for i, job in enumerate(todo):
        left = end - time.monotonic()
        if left <= 0:
            print(f"{len(todo) - i} jobs left out: no time")
            break
        done = rounded(tune(job, architecture, device, 2 if chosen.dry else 60, 2 * left / (len(todo) - i)))
        print(f"{job.kernel}, row {job.row}: {done}", flush=True)
        content["jobs"].append(done)
        if "options" in done:
            rows = list(rows_now(architecture, job.kernel))
            rows[job.row] = (rows[job.row][0], done["options"])
            blocks.TABLE.setdefault(architecture, {})[job.kernel] = rows  # later jobs stand on it
            content["rows"][job.kernel] = [[None if largest == blocks.ANY else largest, how] for largest, how in rows]
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(content, indent=1) + "\n")
    if chosen.copy is not None:
        shutil.copy(out, chosen.copy / f"tuned_{out.name}")
    failed = [f"{done['kernel']}, row {done['row']}" for done in content["jobs"] if "failed" in done]
    print(f"{len(content['jobs']) - len(failed)} rows, written to {out}")
    if failed or blocks.read(out).keys() != content["rows"].keys():
        sys.exit(f"nothing runs for {'; '.join(failed)}" if failed else f"{out} is not read as it was written")


if __name__ == "__main__":
    main()
