"""What must not pass in silence while gradients are captured, one guard each.

A guard is a hook, or a check that a hook calls; it raises where a record's gradient would be lost, counted twice or
mixed with another's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

_LOOKED_AT_CLOSELY = 3  # calls, and those that the check of the first batch waits for
_VALUES = 2**16  # of a tensor, to know it by: frozen models may be large


def refuse_in_training(message: str) -> Callable[[nn.Module, tuple], None]:
    """Forward pre-hook of a layer that mixes records in training mode."""

    def hook(layer: nn.Module, args: tuple) -> None:
        if layer.training:
            raise NotImplementedError(message)

    return hook


Place = tuple[str, str, int, int]
"""Of a buffer or parameter: its layer, its name there, and what an update changes, version and address."""


class Look(NamedTuple):
    """The buffers and parameters of a module at one moment and, where they are looked at closely, some of their
    values."""

    places: list[Place]
    values: list[Tensor | None] | None

    def by_name(self) -> dict[tuple[str, str], tuple[Place, Tensor | None]]:
        """Place and values of each."""
        values = self.values or [None] * len(self.places)
        return {place[:2]: (place, x) for place, x in zip(self.places, values, strict=True)}


class Memory:
    """The buffers and parameters of a module. No call in training mode may change one, whoever's forward does it: what
    they then remember of the records would be released without noise.

    Versions and addresses tell most changes; an update by way of ``.data`` leaves them, so the first calls are watched
    by values too. From a call's end until gradients are taken, nothing may change either: hooks on the root that come
    after the capture's own, and hooks in the backward pass, see records too.
    """

    def __init__(self, module: nn.Module) -> None:
        self._layers = dict(module.named_modules())
        self._own = [(name, own) for name, m in self._layers.items() for own in (m._buffers, m._parameters)]
        self._looks = 0
        self._since: Look | None = None  # the end of the first call whose gradients may come, until they are taken
        self._may_come = False  # they may: that call was under gradients

    def look(self, *, closely: bool) -> Look | None:
        """What there is when a call begins, for :meth:`compare`; ``closely`` by values. None in eval mode."""
        if not any(layer.training for layer in self._layers.values()):
            return None
        self._looks += 1
        return self._look(closely or self._looks <= _LOOKED_AT_CLOSELY)

    def compare(self, before: Look | None) -> None:
        """What there was ``before`` a call must be there when it ends, unchanged, and nothing else.

        Raises:
            NotImplementedError: a buffer or parameter was changed, added or taken away.
        """
        if before is None:
            return
        now = self._look(before.values is not None)
        if (changed := _changed(before, now)) is None:
            # Not again, nor after a checkpoint's recomputation: what was changed since would be forgotten.
            if self._since is None or not (self._may_come or torch._C._current_graph_task_id() != -1):
                self._since, self._may_come = now, torch.is_grad_enabled()
            return
        layer, named = self._describe(*changed)
        raise NotImplementedError(
            f"layer {layer} updates its {named} in training mode: what it remembers of the records would be released "
            "without noise. Put what updates it in eval mode or, where records have no part in it, update it after "
            "step()"
        )

    def compare_since(self) -> None:
        """What there was when the first call ended must be there when the first gradients are taken.

        Raises:
            NotImplementedError: a buffer or parameter was changed, added or taken away.
        """
        before, self._since = self._since, None
        if before is None or (changed := _changed(before, self._look(before.values is not None))) is None:
            return
        layer, named = self._describe(*changed)
        raise NotImplementedError(
            f"the {named} of layer {layer} was changed between the model's forward and the step (by a hook?): what it "
            "remembers of the records would be released without noise. Where records have no part in it, update it "
            "after step()"
        )

    def forget(self) -> None:
        """No gradients of the last call will be taken."""
        self._since = None

    def _describe(self, name: str, key: str) -> tuple[str, str]:
        layer = self._layers[name]
        return f"{name!r} ({type(layer).__name__})", f"{'buffer' if key in layer._buffers else 'parameter'} {key!r}"

    def _look(self, closely: bool) -> Look:
        there = [(name, key, x) for name, own in self._own for key, x in own.items() if x is not None]
        try:
            places = [(name, key, x._version, x.data_ptr()) for name, key, x in there]
        except RuntimeError:  # of some that have no version, or no data of their own
            places = [(name, key, *_mark(x)) for name, key, x in there]
        return Look(places, [_some_values(x) if _has_values(x) else None for *_, x in there] if closely else None)


def _changed(before: Look, now: Look) -> tuple[str, str] | None:
    """Where the two are not the same."""
    if now.places == before.places and all(map(_equal, now.values or (), before.values or ())):
        return None
    seen, found = before.by_name(), now.by_name()
    return next(name for name in {**seen, **found} if not _same(seen.get(name), found.get(name)))


def _same(one: tuple[Place, Tensor | None] | None, other: tuple[Place, Tensor | None] | None) -> bool:
    return one is not None and other is not None and one[0] == other[0] and _equal(one[1], other[1])


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and torch.equal(one.view(torch.uint8), other.view(torch.uint8))  # NaN is itself


def _mark(x: Tensor) -> tuple[int, int]:
    """What an update of ``x`` changes: its version, or where its data are. (A stand-in has those of its parameter.)"""
    version = 0 if x.is_inference() else x._version
    try:
        return version, x.data_ptr()
    except RuntimeError:  # a sparse tensor, or a subclass that has no data of its own
        return version, id(x)


def _has_values(x: Tensor) -> bool:
    return type(x) in (Tensor, nn.Parameter) and x.layout is torch.strided and not x.is_meta


def _some_values(x: Tensor) -> Tensor:
    """At most :data:`_VALUES` entries, or few more: an update from records changes rows of a table, or all of it."""
    return x.detach().reshape(-1)[:: 1 + x.numel() // _VALUES].clone()


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
            "itself, after model.train(), use the optimizer's weight_decay, or freeze the parameter"
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


def check_rows(
    name: str, outputs: Sequence[Tensor], axis: int, inputs: Sequence[torch.Size], batch: int, rows_per_record: int
) -> None:
    """The rows of a layer's outputs, along ``axis``, must be those of the outermost call's ``inputs``, along ``batch``.

    Raises:
        ValueError: they are not.
    """
    rows = {x.shape[axis] if x.dim() > axis else None for x in outputs}
    expected = {shape[batch] * factor for shape in inputs for factor in (1, rows_per_record)}
    if len(rows) == 1 and None not in rows and (not expected or rows & expected):
        return
    places = ("first", "second")
    want = " or ".join(map(str, sorted(expected))) or "as many"
    found = f"layer {name!r} returns {', '.join(str(tuple(x.shape)) for x in outputs)}: expected {want} rows along the "
    found += f"{places[axis]} axis, "
    found += "one per record" if rows_per_record == 1 else f"with rows_per_record = {rows_per_record}"
    if all(x.dim() > 1 and x.shape[1 - axis] in expected for x in outputs):
        found += f". The {places[1 - axis]} axis has them: see to batch_first, of the layer or of make_private"
    elif rows <= {shape[1] for shape in inputs if batch == 0 and len(shape) > 1}:
        found += (
            ". There is one per position: give it positions for every record, torch.arange(T).expand(N, T), or let a "
            "module add a parameter of its own to the records"
        )
    raise ValueError(found)
