"""One rule per layer type: from what a layer saw in one backward pass to the per-sample gradients of its parameters.

A rule is a function ``rule(layer, activations, backprops) -> {parameter name: gradient}``. ``activations`` is the
layer's input and ``backprops`` the gradient with respect to its output, both with the batch first. A gradient is
either a tensor ``[N, *shape]`` or one of :mod:`.products`. The rule may compute all the layer's parameters; the caller
drops the frozen ones.

Add a layer of your own with :func:`register_layer_rule`. A layer without a rule is differentiated record by record with
``vmap`` (:mod:`..capture.fallback`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import ops
from .gradient import Gradient
from .products import ConvGeometry, ConvProduct, EmbeddingProduct, LinearProduct

LayerRule = Callable[[Any, Tensor, Tensor], Mapping[str, Gradient | Tensor]]
Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d

_RULES: dict[type[nn.Module], LayerRule] = {}
# Overriding these in a subclass does not change what the layer computes.
_HARMLESS_OVERRIDES = {
    "__init__",
    "__repr__",
    "extra_repr",
    "reset_parameters",
    "__module__",
    "__doc__",
    "__qualname__",
}


def register_layer_rule(*layer_types: type[nn.Module]) -> Callable[[LayerRule], LayerRule]:
    """Decorator: use the function as the rule of the given layer types, replacing any earlier one.

    Example:
        >>> @register_layer_rule(Scale)                       # y = x * self.weight, weight [D]
        ... def scale_rule(layer, activations, backprops):    # [N, T, D], [N, T, D]
        ...     return {"weight": (activations * backprops).sum(1)}
    """

    def register(rule: LayerRule) -> LayerRule:
        for layer_type in layer_types:
            _RULES[layer_type] = rule
        return rule

    return register


def find_rule(layer: nn.Module) -> LayerRule | None:
    """The rule for ``layer``: its own type's, or that of a base class whose computation the subclass, and the object
    itself, leave as it is."""
    if "forward" in vars(layer):
        return None
    for layer_type in type(layer).__mro__:
        if layer_type in _RULES:
            return _RULES[layer_type]
        if any(callable(value) and name not in _HARMLESS_OVERRIDES for name, value in vars(layer_type).items()):
            return None
    return None


@register_layer_rule(nn.Linear)
def linear_rule(layer: nn.Linear, activations: Tensor, backprops: Tensor) -> dict[str, Gradient | Tensor]:
    """Any rank of input: ``[N, *, D] -> [N, *, P]``; the positions ``*`` become one axis T."""
    n, positions = activations.shape[0], math.prod(activations.shape[1:-1])
    activations = activations.reshape(n, positions, activations.shape[-1])
    backprops = backprops.reshape(n, positions, backprops.shape[-1])
    bias = backprops.squeeze(1) if positions == 1 else ops.widen(backprops).sum(1)
    return {"weight": LinearProduct(activations, backprops), "bias": bias}


@register_layer_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def conv_rule(layer: Conv, activations: Tensor, backprops: Tensor) -> dict[str, Gradient | Tensor]:
    """Convolutions of one to three dimensions: stride, padding (``"same"`` and ``padding_mode`` too), dilation,
    groups."""
    dims = layer.weight.dim() - 2
    if activations.dim() != dims + 2:
        raise ValueError(f"{type(layer).__name__} was given {activations.dim()} axes: pass it a batch, [N, C, *]")
    padding = layer.padding
    sides = _explicit_padding(layer)
    if sides is not None:
        activations = F.pad(
            activations, sides, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode
        )
        padding = 0
    elif isinstance(padding, str):  # "valid"
        padding = 0
    shape, stride = tuple(layer.weight.shape), ops.per_dim(layer.stride, dims, "stride")
    padding, dilation = ops.per_dim(padding, dims, "padding"), ops.per_dim(layer.dilation, dims, "dilation")
    geometry = ConvGeometry(shape, tuple(stride), tuple(padding), tuple(dilation), layer.groups, layer.transposed)
    bias = ops.widen(backprops).flatten(2).sum(2)
    return {"weight": ConvProduct(activations, backprops, geometry), "bias": bias}


def _explicit_padding(layer: Conv) -> list[int] | None:
    """``F.pad`` amounts where a convolution's own padding argument cannot say it: other modes than zeros, lopsided
    "same"."""
    if layer.transposed or (layer.padding_mode == "zeros" and layer.padding != "same"):
        return None
    sides: list[int] = []
    for dim in reversed(range(layer.weight.dim() - 2)):
        if layer.padding == "same":
            total = layer.dilation[dim] * (layer.kernel_size[dim] - 1)
            sides += [total // 2, total - total // 2]
        elif isinstance(layer.padding, str):  # "valid"
            sides += [0, 0]
        else:
            sides += [layer.padding[dim]] * 2
    return sides


def _group_norm(groups: int, eps: float, activations: Tensor, backprops: Tensor) -> dict[str, Gradient | Tensor]:
    sites = (*activations.shape[:2], math.prod(activations.shape[2:]))
    weight, bias = ops.group_norm_grad_sample(activations.reshape(sites), backprops.reshape(sites), groups, eps)
    return {"weight": weight, "bias": bias}


@register_layer_rule(nn.GroupNorm)
def group_norm_rule(layer: nn.GroupNorm, activations: Tensor, backprops: Tensor) -> dict[str, Gradient | Tensor]:
    """``[N, C, *]``, normalised within each record and group."""
    return _group_norm(layer.num_groups, layer.eps, activations, backprops)


@register_layer_rule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def instance_norm_rule(
    layer: nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d, activations: Tensor, backprops: Tensor
) -> dict[str, Gradient | Tensor]:
    """``[N, C, *]``, normalised within each record and channel (running statistics are refused at attachment)."""
    return _group_norm(activations.shape[1], layer.eps, activations, backprops)


@register_layer_rule(nn.LayerNorm, nn.RMSNorm)
def layer_norm_rule(
    layer: nn.LayerNorm | nn.RMSNorm, activations: Tensor, backprops: Tensor
) -> dict[str, Gradient | Tensor]:
    """``[N, *, *normalized_shape]``: the positions before the normalised dimensions are summed."""
    shape, n = tuple(layer.normalized_shape), activations.shape[0]
    rows = (n, math.prod(activations.shape[1 : activations.dim() - len(shape)]), math.prod(shape))
    rms = isinstance(layer, nn.RMSNorm)
    eps = torch.finfo(activations.dtype).eps if layer.eps is None else layer.eps  # as RMSNorm itself
    weight, bias = ops.layer_norm_grad_sample(activations.reshape(rows), backprops.reshape(rows), rms, eps)
    return {"weight": weight.reshape(n, *shape), "bias": bias.reshape(n, *shape)}


@register_layer_rule(nn.Embedding)
def embedding_rule(layer: nn.Embedding, activations: Tensor, backprops: Tensor) -> dict[str, Gradient | Tensor]:
    """Indices ``[N, *]``; rows at ``padding_idx`` have no gradient."""
    n = activations.shape[0]
    positions = math.prod(activations.shape[1:])
    padding_idx = -1 if layer.padding_idx is None else layer.padding_idx
    return {
        "weight": EmbeddingProduct(
            activations.reshape(n, positions),
            backprops.reshape(n, positions, backprops.shape[-1]),
            layer.num_embeddings,
            padding_idx,
        )
    }


def rule_of_type(layer_type: type[nn.Module]) -> LayerRule | None:
    """The rule registered for exactly this type."""
    return _RULES.get(layer_type)


def registered_layer_types() -> tuple[type[nn.Module], ...]:
    """The layer types that have a rule, in order of registration."""
    return tuple(_RULES)


def why_not_private(layer: nn.Module) -> str | None:
    """Why ``layer``, in training mode, would mix records or remember them, or has no per-sample rule at all; None where
    it can be trained."""
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        return "normalises over the batch: use nn.GroupNorm, or put it in eval mode with its parameters frozen"
    if isinstance(layer, nn.modules.instancenorm._InstanceNorm) and layer.track_running_stats:
        return "keeps running statistics of the records: construct it with track_running_stats=False"
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
        if layer.max_norm is not None:
            return "rewrites its own table without noise (max_norm): construct it without max_norm"
        if layer.scale_grad_by_freq or layer.sparse:
            return "counts its indices over the batch (scale_grad_by_freq, sparse): construct it without these options"
    if isinstance(layer, nn.RNNBase):
        return "has no per-sample rule: use opacus.layers.DPLSTM, DPGRU or DPRNN"
    if hasattr(layer, "weight_u") or type(layer).__name__ == "_SpectralNorm":
        return "updates a spectral-norm buffer in training mode: remove spectral_norm"
    return None
