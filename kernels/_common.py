"""What the kernels share: which tensors they take, how they are launched, and how many roundings their sums make.

House rules: sums are float32 whatever the operands are, offsets that grow with the batch are int64, a masked load is
zero, and nothing is added atomically, so that a result is the same to the bit whenever it is computed again.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from dp2vae_fast.ops.norm import MMA_ROUNDINGS, _gamma

INTERPRETED: bool = knobs.runtime.interpret  # as when the kernels are decorated, that is now
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TINY = torch.finfo(torch.float32).tiny
# TF32 products read the upper bits of float32 operands: cut off, not rounded, they are off by at most this.
_TF32_CUT = 2.0**-10


def launch(kernel: Any, programs: int, like: Tensor, *arguments: Any, **options: Any) -> None:
    """Run that many programs of a kernel on the device of ``like``, on its current stream."""
    if programs == 0:
        return
    with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
        kernel[(programs,)](*arguments, **options)


def takes(*tensors: Tensor, dtypes: tuple[torch.dtype, ...] = DTYPES) -> bool | str:
    """Whether the kernels run on such tensors here; if not, why not."""
    for x in tensors:
        if x.device.type == "cpu" and not INTERPRETED:
            return "Triton runs on CPU tensors under TRITON_INTERPRET=1 only"
        if x.device.type not in ("cpu", "cuda"):
            return f"the kernels do not run on {x.device.type} tensors"
        if x.device != tensors[0].device:
            return "the tensors are on several devices"
        if x.dtype not in dtypes:
            return f"the kernels take {', '.join(str(d).removeprefix('torch.') for d in dtypes)}"
    return True


def tf32_allowed(like: Tensor, convolution: bool) -> bool:
    """Whether the user lets PyTorch multiply float32 as TF32 on this device."""
    backends: Any = torch.backends
    setting = backends.cudnn.conv if convolution else backends.cuda.matmul
    return like.is_cuda and str(setting.fp32_precision) == "tf32"


class Dot:
    """How matrix products of operands like ``x`` are formed: the options of the kernels, and what they lose."""

    def __init__(self, x: Tensor, convolution: bool = False, upcast: bool = False) -> None:
        # The interpreter multiplies the bits of bfloat16 as if they were integers.
        self.upcast = upcast or (INTERPRETED and x.dtype == torch.bfloat16)
        tf32 = x.dtype == torch.float32 and tf32_allowed(x, convolution)
        self.precision = "tf32" if tf32 else "ieee"
        wide = self.upcast or x.dtype == torch.float32
        self.kind = "tf32" if tf32 else "ieee" if wide else "narrow"  # of the rows of `blocks`
        self.mma = self.kind != "ieee" or torch.version.hip is not None  # AMD's matrix cores take float32 too
        self.cut = _TF32_CUT if tf32 else 0.0

    def depth(self, length: int) -> int:
        """Roundings, in units of 2^-24, that a term of a sum of ``length`` products passes through at most."""
        return length * (MMA_ROUNDINGS if self.mma else 1)


def slowest(*dots: Dot) -> str:
    """The kind of a kernel that forms several products."""
    return min((dot.kind for dot in dots), key=("ieee", "tf32", "narrow").index)


def sum_depth(length: int, lanes: int) -> int:
    """Additions that a term passes through when ``length`` terms are added in ``lanes`` accumulators, which are then
    added in any order."""
    return min(length, -(-length // lanes) + lanes)


def relative_error(depth: int, like: Tensor, *dots: Dot) -> float:
    """Factor by which the reach of a sum bounds its error, for ``depth`` roundings a term.

    On top of what :func:`~dp2vae_fast.ops.norm._gamma` counts for operands that the later weighted sum rounds: each of
    these products cuts off two operands.
    """
    return _gamma(depth, like.new_empty(0, dtype=torch.float32)) + 1.02 * 2 * sum(dot.cut for dot in dots)


def flat_rows(x: Tensor) -> Tensor:
    """``x`` as ``[N, M]``, each record in the order of its memory: without a copy where that has no gaps."""
    axes = sorted(range(1, x.dim()), key=lambda axis: x.stride(axis), reverse=True)
    ordered = x.permute(0, *axes)
    rows = ordered.reshape(x.shape[0], ordered.shape[1:].numel())
    return rows if rows.stride(1) == 1 else rows.contiguous()


@triton.jit
def positive_part(x):
    """max(x, 0), but NaN stays."""
    return tl.where(x < 0, 0.0, x)


@triton.jit
def tile_pair(k):
    """The k-th pair (i, j) of tiles, i <= j, in the order of j."""
    j = ((tl.sqrt_rn(8.0 * k.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    j = tl.where(j * (j + 1) // 2 > k, j - 1, j)  # the root was rounded
    j = tl.where((j + 1) * (j + 2) // 2 <= k, j + 1, j)
    return k - j * (j + 1) // 2, j
