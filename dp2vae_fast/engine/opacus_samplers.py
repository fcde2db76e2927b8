"""This package's layer rules inside Opacus' own modes, for code that keeps Opacus' engine.

Opacus looks up by a layer's exact type how its per-sample gradients ("hooks") and their norms ("ghost") are computed.
:func:`register_with_opacus` puts the rules of :mod:`.gradients.layers` there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks, GradSampleHooksFastGradientClipping
from torch import Tensor, nn

from .clipping import bounded_norms
from .gradients.gradient import Gradient, Kept
from .gradients.layers import registered_layer_types, rule_of_type, why_not_private
from .gradients.plan import Plan
from .precision import full_precision

Sampler = Callable[..., dict[nn.Parameter, Tensor]]

# Under "ghost" Opacus refuses to use a layer with a norm sampler twice in a forward, so only these types get one: the
# first two have one of its own, and for convolutions it is a gain in time (benchmarks/bench_register.py).
_NO_LOSS = (nn.Linear, nn.Embedding)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# What Opacus' combination of up to 200 norms and its division may lose, in units of the type's epsilon.
_COMBINATION = 64


class Registration:
    """What a call of :func:`register_with_opacus` changed; calling it, or leaving its ``with`` block, restores that."""

    def __init__(self) -> None:
        self._changed: list[tuple[dict[Any, Any], type[nn.Module], Sampler, Sampler | None]] = []

    def put(self, registry: dict[Any, Any], layer_type: type[nn.Module], sampler: Sampler) -> None:
        """Enter ``sampler``, unless it stands there already."""
        before = registry.get(layer_type)
        if before is not sampler:
            registry[layer_type] = sampler
            self._changed.append((registry, layer_type, sampler, before))

    def __call__(self) -> None:
        """Put back what was there before, where nobody has registered anything else since."""
        while self._changed:
            registry, layer_type, sampler, before = self._changed.pop()
            if registry.get(layer_type) is not sampler:
                continue
            if before is None:
                del registry[layer_type]
            else:
                registry[layer_type] = before

    def __enter__(self) -> Registration:
        return self

    def __exit__(self, *_: object) -> None:
        self()


def register_with_opacus(*, conv_norms: bool = True) -> Registration:
    """Use this package's layer rules in Opacus' modes "hooks" and "ghost", in the whole process.

    Every layer type with a rule (:func:`~.gradients.layers.register_layer_rule`; exactly that type) gets a grad
    sampler: transposed convolutions without ``vmap``, convolutions of any ``padding_mode``, memory format and groups,
    normalisation layers without bias, embeddings with ``padding_idx``, empty batches. Linear, embedding and convolution
    layers also get a norm sampler for "ghost", whatever the rank of their input. It returns an upper bound of the norm,
    so that no rounding of the norm lets a record exceed ``max_grad_norm``. Register before or after ``make_private``;
    again changes nothing.

    Example:
        >>> register_with_opacus()  # for good, or
        >>> with register_with_opacus():
        ...     train(opacus.PrivacyEngine())

    Args:
        conv_norms: False leaves convolutions without a norm sampler, as they are in Opacus, which under "ghost" refuses
            layers that have one and are used twice in a forward, or share a weight.

    Returns:
        A function, and context manager, that restores what Opacus had registered before.

    Out of reach from there, and as it was:
        Under "ghost": weight tying (refused between layers with a norm sampler; silently wrong where a function uses a
        layer's weight); a second backward pass before the step; the gradients of Opacus' own second backward pass,
        which round on their own, so that under bfloat16 autocast, and in bfloat16 models, a record may exceed
        ``max_grad_norm`` by that.
        Anywhere: layers called by keyword, unused parameters, a record that is not finite, and the rounding of norms
        that Opacus takes of gradients that were formed ("hooks", and layers without a norm sampler).
    """
    registration = Registration()
    with_norms = _NO_LOSS + (_CONVOLUTIONS if conv_norms else ())
    for layer_type in registered_layer_types():
        registration.put(GradSampleHooks.GRAD_SAMPLERS, layer_type, grad_sampler)
        if layer_type in with_norms:
            registration.put(GradSampleHooksFastGradientClipping.NORM_SAMPLERS, layer_type, norm_sampler)
    return registration


@torch.no_grad()
def grad_sampler(layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Per-sample gradients ``[N, *shape]`` of the trainable parameters of ``layer``, as Opacus asks for them."""
    with full_precision([backprops]):
        return {p: g.grad_sample() for p, g in _gradients(layer, activations, backprops).items()}


@torch.no_grad()
def norm_sampler(layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Upper bounds ``[N]`` of the norms of the per-sample gradients of the trainable parameters of ``layer``."""
    with full_precision([backprops]):
        gradients = _gradients(layer, activations, backprops)
        plan = Plan()
        norm_sq, error = bounded_norms([plan.realize(str(i), g) for i, g in enumerate(gradients.values())])
        bounds = (norm_sq + error).sqrt() * (1 + _COMBINATION * torch.finfo(norm_sq.dtype).eps)
        return dict(zip(gradients, bounds, strict=True))


def _gradients(layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Gradient]:
    """What the layer's rule says, for its own trainable parameters: Opacus wants each of them and no other."""
    trainable = {name: p for name, p in layer.named_parameters(recurse=False) if p.requires_grad}
    if layer.training and (reason := why_not_private(layer)):
        raise NotImplementedError(f"{type(layer).__name__} {reason}")
    if len(backprops) == 0:
        return {p: Kept(p.new_zeros(0, *p.shape)) for p in trainable.values()}
    # By type alone, as Opacus looks it up: sharded layers are subclasses made on the spot.
    rule = next((rule for t in type(layer).__mro__ if (rule := rule_of_type(t))), None)
    found = {} if rule is None or "forward" in vars(layer) else rule(layer, activations[0], backprops)
    if missing := trainable.keys() - found.keys():
        raise NotImplementedError(
            f"{type(layer).__name__}: its rule knows no parameter {min(missing)!r} (weight_norm, or a forward of its "
            "own?): remove the reparametrization, register a rule with register_layer_rule, or freeze it"
        )
    values = {p: found[name] for name, p in trainable.items()}
    return {p: Kept(g) if isinstance(g, Tensor) else g for p, g in values.items()}
