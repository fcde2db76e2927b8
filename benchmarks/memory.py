"""Memory of this process and the most of it since a reset: resident memory, or what PyTorch has allocated on a GPU."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MIB = 2**20


def give_back() -> None:
    """Return free memory to the system, where the C library can."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def resident(device: str = "cpu") -> float:
    """MiB in use now; the most so far where the system does not say."""
    if device == "cuda":
        return torch.cuda.memory_allocated() / MIB
    return _status("VmRSS") if STATUS.exists() else _most_so_far()


def code(device: str = "cpu") -> float:
    """MiB of :func:`resident` that are files, libraries' code above all, where the system tells them apart."""
    return _status("RssFile") if device != "cuda" and STATUS.exists() else 0.0


def taken_by(call: Callable[[], object], device: str) -> float:
    """The most MiB that one call takes above what was in use."""
    give_back()
    before = resident(device)
    return peak_of(call, device, times=1)[0] - before


def peak_of(step: Callable[[], object], device: str = "cpu", times: int = 2) -> tuple[float, str]:
    """The most MiB in use during a step, and how that was measured."""
    give_back()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        for _ in range(times):
            step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / MIB, "of these steps, allocated on the GPU"
    try:
        CLEAR.write_text("5")  # sets VmHWM back to VmRSS
        kind = "of these steps"
    except OSError:
        kind = "of the whole process, as the system cannot reset it"
    for _ in range(times):
        step()
    return (_status("VmHWM") if STATUS.exists() else _most_so_far()), kind


def _status(field: str) -> float:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024 / MIB


def _most_so_far() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / MIB
