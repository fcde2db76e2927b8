"""Compile every Triton kernel for GPUs that need not be present, and look at what came out.

    python benchmarks/compile_kernels.py [--write] [ARCHITECTURE...]

The launchers run on small CPU tensors with Triton's driver replaced by one that names an architecture and launches
nothing: what is compiled is what the JIT would compile for the same call. Every result must do without spills, keep its
shared memory within what a block may have, multiply on the tensor cores where its operands allow it, flush no small
number to zero, and contract nothing where its normals must be those of the other backends. ``--write`` makes
``results/kernels.json``, which ``report.py`` puts into docs/kernels.md.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported: interpreted functions do not compile

import argparse
import inspect
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import dp2vae_fast.kernels as kernels
import torch
import triton
from dp2vae_fast.kernels import _common, affine, blocks, clip, gradient, noise, norm, patch, weighted
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

RECORD = Path(__file__).parent / "results" / "kernels.json"
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}  # bytes a block


@dataclass(frozen=True)
class Case:
    """One call of a launcher; ``mma``: its products must run on the tensor cores."""

    name: str
    call: Callable[[], object]
    mma: bool = False
    tf32: bool = False


def cases() -> Iterator[Case]:
    """The fewest that reach every kernel and every row of products in the table of block sizes."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    key, step, lists = torch.zeros(8, dtype=torch.int32), torch.tensor(3), [[empty(4096)] for _ in range(5)]
    draw, adam = (key, step, 0, [1], 1.0), (0.5, 3, 0.1, 0.9, 0.999, 1e-8, 0.1)
    yield Case("16 layers", lambda: clip._clip_factors(empty(16, 256), empty(16, 256), 1.0))
    yield Case("words", lambda: noise._random_words(key, step, 0, 0, 1, 4096))
    yield Case("fp32", lambda: noise._add_noise(lists[0], *draw))
    yield Case("momentum", lambda: noise._noise_sgd(*lists[:3], *draw, 0.5, 0.1, 0.9, 0.0, 0.1, False, False, False))
    yield Case("AdamW", lambda: noise._noise_adam(*lists[:4], [], *draw, *adam, True, False))
    yield Case("512 records", lambda: weighted._kept_weighted_sum(empty(512, 65536), empty(512)))
    yield Case("Adam, amsgrad", lambda: noise._noise_adam(*lists, *draw, *adam, False, False))
    for kind, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():

        def x(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return empty(*shape, dtype=dtype)

        yield Case(kind, lambda x=x: norm._grad_sample_norm_sq(x(4, 65536)))
        yield Case(f"{kind}, 1 position", lambda x=x: norm._linear_norm_sq(x(4, 1, 512), x(4, 1, 2048)))
        yield Case(f"{kind}, 256 sites", lambda x=x: affine._group_norm(x(4, 64, 256), x(4, 64, 256), 8, 1e-5))
        yield Case(f"{kind}, 16 sites", lambda x=x: affine._group_norm(x(4, 64, 16), x(4, 64, 16), 8, 1e-5))
        yield Case(f"{kind}, 512", lambda x=x: affine._layer_norm(x(4, 64, 512), x(4, 64, 512), False, 1e-5))
        yield Case(f"{kind}, 8192", lambda x=x: affine._layer_norm(x(4, 64, 8192), x(4, 64, 8192), True, 1e-5))
    indices = torch.zeros(4, 64, dtype=torch.int64)
    conv = ([64, 128, 4, 4], [2, 2], [1, 1], [1, 1], 1, True)
    for kind, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16, "tf32": torch.float32}.items():
        a, b, few = (empty(2, *shape, dtype=dtype) for shape in ((256, 512), (256, 128), (64, 512)))
        image, output = empty(2, 64, 16, 16, dtype=dtype), empty(2, 128, 32, 32, dtype=dtype)
        how = dict(mma=kind != "fp32", tf32=kind == "tf32")
        lengths = (256,) if kind == "tf32" else (16, 32, 64, 256)
        for t in lengths:
            call = lambda a=a, b=b, t=t: norm._linear_norm_sq(a[:, :t], b[:, :t])  # noqa: E731
            yield Case(f"{kind}, {t} positions", call, **how)
        yield Case(kind, lambda b=few: norm._embedding_norm_sq(indices, b, -1), **how)
        yield Case(kind, lambda a=a, b=b: gradient._linear_direct_norm_sq(a, b), **how)
        yield Case(f"{kind}, windows", lambda x=image, y=output: patch._conv_norm_sq(x, y, *conv), **how)
        yield Case(f"{kind}, windows", lambda x=image, y=output: gradient._conv_kept(x, y, *conv), **how)
        for t in (16, 64, 256):
            call = lambda a=a, b=b, t=t: weighted._linear_weighted_sum(a[:, :t], b[:, :t], empty(2))  # noqa: E731
            yield Case(f"{kind}, {t} positions", call, **how)
        odd = empty(300, 137, 19, dtype=dtype), empty(300, 137, 7, dtype=dtype), empty(300)
        yield Case(f"{kind}, odd sizes", lambda odd=odd: weighted._linear_weighted_sum(*odd), **how)
        yield Case(
            f"{kind}, windows", lambda x=image, y=output: weighted._conv_weighted_sum(x, y, empty(2), *conv), **how
        )


@dataclass(frozen=True)
class Compiled:
    """What became of one launch."""

    kernel: str
    case: str
    architecture: str
    registers: int
    shared: int
    stack: int
    mma: str

    def faults(self, case: Case, products: bool, asm: dict[str, str], contracts: bool) -> Iterator[str]:
        if self.stack:
            yield f"{self.stack} bytes a thread on the stack: registers are spilled"
        if self.shared > SHARED_LIMIT[self.architecture]:
            yield f"{self.shared} bytes of shared memory, more than {SHARED_LIMIT[self.architecture]}"
        if case.mma and products and not self.mma:
            yield "no product on the tensor cores"
        if self.kernel == "weighted" and not chunks_are_apart(asm["ttir"]):
            yield "the compiler adds a chunk of a product to the accumulator of another"
        ptx = asm.get("ptx", "")
        if re.search(r"\b(?:mul|add|sub|fma|sqrt|div)\.\S*ftz", ptx):
            yield "small numbers are flushed to zero"
        if not contracts and re.search(r"\bfma\.rn\.f32\b|\b(?:mul|add|sub)\.f32\b", ptx):
            yield "multiplications and additions are, or may be, contracted"


def chunks_are_apart(ttir: str) -> bool:
    """Whether every product begins at zero or goes on with another: Triton makes ``x + tl.dot(a, b)`` one instruction
    with x for its accumulator, and a term would pass through more roundings than are counted."""
    dots = re.findall(r"(%\S+) = tt\.dot %\S+, %\S+, (%\w+)", ttir)
    zeros = re.findall(r"(%\w+) = arith\.constant dense<0\.0+e\+00> : tensor", ttir)
    return bool(dots) and all(start in zeros or start in dict(dots) for _, start in dots)


def cuobjdump(how: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([BIN / "cuobjdump", how, file.name], capture_output=True, text=True, check=True).stdout


def examined(compiled: Any, case: Case, architecture: str) -> tuple[Compiled, list[str]]:
    """What is recorded of a compiled kernel, and what is wrong with it."""
    has_dot = "tt.dot" in compiled.asm["ttir"]
    if "cubin" in compiled.asm:
        usage = cuobjdump("-res-usage", compiled.asm["cubin"])
        registers, stack = (int(re.findall(rf"{what}:(\d+)", usage)[0]) for what in ("REG", "STACK"))
        code = cuobjdump("-sass", compiled.asm["cubin"]) if has_dot else ""  # it takes half a second
        products = re.findall(r"\b(?:H|HG|UTC\w*)MMA\b", code)
    else:
        code = compiled.asm["amdgcn"]
        registers, stack = (
            int(re.findall(rf"{what}:\s+(\d+)", code)[-1])
            for what in (r"\.vgpr_count", r"\.private_segment_fixed_size")
        )
        products = ["MFMA"] * len(re.findall(r"\bv_mfma_f32", code))
    products_by = max(sorted(set(products)), key=products.count, default="")
    name, shared = compiled.metadata.name.removesuffix("_kernel"), compiled.metadata.shared
    result = Compiled(name, case.name, architecture, registers, shared, stack, products_by)
    contracts = compiled.metadata.enable_fp_fusion
    return result, list(result.faults(case, has_dot, compiled.asm, contracts))


class NoDriver:
    """Stands in for Triton's driver: every architecture is a device, and there is no stream."""

    target = ""

    def get_current_device(self) -> str:
        return self.target

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target]


def compile_all(architectures: list[str]) -> tuple[list[Compiled], list[str]]:
    """Everything that the cases launch, once for each architecture, and what is wrong."""
    results, faults, launched, driver, run = [], [], [], NoDriver(), JITFunction.run
    triton.runtime.driver.set_active(driver)
    JITFunction.run = lambda self, *a, grid, warmup, **k: launched.append(run(self, *a, grid=grid, warmup=True, **k))
    for driver.target in architectures:
        blocks.architecture = lambda like: driver.target
        seen = set()
        for case in cases():
            _common.tf32_allowed = lambda like, convolution, case=case: case.tf32
            launched.clear()
            case.call()
            for compiled in launched:
                if compiled.hash not in seen:
                    seen.add(compiled.hash)
                    result, wrong = examined(compiled, case, driver.target)
                    results.append(result)
                    faults += [f"{result.kernel} ({case.name}) for {driver.target}: {what}" for what in wrong]
    JITFunction.run = run
    missing = all_kernels() - {f"{result.kernel}_kernel" for result in results}
    return results, faults + [f"{name} is launched by no case" for name in sorted(missing)]


def all_kernels() -> set[str]:
    rooms = [vars(module).values() for _, module in inspect.getmembers(kernels, inspect.ismodule)]
    names = {x.__name__ for room in rooms for x in room if isinstance(x, JITFunction)}
    return {name for name in names if name.endswith("_kernel")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architectures", nargs="*", metavar="ARCHITECTURE", help=f"of {', '.join(TARGETS)}; all")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    architectures = arguments.architectures or list(TARGETS)
    results, faults = compile_all(architectures)
    if faults:
        sys.exit("\n".join(faults))
    print(f"{len(results)} kernels compiled for {', '.join(architectures)}: no faults")
    if arguments.write:
        RECORD.write_text(
            json.dumps(dict(triton=triton.__version__, rows=[asdict(r) for r in results]), indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
