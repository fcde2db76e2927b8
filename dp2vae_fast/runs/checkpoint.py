"""Files that are either whole or absent: atomic writes, checkpoints, and the identity of a run.

A checkpoint holds the decoder, the optimizer, the step counts and the state of the generator of latents, which
must stay as secret as the curator's other files; never a noise key. It is for the curator's eyes: intermediate
weights are not covered by the report.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch


class RunError(ValueError):
    """A run folder that cannot be used as asked; the message is one line that names it and the way out."""


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that ``path`` is at any moment the old one or the whole new one, synced to disk.

    ``write`` receives a binary file. On any error the temporary file is removed and ``path`` stays as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomic(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON atomically. NaN and infinities are refused: they are not JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def sync_folder(folder: Path) -> None:
    """Make the directory entries of ``folder`` durable."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def remove_temporaries(folder: Path) -> None:
    """Remove what writes that were killed have left behind."""
    for leftover in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            leftover.unlink()


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Save tensors and plain values atomically."""
    write_atomic(path, lambda file: torch.save(state, file))


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """The saved state, on the CPU, or None when there is no such file. Runs no code from the file
    (``weights_only``)."""
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive makes the unpickler raise almost anything
        raise RunError(f"{path} cannot be read as a checkpoint: delete it, or start a new run") from error


def fingerprint(*parts: str) -> str:
    """SHA-256 over the parts, unambiguous in their boundaries."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
