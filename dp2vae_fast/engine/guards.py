"""What must not pass in silence while gradients are captured, one guard each.

A guard is a hook, or a check that a hook calls; it raises where a record's gradient would be lost, counted twice or
mixed with another's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def refuse_in_training(message: str) -> Callable[[nn.Module, tuple], None]:
    """Forward pre-hook of a layer that mixes records in training mode."""

    def hook(layer: nn.Module, args: tuple) -> None:
        if layer.training:
            raise NotImplementedError(message)

    return hook


Versions = dict[str, tuple[Tensor, int]]


def buffer_versions(layer: nn.Module) -> Versions:
    """The layer's own buffers and their versions, in training mode."""
    if not layer.training:
        return {}
    found = {key: buffer for key, buffer in layer._buffers.items() if buffer is not None}
    # Of inference tensors nobody counts the version.
    return {key: (buffer, buffer._version) for key, buffer in found.items() if not buffer.is_inference()}


def refuse_changed_buffers(name: str, layer: nn.Module, before: Versions) -> None:
    """What a buffer remembers of the records would be released without noise."""
    for key, (buffer, version) in before.items():
        if layer._buffers.get(key) is not buffer or buffer._version != version:
            raise NotImplementedError(
                f"layer {name!r} ({type(layer).__name__}) updates its buffer {key!r} in training mode: what it "
                "remembers of the records would be released without noise. Put the layer in eval mode"
            )


def watch_buffers(name: str, layer: nn.Module, watching: Callable[[], bool]) -> list[Any]:
    """Hooks that refuse a training forward which changes the layer's own buffers. (In a compiled graph buffers change
    at its end: :mod:`.traced` compares them later.)"""
    before: Versions = {}

    def note(layer: nn.Module, args: tuple) -> None:
        before.clear()
        if not torch.compiler.is_compiling() and watching():
            before.update(buffer_versions(layer))

    def compare(layer: nn.Module, args: tuple, output: Any) -> None:
        if not torch.compiler.is_compiling():
            refuse_changed_buffers(name, layer, before)

    return [layer.register_forward_pre_hook(note), layer.register_forward_hook(compare)]


def refuse_unseen_use(name: str, parameter: Tensor, watching: Callable[[], bool]) -> list[Any]:
    """Hooks on a parameter: an ordinary gradient that arrives there is neither clipped nor noised."""
    arrived = False

    def note(gradient: Tensor | None) -> None:  # None of compiled graphs, for all that they take in
        nonlocal arrived
        arrived = gradient is not None

    def refuse(parameter: Tensor) -> None:
        if not (arrived and watching()):
            return
        parameter.grad = None
        raise NotImplementedError(
            f"parameter {name!r} was used outside its own layer's forward (functional weight tying, a penalty on "
            "weights, a layer in eval mode under gradients): such a use has no per-sample gradient. Call the layer "
            "itself, use the optimizer's weight_decay, or freeze the parameter"
        )

    return [parameter.register_hook(note), parameter.register_post_accumulate_grad_hook(refuse)]


Totals = dict[str, tuple[Tensor, float]]
"""``{parameter: (total of its per-sample gradients, tolerance)}``, an entry of which is used up."""


def watch_totals(name: str, stand_ins: Mapping[str, Tensor | None]) -> Totals:
    """Hooks on a layer's stand-ins that autograd differentiates, and the totals that they compare with: to be filled
    in the backward pass, before autograd's own gradients arrive."""
    totals: Totals = {}
    for key, leaf in stand_ins.items():
        if leaf is not None and leaf.requires_grad:
            leaf.register_post_accumulate_grad_hook(partial(compare_totals, name, key, totals))
    return totals


def compare_totals(name: str, key: str, totals: Totals, leaf: Tensor) -> None:
    """Autograd's own gradient of a stand-in must be the total of the per-sample gradients found for it."""
    total, leaf.grad = leaf.grad, None
    found, tolerance = totals.pop(key, (torch.zeros_like(leaf), 0.0))
    if total is not None and float((found - total).norm()) > tolerance:  # not so where they are NaN
        raise NotImplementedError(
            f"layer {name!r}: the per-sample gradients of parameter {key!r} do not add up to the batch's: the "
            "layer does not treat records independently, or what it makes of the parameter is not in the tensors "
            "that it returns. Register a rule with register_layer_rule, or freeze the parameter"
        )


def refuse_untappable(name: str, layer: nn.Module, arguments: tuple[tuple, dict], outputs: Sequence[Any]) -> None:
    """A layer whose parameters meet no record, or whose output a tap cannot hold, has no per-sample gradient."""
    if not any(isinstance(x, Tensor) for x in tree_leaves(arguments)):
        raise NotImplementedError(
            f"layer {name!r} ({type(layer).__name__}) owns trainable parameters and is called without a tensor "
            "(a parametrization, a learned prior): they have no per-sample gradient. Pass it a tensor with the "
            "batch as its first axis, or freeze its parameters"
        )
    opaque = [x for x in outputs if not isinstance(x, Tensor | int | float | str | None)]
    opaque += [x for x in outputs if isinstance(x, Tensor) and x.is_complex()]
    if opaque:
        raise NotImplementedError(
            f"layer {name!r} ({type(layer).__name__}) owns trainable parameters and returns a "
            f"{type(opaque[0]).__name__}: return real tensors, or tuples, lists or dicts of them, or move its "
            "parameters into a layer of their own"
        )


def check_rows(name: str, outputs: Sequence[Tensor], sizes: set[int], axis: int, rows_per_record: int) -> None:
    """The rows of a layer's outputs, along ``axis``, must be those of the outermost call's inputs, ``sizes``.

    Raises:
        ValueError: they are not.
    """
    rows = {x.shape[axis] if x.dim() > axis else None for x in outputs}
    possible = {size * factor for size in sizes for factor in (1, rows_per_record)}
    if len(rows) != 1 or None in rows or (possible and not rows & possible):
        raise ValueError(
            f"layer {name!r} returns {', '.join(str(tuple(x.shape)) for x in outputs)} in a call on "
            f"{sorted(sizes)} rows: every layer must have the batch as its "
            f"{'second' if axis else 'first'} axis, with rows_per_record = {rows_per_record} rows a record"
        )
