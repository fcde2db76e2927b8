"""Where a record was made: every file in results/ says so."""

from __future__ import annotations

import os
import subprocess
from typing import Any

import torch

from dp2vae_fast.ops import processor
from dp2vae_fast.runs.environment import versions


def environment() -> dict[str, Any]:
    """Machine, versions and commit ("dirty" where files had changed)."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": _commit(),
    }


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (" dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
