"""Timing the ways of taking a gradient on this machine, and remembering what was found.

The operands are random numbers of a fixed number of records, so that nothing of a batch goes into a choice; PyTorch's
generators are left as they were.
"""

from __future__ import annotations

import json
import os
import time
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ... import ops
from .cost import Method
from .products import Product

_RECORDS, _REPEATS = 16, 5


def cache_file() -> Path:
    """Where timings are kept: ``$DP2VAE_FAST_CACHE``, or below the user's cache folder."""
    if named := os.environ.get("DP2VAE_FAST_CACHE"):
        return Path(named) / "timings.json"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dp2vae_fast" / "timings.json"


def measured(gradient: Product, method: Method) -> float:
    """Nanoseconds a record by ``method``: norm and weighted sum; from the cache, or taken now."""
    key = f"{_machine(gradient)} {gradient.describe()} {method}"
    known = _read()
    if key not in known:
        with torch.random.fork_rng([gradient.device] if gradient.device.type == "cuda" else []):
            known[key] = _time(gradient.like(_RECORDS), method)
        _write(known)
    return known[key]


def _time(gradient: Product, method: Method) -> float:
    factors = torch.linspace(0.5, 1.0, gradient.records, device=gradient.device)
    took = []
    for _ in range(_REPEATS):
        _synchronize(gradient.device)
        start = time.perf_counter_ns()
        form = {"gram": lambda: gradient, "direct": gradient.directly, "kept": gradient.kept}[method]()
        form.norm_sq()
        form.weighted_sum(factors)
        _synchronize(gradient.device)
        took.append(time.perf_counter_ns() - start)
    return min(took) / gradient.records


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _machine(gradient: Product) -> str:
    """Everything outside the shape that a time depends on."""
    if gradient.device.type == "cuda":
        return f"{torch.cuda.get_device_name(gradient.device)} {_software()}"
    return f"{ops.processor()} {torch.get_num_threads()} {ops.instruction_set()} {_software()}"


@cache
def _software() -> str:
    return f"torch {torch.__version__} dp2vae_fast {metadata.version('dp2vae_fast')}"


def _read() -> dict[str, Any]:
    try:
        found = json.loads(cache_file().read_text())
    except (OSError, ValueError):  # none yet, or not ours to mend: times are taken again
        return {}
    return found if isinstance(found, dict) else {}


def _write(known: dict[str, float]) -> None:
    """Atomically; a cache that cannot be written is done without."""
    file = cache_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps(known, indent=1, sort_keys=True))
        new.replace(file)
    except OSError:
        return
