"""What the ops run on here."""

from __future__ import annotations

import importlib
import platform
from functools import cache
from pathlib import Path

from . import _op


def native_kernels() -> bool:
    """Whether ops on CPU tensors run in C++, as things are set."""
    requested = _op._requested
    return not _op._native_gap and (requested is None or "cpp" in requested)


def instruction_set() -> str:
    """That of the C++ kernels in use: "avx512", "avx2" or "portable"; "none" without them."""
    if _op._native_gap:
        return "none"
    return importlib.import_module("dp2vae_fast._C").build_info()["isa"]


@cache
def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
