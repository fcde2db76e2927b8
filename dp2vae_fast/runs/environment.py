"""What computes a result: versions of the software, and the machine."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

import torch

from .. import ops


def versions() -> dict[str, str]:
    """Versions of what computed the result."""
    found = {"python": platform.python_version()}
    for name in ("dp2vae_fast", "torch", "opacus", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


@contextmanager
def on_threads(number: int | None) -> Iterator[None]:
    """PyTorch uses so many threads inside, and as many as before afterwards; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def circumstances(device: torch.device) -> str:
    """Everything outside the settings on which the bits of a result may depend."""
    machine = [platform.machine(), ops.processor(), ops.instruction_set()]  # a GPU's host initialises and draws latents
    if device.type == "cuda":
        machine.append(torch.cuda.get_device_name(device))
    return f"{sorted(versions().items())} {device.type} {machine} {torch.get_num_threads()} {ops.backends_table()}"
