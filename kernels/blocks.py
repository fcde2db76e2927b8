"""Block sizes and launch options of the kernels, by GPU architecture: plain data.

The table below was chosen by reason. ``benchmarks/tune.py`` measures rows on a GPU and writes them to
``tuned/sm_XX.json`` beside this file, ``{"rows": {kernel: [[largest size or null, options], ...]}}``; a kernel that is
not in it keeps the row below.

An entry of a kernel is a list of (largest size that it is for, options), in ascending order; what the size is, each
kernel says. Products have a row for each way to multiply: ``ieee``, float32 on the ordinary cores; ``tf32`` and
``narrow`` (float16, bfloat16) on the tensor cores.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

Options = dict[str, int]
ANY = sys.maxsize

_DEFAULT: dict[str, list[tuple[int, Options]]] = {
    "factors": [(ANY, dict(BLOCK=128, num_warps=4))],
    "square_sums": [
        (4096, dict(BLOCK=512, CHUNK=4096, num_warps=4)),
        (ANY, dict(BLOCK=1024, CHUNK=16384, num_warps=4)),
    ],
    "finish": [(ANY, dict(BLOCK=256, num_warps=4))],
    "one_position": [(1024, dict(BLOCK=256, num_warps=2)), (ANY, dict(BLOCK=1024, num_warps=4))],
    "gram ieee": [
        (16, dict(BLOCK_T=16, BLOCK_K=64, num_warps=2, num_stages=3)),
        (32, dict(BLOCK_T=32, BLOCK_K=32, num_warps=4, num_stages=3)),
        (ANY, dict(BLOCK_T=64, BLOCK_K=32, num_warps=8, num_stages=3)),
    ],
    "gram tf32": [
        (16, dict(BLOCK_T=16, BLOCK_K=64, num_warps=2, num_stages=3)),
        (32, dict(BLOCK_T=32, BLOCK_K=32, num_warps=4, num_stages=3)),
        (64, dict(BLOCK_T=64, BLOCK_K=32, num_warps=4, num_stages=3)),
        (ANY, dict(BLOCK_T=128, BLOCK_K=32, num_warps=8, num_stages=3)),
    ],
    "gram narrow": [
        (16, dict(BLOCK_T=16, BLOCK_K=128, num_warps=2, num_stages=3)),
        (32, dict(BLOCK_T=32, BLOCK_K=128, num_warps=4, num_stages=3)),
        (64, dict(BLOCK_T=64, BLOCK_K=64, num_warps=4, num_stages=3)),
        (ANY, dict(BLOCK_T=128, BLOCK_K=64, num_warps=8, num_stages=3)),
    ],
    "combine": [(ANY, dict(BLOCK_T=32, num_warps=4))],
    "product ieee": [(ANY, dict(BLOCK_P=64, BLOCK_D=64, BLOCK_T=16, num_warps=8, num_stages=3))],
    "product tf32": [(ANY, dict(BLOCK_P=64, BLOCK_D=64, BLOCK_T=32, num_warps=8, num_stages=3))],
    "product narrow": [(ANY, dict(BLOCK_P=64, BLOCK_D=128, BLOCK_T=64, num_warps=8, num_stages=3))],
    # A chunk of 64 positions is two products or more: one would be merged with the addition to what other chunks have.
    "weighted ieee": [
        (16, dict(BLOCK_P=64, BLOCK_D=64, BLOCK_T=16, num_warps=8, num_stages=4)),
        (ANY, dict(BLOCK_P=64, BLOCK_D=64, BLOCK_T=16, num_warps=8, num_stages=2)),
    ],
    "weighted tf32": [
        (16, dict(BLOCK_P=64, BLOCK_D=64, BLOCK_T=16, num_warps=4, num_stages=4)),
        (ANY, dict(BLOCK_P=64, BLOCK_D=64, BLOCK_T=32, num_warps=8, num_stages=2)),
    ],
    "weighted narrow": [
        (16, dict(BLOCK_P=64, BLOCK_D=128, BLOCK_T=16, num_warps=8, num_stages=4)),
        (ANY, dict(BLOCK_P=64, BLOCK_D=128, BLOCK_T=32, num_warps=8, num_stages=3)),
    ],
    "kept": [(ANY, dict(ROWS=8, BLOCK=256, num_warps=4))],
    "add_parts": [(ANY, dict(ROWS=32, BLOCK=64, num_warps=4))],
    "reach": [(ANY, dict(BLOCK_T=16, BLOCK_K=128, num_warps=4))],
    "channels": [(16, dict(BLOCK_C=64, BLOCK_S=16, num_warps=4)), (ANY, dict(BLOCK_C=8, BLOCK_S=256, num_warps=4))],
    "group_norm": [(ANY, dict(BLOCK=128, num_warps=4))],
    "layer_norm": [(1024, dict(ROWS=32, num_warps=4)), (ANY, dict(ROWS=32, num_warps=8))],
    "noise": [(ANY, dict(BLOCK=128, num_warps=4))],
}
Table = dict[str, list[tuple[int, Options]]]
TUNED = Path(__file__).parent / "tuned"


def read(file: Path) -> Table:
    """The rows of a file that ``benchmarks/tune.py`` wrote."""
    kernels = json.loads(file.read_text())["rows"].items()
    return {kernel: [(ANY if largest is None else largest, how) for largest, how in rows] for kernel, rows in kernels}


TABLE: dict[str, Table] = {"default": _DEFAULT, **{file.stem: read(file) for file in sorted(TUNED.glob("*.json"))}}


def architecture(like: Tensor) -> str:
    """``sm_80``, ``sm_90``, ... of the tensor's device, or ``default``."""
    if not like.is_cuda or torch.version.hip is not None:
        return "default"
    major, minor = torch.cuda.get_device_capability(like.device)
    return f"sm_{major}{minor}"


def choose(kernel: str, like: Tensor, size: int = 0) -> Options:
    """The options of ``kernel`` for work of ``size`` on the device of ``like``."""
    rows = TABLE.get(architecture(like), {}).get(kernel) or _DEFAULT[kernel]
    return dict(next(options for largest, options in rows if size <= largest))
