"""Per-sample gradients of a layer that has no rule: the layer itself, run again record by record under ``vmap(grad)``.

Exact for any layer that treats records independently, and slow: the layer's forward is repeated, and the gradients
are formed. That their total is autograd's own is checked in every batch (:func:`~.guards.compare_totals`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..precision import autocast_as, autocast_dtype
from .guards import Totals

# How far the per-sample gradients may be from autograd's own total, as a part of the sum of their norms. A layer that
# mixes records is off by its whole gradient, rounding by at most ~1e-4 of it in float32, 1e-2 in bfloat16.
_AGREEMENT = {torch.float16: 0.02, torch.bfloat16: 0.1}


class Rerun:
    """One call of a layer, to be run again in the backward pass by record, under the autocast of its forward.

    Args:
        name: the layer's, for messages.
        arguments: positional and keyword arguments of its forward.
        totals: where the totals of the gradients found go.
        kind: type of the device that it runs on.
        axis: 0, or 1 for ``batch_first=False``.

    Attributes:
        tensors: those among the arguments; the call does not keep them, whoever runs it again must.
    """

    def __init__(
        self, name: str, layer: nn.Module, arguments: tuple[tuple, dict], totals: Totals, *, kind: str, axis: int
    ) -> None:
        leaves, self._structure = tree_flatten(arguments)
        self.tensors = [x for x in leaves if isinstance(x, Tensor)]
        self._name, self._layer, self._axis, self._totals = name, layer, axis, totals
        self._is_tensor = [isinstance(x, Tensor) for x in leaves]
        self._constants = [None if isinstance(x, Tensor) else x for x in leaves]
        self._kind, self._autocast = kind, autocast_dtype(kind)

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[tuple, dict]:
        """The arguments of the call, of its ``tensors``."""
        found = iter(tensors)
        leaves = [next(found).detach() if t else x for x, t in zip(self._constants, self._is_tensor, strict=True)]
        return tree_unflatten(leaves, self._structure)

    def grad_samples(self, arguments: tuple[tuple, dict], backprops: list[Tensor]) -> dict[str, Tensor]:
        """:func:`grad_samples` of the call, with their totals noted."""
        try:
            with autocast_as(self._kind, self._autocast):
                found = grad_samples(self._layer, arguments, backprops, axis=self._axis)
        except NotImplementedError as error:
            raise NotImplementedError(f"layer {self._name!r}: {error}") from error
        for key, samples in found.items():
            self._totals[key] = (samples.sum(0), tolerance(samples, arguments, backprops))
        return found


def grad_samples(
    layer: nn.Module, call: tuple[tuple, dict], backprops: list[Tensor], *, axis: int = 0
) -> dict[str, Tensor]:
    """Per-sample gradients of the trainable parameters that ``layer`` owns itself (not its children's).

    Args:
        call: the positional and keyword arguments of the layer's forward. Tensors whose ``axis`` is the batch are
            taken apart by record; everything else is passed as it is.
        backprops: gradient of the loss with respect to each tensor of the output, with the batch as their ``axis``.
        axis: 0, or 1 for ``batch_first=False``.

    Returns:
        ``{parameter name: [N, *shape]}``.

    Raises:
        NotImplementedError: the layer cannot be run by record.
    """
    records = backprops[0].shape[axis]
    owned = {name: p.detach() for name, p in layer.named_parameters(recurse=False) if p.requires_grad}
    leaves, structure = tree_flatten(call)
    batched = [isinstance(x, Tensor) and x.dim() > axis and x.shape[axis] == records for x in leaves]

    def weighted_output(params: dict[str, Tensor], inputs: list[Any], weights: list[Tensor]) -> Tensor:
        args, kwargs = tree_unflatten(inputs, structure)
        outputs = [o for o in tree_leaves(functional_call(layer, params, args, kwargs)) if isinstance(o, Tensor)]
        outputs = [o for o in outputs if o.is_floating_point()]
        return torch.stack([(o * w).sum() for o, w in zip(outputs, weights, strict=True)]).sum()

    def one_record(params: dict[str, Tensor], inputs: list[Tensor], weights: list[Tensor]) -> Tensor:
        rows = iter(inputs)
        full = [next(rows).unsqueeze(axis) if is_batch else x for x, is_batch in zip(leaves, batched, strict=True)]
        return weighted_output(params, full, [w.unsqueeze(axis) for w in weights])

    rows = [x for x, is_batch in zip(leaves, batched, strict=True) if is_batch]
    try:
        return vmap(grad(one_record), in_dims=(None, axis, axis))(owned, rows, backprops)
    except (RuntimeError, ValueError) as error:
        raise NotImplementedError(
            f"{type(layer).__name__} has no per-sample rule and cannot be run record by record "
            f"({str(error).splitlines()[0]}): register one with register_layer_rule, or freeze its parameters"
        ) from error


def tolerance(samples: Tensor, call: tuple[tuple, dict], backprops: list[Tensor]) -> float:
    """How far the total of per-sample gradients may be from autograd's own: a part of their norms, or what rounding
    makes of nothing, where a normalisation that follows takes the gradient away."""
    inputs = [x for x in tree_leaves(call) if isinstance(x, Tensor) and x.is_floating_point() and x.numel()]
    reach = 1.0 + max((float(x.abs().max()) for x in inputs), default=0.0)
    coarsest = max((b.dtype for b in backprops), key=lambda dtype: torch.finfo(dtype).eps)
    nothing = 4 * torch.finfo(coarsest).eps * reach * sum(float(b.abs().sum()) for b in backprops)
    return _AGREEMENT.get(coarsest, 0.01) * float(samples.reshape(len(samples), -1).norm(dim=1).sum()) + nothing
