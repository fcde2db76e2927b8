"""What computes a result: versions of the software, and the machine."""

from __future__ import annotations

import platform
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


def circumstances(device: torch.device) -> str:
    """Everything outside the settings on which the bits of a result may depend."""
    machine = [platform.machine(), ops.processor(), ops.instruction_set()]  # a GPU's host initialises and draws latents
    if device.type == "cuda":
        machine.append(torch.cuda.get_device_name(device))
    return f"{sorted(versions().items())} {device.type} {machine} {torch.get_num_threads()} {ops.backends_table()}"
