"""Resident memory of this process, and the most of it since a reset."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from collections.abc import Callable
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MIB = 2**20


def give_back() -> None:
    """Return free memory to the system, where the C library can."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def resident() -> float:
    """MiB in use now; the most so far where the system does not say."""
    return _status("VmRSS") if STATUS.exists() else _most_so_far()


def peak_of(step: Callable[[], object], times: int = 2) -> tuple[float, str]:
    """The most MiB in use during a step, and how that was measured."""
    give_back()
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
