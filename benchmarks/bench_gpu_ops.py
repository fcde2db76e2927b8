"""Every op on every backend of a GPU, on a GPU's batches, against floors that are measured in the same run.

    python benchmarks/bench_gpu_ops.py [--minutes 3] [--only conv noise] [--out FILE] [--dry]

The floor of a case is the larger of two times: its bytes at the rate of a copy of 1 GiB, and the multiply-adds of the
cheapest exact way that is known at the rate of a large matrix product of the same type. Float32 is multiplied as such
(no TF32). Nothing is timed that does not pass the gate of ``bench_ops.py``, whose cases these are with larger batches.
Times are medians, by the GPU's clock (:mod:`timing`). ``--dry`` runs the same on the CPU with few records and
writes nothing: that it works is all it says.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_ops
import torch
from bench_ops import Case, conv, linear
from environment import multiply_float32
from record import Record, rounded
from timing import median

from dp2vae_fast.ops._op import BACKENDS, OPS

NARROW = torch.bfloat16


def cases(dry: bool) -> Iterator[tuple[Case, torch.dtype]]:
    """The most telling first: convolutions of decoders, noise, linear layers, the rest."""

    def n(records: int) -> int:
        return 2 if dry else records

    products = [
        conv("W2 256→128", n(512), 256, 128, 8, 4, 2, transposed=True),
        conv("W4 128→64", n(256), 128, 64, 32, 3, 1),
        conv("W2 512→256", n(512), 512, 256, 4, 4, 2, transposed=True),
        conv("W2 128→64", n(512), 128, 64, 16, 4, 2, transposed=True),
        linear("W3 last", n(4096), 1, 1024, 784),
        linear("ViT mlp", n(256), 64, 192, 768),
        conv("W1 32→1", n(2048), 32, 1, 14, 4, 2, transposed=True),
        conv("W4 256→128", n(256), 256, 128, 16, 3, 1),
        conv("128x128, 64→32", n(64), 64, 32, 64, 4, 2, transposed=True),
    ]
    others = [case for case in bench_ops.CASES if not case.op.startswith(("conv", "linear"))]
    for case in others if dry else _larger():
        yield case, torch.float32
    for product in products[:1] if dry else products:
        for case in product:
            yield case, torch.float32
            yield case, NARROW


def _larger() -> Iterator[Case]:
    """The cases of the CPU's benchmark that are no products, with more records."""
    by_op = {case.op: case for case in bench_ops.CASES}
    yield bench_ops._noise_case("noise_adam_", 2**24, 7, (1 / 64, 3, 1e-3, 0.9, 0.999, 1e-8, 0.0, False, False))
    yield bench_ops._noise_case("noise_sgd_", 2**24, 3, (1 / 64, 1e-3, 0.0, 0.0, 0.0, False, False, False))
    yield bench_ops._noise_case("add_noise_", 2**24, 2, ())
    for op, what, many in (
        ("group_norm_grad_sample", "N=1024 C=128 S=1024", 16),
        ("layer_norm_grad_sample", "N=1024 T=64 D=192", 16),
        ("grad_sample_norm_sq", "N=1024, 74 k numbers a record", 16),
        ("kept_weighted_sum", "N=1024, 74 k numbers a record", 16),
    ):
        case = by_op[op]
        yield replace(case, what=what, arguments=_repeated(case, many), bytes=many * case.bytes)
    yield by_op["clip_factors"]
    yield replace(by_op["random_words"], bytes=4.0 * 2**20)


def _repeated(case: Case, many: int) -> Callable[[], list[Any]]:
    """Its arguments with as many times the records."""
    return lambda: [torch.cat([x] * many) if isinstance(x, torch.Tensor) else x for x in case.arguments()]


def on(device: str, dtype: torch.dtype, value: Any) -> Any:
    """Arguments there; operands of products, that is floating tensors of three axes or more, as ``dtype``."""
    if isinstance(value, list):
        return [on(device, dtype, x) for x in value]
    if not isinstance(value, torch.Tensor):
        return value
    operand = value.is_floating_point() and value.dim() > 2
    return value.to(device, dtype if operand else value.dtype, copy=True)


class Rates:
    """What this device reaches: bytes a second of a copy, multiply-adds a second of a matrix product, by type."""

    def __init__(self, device: str, dry: bool) -> None:
        count, side = (2**20, 256) if dry else (2**30, 8192)
        source, target = (torch.ones(count, dtype=torch.uint8, device=device) for _ in range(2))
        self.bytes = 2 * count / median(lambda: target.copy_(source), device)
        self.macs = {}
        for dtype in (torch.float32, NARROW):
            a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
            self.macs[dtype] = side**3 / median(lambda a=a, b=b: a @ b, device)
        one = torch.zeros(1, device=device)
        self.launch = median(one.zero_, device)

    def floor(self, case: Case, dtype: torch.dtype) -> float:
        size = case.bytes * (0.5 if dtype == NARROW else 1.0)  # results apart, which are float32: too low a floor
        return max(size / self.bytes, case.macs / self.macs[dtype], self.launch)

    def table(self) -> dict[str, float]:
        products = {f"{str(dtype).removeprefix('torch.')}_tmacs": rate / 1e12 for dtype, rate in self.macs.items()}
        return {"copy_gb_s": self.bytes / 1e9, **products, "launch_us": 1e6 * self.launch}


def measure(case: Case, dtype: torch.dtype, device: str, rates: Rates, budget: float) -> Iterator[dict[str, Any]]:
    """A row for each backend that takes it, and for the rival."""
    what = case.what + (", bf16" if dtype == NARROW else "")
    row = {"op": case.op, "what": what, "floor_ms": 1e3 * rates.floor(case, dtype)}
    ways: dict[str, Callable[..., Any]] = {
        backend: lambda *a, b=backend: OPS[case.op](*a, backend=b) for backend in BACKENDS
    }
    if case.rival is not None and dtype == torch.float32:
        ways["unfold + bmm"] = case.rival
    for how, call in ways.items():
        try:
            arguments = on(device, dtype, case.arguments())
            if how in BACKENDS and (gap := OPS[case.op]._gap(how, device, tuple(arguments))):
                if how in ("cuda", "triton"):
                    yield {**row, "how": how, "status": "refused", "why": gap}
                continue
            result = call(*arguments)
            if how not in BACKENDS:
                result = (result, 1e-3 * result)  # as if that were its error bound
            if not case.check(arguments, result):
                yield {**row, "how": how, "status": "wrong", "why": "it fails the gate, so it is not timed"}
                continue
            del result
            found = median(lambda call=call, a=arguments: call(*a), device, budget, fewest=3)
            yield {**row, "how": how, "status": "ok", "p50_ms": 1e3 * found}
        except (RuntimeError, MemoryError) as error:
            yield {**row, "how": how, "status": "failed", "why": str(error).strip().splitlines()[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--only", nargs="+", default=[""], help="ops whose name has one of these in it")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "ops_cuda.json")
    parser.add_argument("--dry", action="store_true", help="on the CPU, few records, no record")
    chosen = parser.parse_args()
    device = "cpu" if chosen.dry else "cuda"
    multiply_float32(tf32=False)
    end, rates = time.monotonic() + 60 * chosen.minutes, Rates(device, chosen.dry)
    print(rounded(rates.table()), flush=True)
    record = None if chosen.dry else Record(chosen.out, ("op", "what", "how"), again=True, rates=rounded(rates.table()))
    wrong = left = 0
    for case, dtype in cases(chosen.dry):
        if not any(word in case.op for word in chosen.only):
            continue
        if time.monotonic() > end:
            left += 1
            continue
        for row in map(rounded, measure(case, dtype, device, rates, 0.02 if chosen.dry else 0.1)):
            wrong += row["status"] in ("wrong", "failed")
            told = f"{row['p50_ms']} ms, floor {row['floor_ms']}" if row["status"] == "ok" else row["why"]
            print(f"{row['op']:24}{row['how']:14}{row['status']:9}{told}  {row['what']}", flush=True)
            if record is not None:
                record.add(row)
    if left:
        print(f"{left} cases left out: no time")
    if wrong:
        raise SystemExit(f"{wrong} were wrong or failed")


if __name__ == "__main__":
    main()
