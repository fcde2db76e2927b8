"""``python benchmarks/compile_kernels.py``: compile every Triton kernel for GPUs that need not be present.

The launchers run on small tensors with Triton's driver replaced by one that names an architecture and launches
nothing, so that what is compiled is what the JIT would compile for the same call. Each result must keep its registers
(no spills) and its shared memory within what a block may have, must multiply on the tensor cores where its operands
allow it, and must not flush small numbers to zero. ``--write`` puts the table into docs/kernels.md.
"""

from __future__ import annotations

import os

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported: interpreted functions do not compile

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from dp2vae_fast.kernels import _common, blocks, clip, noise, norm, patch

PAGE = Path(__file__).parents[1] / "docs" / "kernels.md"
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}  # bytes a block
MMA = {"cuda": r"\b(U?[HQ]G?MMA|UTC\w*MMA)\b", "hip": r"\bv_s?mfma\w*"}
SPILL = {"cuda": r"\b(LDL|STL)\b", "hip": r"\bscratch_(load|store)\w*"}


class NoDriver:
    """Stands in for Triton's driver: every architecture is a device, and there is no stream."""

    target = "sm_90"

    def get_current_device(self) -> str:
        return self.target

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target]


@dataclass(frozen=True)
class Compiled:
    """What became of one launch."""

    kernel: str
    registers: int
    shared: int
    spills: int
    mma: str
    flushes: int

    def cell(self) -> str:
        spills = f", {self.spills} spills" if self.spills else ""
        return f"{self.registers}, {self.shared}{spills}" + (f", {self.mma}" if self.mma else "")


def disassembled(compiled: Any) -> tuple[str, int]:
    """Machine code as text, and registers a thread."""
    if "cubin" not in compiled.asm:
        text = compiled.asm["amdgcn"]
        return text, int(re.findall(r"\.vgpr_count:\s+(\d+)", text)[-1])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text, usage = (
            subprocess.run([BIN / "cuobjdump", how, file.name], capture_output=True, text=True, check=True).stdout
            for how in ("-sass", "-res-usage")
        )
    return text, int(re.findall(r"REG:(\d+)", usage)[0])


def described(compiled: Any, backend: str) -> Compiled:
    code, registers = disassembled(compiled)
    found = re.findall(MMA[backend], code)
    flushes = len(re.findall(r"\b(?:mul|add|fma|sqrt|div)\.\S*ftz\S*", compiled.asm.get("ptx", "")))
    return Compiled(
        compiled.metadata.name,
        registers,
        compiled.metadata.shared,
        len(re.findall(SPILL[backend], code)),
        max(set(found), key=found.count) if found else "",
        flushes,
    )


@dataclass(frozen=True)
class Case:
    """One call of a launcher; ``mma``: its products must run on the tensor cores."""

    name: str
    call: Callable[[], object]
    mma: bool = False
    tf32: bool = False


def cases() -> list[Case]:
    """The fewest that reach every kernel and every row of the table of block sizes."""
    found: list[Case] = []

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    step, key = torch.tensor(3), torch.zeros(8, dtype=torch.int32)
    draw = (key, step, 0, [1], 1.0)
    lists = [[empty(4096)] for _ in range(5)]
    sgd = (0.5, 0.1, 0.9, 0.0, 0.1, False, False, False)
    adam = (0.5, 3, 0.1, 0.9, 0.999, 1e-8, 0.1)
    found += [
        Case("clip factors", lambda: clip._clip_factors(empty(16, 256), empty(16, 256), 1.0)),
        Case("random words", lambda: noise._random_words(key, step, 0, 0, 1, 4096)),
        Case("add noise, fp32", lambda: noise._add_noise(lists[0], *draw)),
        Case("noise and SGD", lambda: noise._noise_sgd(*lists[:3], *draw, *sgd)),
        Case("noise and AdamW", lambda: noise._noise_adam(*lists[:4], [], *draw, *adam, True, False)),
        Case("noise and Adam, amsgrad", lambda: noise._noise_adam(*lists, *draw, *adam, False, False)),
    ]
    for kind, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16, "tf32": torch.float32}.items():
        how = dict(mma=kind != "fp32", tf32=kind == "tf32")

        def x(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return empty(*shape, dtype=dtype)

        if kind != "tf32":
            found += [
                Case(f"formed rows, {kind}", lambda x=x: norm._grad_sample_norm_sq(x(4, 65536))),
                Case(f"Gram, 1 position, {kind}", lambda x=x: norm._linear_norm_sq(x(4, 1, 512), x(4, 1, 2048))),
            ]
        for positions in (16, 32, 64, 256):
            if kind == "tf32" and positions < 64:
                continue
            call = lambda x=x, t=positions: norm._linear_norm_sq(x(4, t, 512), x(4, t, 256))  # noqa: E731
            found.append(Case(f"Gram, {positions} positions, {kind}", call, **how))
        indices = torch.zeros(4, 64, dtype=torch.int64)
        found.append(
            Case(f"embedding, {kind}", lambda x=x, i=indices: norm._embedding_norm_sq(i, x(4, 64, 256), -1), **how)
        )
        conv = ([64, 128, 4, 4], [2, 2], [1, 1], [1, 1], 1, True)
        call = lambda x=x, c=conv: patch._conv_norm_sq(x(2, 64, 16, 16), x(2, 128, 32, 32), *c)  # noqa: E731
        found.append(Case(f"convolution, {kind}", call, **how))
    return found


def compile_all(names: list[str]) -> dict[str, dict[str, Compiled]]:
    """``{kernel and case: {architecture: result}}``."""
    driver, results, launched = NoDriver(), {}, []
    triton.runtime.driver.set_active(driver)
    run = JITFunction.run
    JITFunction.run = lambda self, *a, grid, warmup, **k: launched.append(run(self, *a, grid=grid, warmup=True, **k))
    for name in names:
        driver.target = name
        blocks.architecture = lambda like, name=name: name
        for case in cases():
            _common.tf32_allowed = lambda like, convolution, case=case: case.tf32
            launched.clear()
            case.call()
            for compiled in dict.fromkeys(launched):
                result = described(compiled, TARGETS[name].backend)
                label = f"{result.kernel.removesuffix('_kernel')} ({case.name})"
                results.setdefault(label, {})[name] = result
    JITFunction.run = run
    return results


if __name__ == "__main__":
    import time

    t = time.time()
    for label, row in compile_all(sys.argv[1:] or ["sm_90"]).items():
        print(label, {k: (v.cell(), v.flushes) for k, v in row.items()})
    print(time.time() - t)
