"""Per-sample gradients of a layer that has no rule: the layer itself, run again record by record under ``vmap(grad)``.

Exact for any layer that treats records independently, and slow: the layer's forward is repeated, and the gradients
are formed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

# The sum of per-sample gradients is compared with autograd's own gradient the first time a layer is met. A layer
# that mixes records is off by its whole gradient, rounding by at most ~1e-4 of it in float32.
_AGREEMENT = 1e-2


def grad_samples(
    layer: nn.Module, call: tuple[tuple, dict], backprops: list[Tensor], *, verify: bool
) -> dict[str, Tensor]:
    """Per-sample gradients of the trainable parameters that ``layer`` owns itself (not its children's).

    Args:
        call: the positional and keyword arguments of the layer's forward. Tensors whose first axis is the batch are
            taken apart by record; everything else is passed as it is.
        backprops: gradient of the loss with respect to each tensor of the output, batch first.
        verify: compare the sum over records with autograd's gradient of the whole batch.

    Returns:
        ``{parameter name: [N, *shape]}``.

    Raises:
        NotImplementedError: the layer cannot be run by record, or treats records together.
    """
    records = backprops[0].shape[0]
    owned = {name: p.detach() for name, p in layer.named_parameters(recurse=False) if p.requires_grad}
    leaves, structure = tree_flatten(call)
    batched = [isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] == records for x in leaves]

    def weighted_output(params: dict[str, Tensor], inputs: list[Any], weights: list[Tensor]) -> Tensor:
        args, kwargs = tree_unflatten(inputs, structure)
        outputs = [o for o in tree_flatten(functional_call(layer, params, args, kwargs))[0] if isinstance(o, Tensor)]
        return torch.stack([(o * w).sum() for o, w in zip(outputs, weights, strict=True)]).sum()

    def one_record(params: dict[str, Tensor], inputs: list[Tensor], weights: list[Tensor]) -> Tensor:
        rows = iter(inputs)
        full = [next(rows).unsqueeze(0) if is_batch else x for x, is_batch in zip(leaves, batched, strict=True)]
        return weighted_output(params, full, [w.unsqueeze(0) for w in weights])

    rows = [x for x, is_batch in zip(leaves, batched, strict=True) if is_batch]
    try:
        samples = vmap(grad(one_record), in_dims=(None, 0, 0))(owned, rows, backprops)
    except (RuntimeError, ValueError) as error:
        raise NotImplementedError(
            f"{type(layer).__name__} has no per-sample rule and cannot be run record by record "
            f"({str(error).splitlines()[0]}): register one with register_layer_rule, or freeze its parameters"
        ) from error
    if verify:
        whole = grad(weighted_output)(owned, leaves, backprops)
        for name, total in whole.items():
            if (samples[name].sum(0) - total).norm() > _AGREEMENT * total.norm() + torch.finfo(total.dtype).tiny:
                raise NotImplementedError(
                    f"{type(layer).__name__} does not treat records independently (parameter {name!r}: the per-sample "
                    "gradients do not add up to the batch's): register a rule with register_layer_rule, or freeze its "
                    "parameters"
                )
    return samples
