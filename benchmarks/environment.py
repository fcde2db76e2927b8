"""Where a record was made: every file in results/ says so."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import torch

from dp2vae_fast.ops import processor
from dp2vae_fast.runs.environment import versions


def environment() -> dict[str, Any]:
    """Machine, versions and commit."""
    return {
        "processor": processor(),
        **({"gpu": gpu()} if torch.cuda.is_available() else {}),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit(Path(__file__).parent),
    }


def multiply_float32(tf32: bool) -> None:
    """How a GPU multiplies float32 from here on. By the older of PyTorch's switches, which set the newer ones too: the
    newer alone make the older, which compilers read, raise."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32


def gpu() -> dict[str, Any]:
    """The current GPU, and how this process multiplies on it."""
    card, backends = torch.cuda.get_device_properties(torch.cuda.current_device()), torch.backends
    return {
        "name": card.name,
        "capability": f"{card.major}.{card.minor}",
        "memory_gib": round(card.total_memory / 2**30, 1),
        "multiprocessors": card.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": backends.cudnn.version(),
        "cudnn_deterministic": backends.cudnn.deterministic,
        "tuned": sorted(file.stem for file in (Path(__file__).parents[1] / "kernels" / "tuned").glob("*.json")),
    }


def commit(folder: Path | str) -> str:
    """Of the checkout that ``folder`` is in, empty for no folder; "dirty" where files had changed, records apart, which
    grow while made."""
    if not folder:
        return ""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "-uno", "--", ":/", ":(top,exclude)benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + (" dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
