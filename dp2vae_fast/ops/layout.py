"""Tensors as they lie in memory, for what does not care which axis is which."""

from __future__ import annotations

from torch import Tensor


def memory_order(x: Tensor) -> list[int]:
    """The axes of ``x``, the one with the longest strides first."""
    return sorted(range(x.dim()), key=lambda d: -x.stride(d))


def lying(x: Tensor, like: Tensor | None = None) -> Tensor:
    """A view of ``x`` with its axes in the order in which those of ``like`` (itself unless given) lie in memory.

    Contiguous where ``x`` is dense and laid out as ``like`` is: channels last included.
    """
    like = x if like is None else like
    return x if like.is_contiguous() else x.permute(memory_order(like))
