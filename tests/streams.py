"""Draws, backends and instruction sets that the tests of noise share."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dp2vae_fast.ops import noise

try:
    from dp2vae_fast import _C
except ImportError:
    _C = None

native = pytest.mark.skipif(_C is None, reason="the native module is not built")
ISAS = _C.build_info()["isas"].split() if _C else []
BACKENDS = ["cpp", "reference"] if _C else ["reference"]

# One pass of the kernels holds 128 elements with up to 8 lanes, 256 with 16; threads start at 8192.
LENGTHS = [0, 1, 7, 8, 15, 16, 17, 127, 128, 129, 255, 256, 257, 383, 1031]
MANY = 70_001


def make_key(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (8,), generator=generator).to(torch.int32)


KEY, STEP = make_key(0), torch.tensor(3)


def draw(n: int, key: Tensor = KEY, step: int = 3, mechanism: int = 0, index: int = 0, **how) -> Tensor:
    """Standard normals, as `add_noise_` draws them."""
    z = torch.zeros(n)
    noise.add_noise_([z], key, torch.tensor(step), mechanism, [index], 1.0, **how)
    return z


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()


def ulp_distance(found: Tensor, expected: Tensor) -> Tensor:
    """Distance in units of the float32 spacing at `expected`, which may be float64; smallest normal number up."""
    near = expected.float().abs().clamp(min=torch.finfo(torch.float32).tiny)
    spacing = torch.from_numpy(np.spacing(near.numpy())).double()
    return (found.double() - expected.double()).abs() / spacing
