"""Clipping: from the gradients of a batch to one factor a record, and the sensitivity that follows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from .gradients import Gradient


@dataclass(frozen=True)
class FlatClipping:
    """Every record's gradient, over all parameters together, is scaled to norm at most ``max_grad_norm``.

    Args:
        count_rounding: divide by an upper bound of the norm (as computed, plus a bound of its rounding error)
            instead of the
            norm as computed. Off, a record may exceed the bound by rounding: for comparisons only.
    """

    count_rounding: bool = True

    def sensitivity(self, max_grad_norm: float) -> float:
        """Largest change of the clipped sum, in Euclidean norm, when one record is added or removed.

        Covers each record's contribution with the arithmetic that forms it; the rounding of the addition over
        records is not included.
        """
        return max_grad_norm

    def factors(self, gradients: list[Gradient], max_grad_norm: float, scale: float = 1.0) -> Tensor:
        """Weights ``[N]`` for the gradients as captured, such that ``weight * gradient`` is ``c_n * scale * gradient``.

        Args:
            gradients: those of all parameters, each of the same N records.
            max_grad_norm: the bound C; ``c_n = min(1, C / |scale * g_n|)``, 0 for a record that is not finite.
            scale: what the captured gradients must be multiplied with to be those of one record's loss.
        """
        terms = [g.norm_sq() for g in gradients]
        dtype = torch.float64 if any(n.dtype == torch.float64 for n, _ in terms) else torch.float32
        norm_sq = torch.stack([n.to(dtype) for n, _ in terms])
        error = torch.stack([e.to(dtype) for _, e in terms]) if self.count_rounding else torch.zeros_like(norm_sq)
        return scale * ops.clip_factors(norm_sq, error, max_grad_norm / scale)
