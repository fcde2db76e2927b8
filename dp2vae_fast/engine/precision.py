"""In which precision sums over records are formed, and how far their rounding can move them."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from contextlib import ExitStack

import torch
from torch import Tensor

from ..ops._op import device_type
from ..ops.gradient import PARTS_PER_BLOCK, RECORDS_PER_PART
from ..ops.norm import MMA_ROUNDINGS

# Physical batches of a step, whose sums are added in float32; those of more are added in float64, which takes memory.
BATCHES_IN_FLOAT32 = 4
# A draw has more records than `records_at_most` with a probability below this.
_DRAW_TAIL = 2.0**-64
# Positions that a product over positions may have; with more, gradients are formed and kept.
MAX_POSITIONS = 2**12
# Part of float32's error bound that a norm still counts where it has been taken again in float64.
STILL_COUNTED = 1 / 256


def full_precision(tensors: Iterable[Tensor]) -> ExitStack:
    """Context without autocast on the devices of ``tensors``: norms and sums keep float32 wherever the user's loop
    stands."""
    stack = ExitStack()
    for kind in {device_type(x) for x in tensors}:
        if torch.is_autocast_enabled(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
    return stack


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast casts to on such devices here; None where it is off."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def autocast_as(device_type: str, dtype: torch.dtype | None) -> torch.autocast:
    """Context with autocast as :func:`autocast_dtype` found it."""
    return torch.autocast(device_type, dtype=dtype, enabled=dtype is not None, cache_enabled=False)


def records_at_most(expected: float) -> int:
    """Records that a Poisson draw of ``expected`` ones exceeds with probability below 2^-64.

    Chernoff's bound ``P(X >= m + t) <= exp(-t^2 / (2 (m + t/3)))`` for any sum of independent coins of mean m.
    """
    tail = -math.log(_DRAW_TAIL)
    return math.ceil(expected + tail / 3 + math.sqrt((tail / 3) ** 2 + 2 * tail * expected))


def roundings_on(device: torch.device) -> int:
    """Of an addition within a part of a sum over records on such a device: three where layers of one position may be
    multiplied on tensor cores, as TF32."""
    tf32 = str(torch.backends.cuda.matmul.fp32_precision) == "tf32"  # type: ignore[attr-defined]
    return MMA_ROUNDINGS if tf32 and device.type != "cpu" else 1


@functools.lru_cache(maxsize=16)  # a step asks for the same each time
def sum_rounding(
    expected_records: float, dtype: torch.dtype = torch.float32, largest: float = 0, roundings: int = 1
) -> float:
    """How far rounding can move the clipped sum when one record joins or leaves, in units of the clipping bound C.

    An addition rounds the sum of some terms ``c_n g_n`` by at most u times what their lengths add up to, u being the
    unit roundoff of ``dtype``, and adding zero rounds nothing. So a number of the sum is off by at most u times the sum
    of ``k_n |c_n g_n|``, where the n-th term passes through ``k_n`` additions (Higham, *Accuracy and Stability of
    Numerical Algorithms*, ch. 4). For m terms, added in whatever order, the squares of the ``k_n`` add up to most where
    one term is added after the other, to less than ``1 + 4 + ... + m^2``. So by Cauchy and Schwarz m terms at most C
    long are off by at most ``r m u C``, with the root mean square r of 1 to m, even if every number of the sum has an
    order of its own.

    Records are added in parts of :data:`RECORDS_PER_PART`, whose r is 74.3, :data:`PARTS_PER_BLOCK` parts in turn and
    :data:`BATCHES_IN_FLOAT32` physical batches in turn; more parts, more batches and what other ranks have in float64,
    and the total is rounded once. With ``h = r + PARTS_PER_BLOCK + BATCHES_IN_FLOAT32 + 4`` each of the two sums is off
    by at most ``h u B C`` for at most B records: ``2 h u B`` together. Tensor cores, which cut off what does not align,
    are counted by the longest path instead.

    Where a weight is used at several positions, the C++ and Triton kernels form each record's product apart from all
    others and add it as one term. It differs from the exact gradient by the rounding of that record's own product,
    which the error bound of its norm counts (:mod:`dp2vae_fast.ops.norm`), so it too is at most C long.

    The references add up the positions of all records of a part in float64 instead, and then the parts. There a term is
    not a record's contribution but a piece of it, and pieces may cancel: the lengths of a record's T pieces add up to
    at most ``C / sqrt(2 T u s)``, since its clip factor counts at least the part s = :data:`STILL_COUNTED` of float32's
    error bound ``2 T u (sum of lengths)^2`` (:mod:`.clipping`). With ``RECORDS_PER_PART T`` additions of unit roundoff
    2^-53 in a part, and fewer than B of parts, that is the second term, which is added whatever the kernels. (Norms of
    float64 operands have an error term of their own size; for them it is an estimate.)

    Args:
        expected_records: of a Poisson draw.
        largest: records of the largest batch, where batches are drawn otherwise.
        roundings: of an addition within a part (:func:`roundings_on`).
    """
    records = max(records_at_most(expected_records), largest)
    unit = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    pieces = math.sqrt(MAX_POSITIONS / (2 * 2.0**-24 * STILL_COUNTED))
    products = 2.0**-53 * (RECORDS_PER_PART * pieces + records)
    one_by_one = math.sqrt((RECORDS_PER_PART + 1) * (2 * RECORDS_PER_PART + 1) / 6)
    in_a_part = one_by_one if roundings == 1 else roundings * RECORDS_PER_PART
    depth = in_a_part + PARTS_PER_BLOCK + BATCHES_IN_FLOAT32 + 4
    return 1.01 * 2 * records * (depth * unit + products)
