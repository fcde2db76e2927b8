"""The hooks on one module: its parameters are replaced while its forward runs, and its output is tapped.

Its trainable parameters make way for detached tensors, so that autograd computes input gradients only. An identity node
on its output (:mod:`.tap`) holds its input and, in the backward pass, hands that on together with the output gradient.
The layer's rule turns the pair into per-sample gradients, which go into the :class:`~.book.Book`. A layer without a
rule is run again instead (:mod:`.fallback`).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from opacus.layers.dp_rnn import RNNLinear
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..gradients.gradient import Kept
from ..gradients.layers import LayerRule, find_rule
from . import guards
from .book import Origin
from .fallback import Rerun

if TYPE_CHECKING:
    from .capture import Capture


class Hooks:
    """The hooks on ``module``: round calls of the root, a container or what has buffers alone, and on a layer with
    parameters of its own.

    A copy of the module carries them too; they pass over it.

    Attributes:
        number: of the module, in the order of all.
        keys: the parameters that are its own, not its children's.
        rule: from what it sees to their gradients; None where it is run again.
    """

    def __init__(self, capture: Capture, number: int, name: str, module: nn.Module) -> None:
        self.module = module
        self.number = number
        self.name = name
        inner = {p for child in module.children() for p in child.parameters()}  # what is theirs is used there
        self.keys = [key for key, p in module.named_parameters(recurse=False) if p not in inner]
        self.rule = find_rule(module) if self.keys else None
        own = [key for key in self.keys if (p := module._parameters[key]) is not None and p.requires_grad]
        if own and inner and self.rule is None:
            warnings.warn(
                f"parameter {own[0]!r} belongs to {type(module).__name__} itself, whose forward is then repeated "
                "record by record: move it into a small module of its own to be fast",
                stacklevel=2,
            )
        # Opacus' recurrent layers call their cells step by step, on [N, features], whatever their batch_first.
        self._axis = 0 if capture.batch_first or isinstance(module, RNNLinear) else 1
        self._capture = capture
        self._calls, self._taps, self._book = capture.calls, capture.taps, capture.book
        self._swapped: dict[str, Tensor] | None = None
        self._handles: list[Any] = []
        whole = module is capture.module or next(module.children(), None) is not None
        if whole or (module._buffers and not self.keys):
            self._handles += [
                module.register_forward_pre_hook(self._open, prepend=True, with_kwargs=True),
                module.register_forward_hook(self._close, always_call=True),
            ]
        if self.keys:
            self._handles += [
                module.register_forward_pre_hook(self._enter, with_kwargs=True),
                # First of all hooks: the output as the layer made it, before another hook changes it.
                module.register_forward_hook(self._leave, prepend=True, with_kwargs=True, always_call=True),
            ]

    @staticmethod
    def are_on(module: nn.Module) -> bool:
        """Whether ``module`` is hooked, and not as a copy."""
        owners = (getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values())
        return any(isinstance(owner, Hooks) and owner.module is module for owner in owners)

    def remove(self) -> None:
        """Take them off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._put_back()

    def __deepcopy__(self, memo: dict) -> Hooks:
        """The same, on a copy of the module."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a private module holds hooks: save its state_dict(), or to_standard_module() after training")

    # Round a call of the root or a container -------------------------------------------------------------------------

    def _open(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not self._calls.at_rest and module is self.module:
            self._calls.open(self.number, module, args, kwargs)

    def _close(self, module: nn.Module, args: tuple, output: Any) -> Any:
        return self._calls.close(module, output) if module is self.module else None

    # Round a layer's -------------------------------------------------------------------------------------------------

    def _enter(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before a layer's forward: put stand-ins in place of its trainable parameters.

        They are detached, so that autograd forms no weight gradient; those of a layer without a rule it does
        differentiate, for :func:`~.guards.compare_totals`.
        """
        calls = self._calls
        if calls.at_rest or layer is not self.module:
            return
        if calls.outermost is not layer:
            calls.begin(self.number, layer, args, kwargs)
        if self._swapped is not None:  # its last forward was interrupted, or is still running: it calls itself
            # What that forward made of them is in no tap.
            guards.watch_totals(self.name, {key: layer._parameters[key] for key in self._swapped})
            self._put_back()
        if not torch.is_grad_enabled() or not layer.training:
            return
        # In this order: a graph must not depend on the records of before.
        if not torch.compiler.is_compiling() and self._book.records is not None:
            self._capture.begin_batch()
        trainable: dict[str, Tensor] = {
            key: p for key in self.keys if (p := layer._parameters.get(key)) is not None and p.requires_grad
        }
        if trainable:
            self._swapped = trainable
            stand_ins = {key: p.detach() for key, p in trainable.items()}
            if self.rule is None:
                stand_ins = {key: p.requires_grad_() for key, p in stand_ins.items()}
            layer._parameters.update(stand_ins)  # type: ignore[arg-type]

    def _put_back(self) -> None:
        """The parameters take the place of their stand-ins again."""
        self.module._parameters.update(self._swapped or {})  # type: ignore[arg-type]
        self._swapped = None

    def _leave(self, layer: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """After a layer's forward: put the parameters back and tap the output. Runs after an exception too."""
        if layer is not self.module:
            return None
        tapped = self._tap(layer, args, kwargs, output)
        if self._calls.outermost is layer:
            return tapped
        ended = self._calls.end(layer, output if tapped is None else tapped)
        return tapped if ended is None else ended

    def _tap(self, layer: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        trainable = self._swapped
        if trainable is None:
            return None
        stand_ins: dict[str, Any] = {key: layer._parameters[key] for key in trainable}
        self._put_back()
        if output is None:
            return None
        first = args[0] if args else next(iter(kwargs.values()), None)
        if (rule := self.rule) is None or not (
            isinstance(output, Tensor) and output.is_floating_point() and isinstance(first, Tensor)
        ):
            return self._tap_any(layer, trainable, stand_ins, (args, kwargs), output)
        calls, capture = self._calls, self._capture
        if calls.ticket is not None:
            return calls.traced.tap(calls.ticket, self.number, list(trainable), first, output)
        self._check_rows([output], calls.shapes)
        draws = capture.draws()

        def report(saved: tuple[Tensor, ...], backprops: tuple[Tensor, ...]) -> None:
            if self._taps.wants_report():
                self._record(layer, rule, trainable, saved[0].detach(), list(backprops), draws)

        return self._taps.on([output], [first], report)[0]

    def _tap_any(
        self,
        layer: nn.Module,
        trainable: dict[str, Tensor],
        stand_ins: dict[str, Tensor],
        arguments: tuple[tuple, dict],
        output: Any,
    ) -> Any:
        """Tap a layer without a rule, or one called with or returning several tensors."""
        totals = guards.watch_totals(self.name, stand_ins)
        outputs, structure = tree_flatten(output)
        guards.refuse_untappable(self.name, layer, arguments, outputs)
        tapped = [i for i, x in enumerate(outputs) if isinstance(x, Tensor) and x.is_floating_point()]
        if not tapped:
            return None
        rows = [outputs[i] for i in tapped]
        self._check_rows(rows, self._calls.shapes)
        draws = self._capture.draws()
        rerun = Rerun(self.name, layer, arguments, totals, kind=rows[0].device.type, axis=self._axis)

        def report(saved: tuple[Tensor, ...], backprops: tuple[Tensor, ...]) -> None:
            if not self._taps.wants_report():
                return
            args, kwargs = again = rerun.arguments(saved)

            def run_again(*_: Any) -> dict[str, Tensor]:
                with self._calls.resting():
                    return rerun.grad_samples(again, list(backprops))

            activations = args[0] if args else next(iter(kwargs.values()))
            self._record(layer, self.rule or run_again, trainable, activations, list(backprops), draws)

        for i, x in zip(tapped, self._taps.on(rows, rerun.tensors, report), strict=True):
            outputs[i] = x
        return tree_unflatten(outputs, structure)

    def _check_rows(self, outputs: Sequence[Tensor], inputs: Sequence[torch.Size]) -> None:
        """The layer's ``outputs`` must have the rows of the outermost call's ``inputs``."""
        batch, rows_per_record = self._calls.axis, self._capture.rows_per_record
        guards.check_rows(self.name, outputs, self._axis, inputs, batch, rows_per_record)

    # In the backward pass --------------------------------------------------------------------------------------------

    def record_traced(
        self,
        keys: Sequence[str],
        activations: Tensor,
        backprops: list[Tensor],
        inputs: list[torch.Size],
        draws: set[Origin],
    ) -> None:
        """One use of the layer in a compiled graph, in an outermost call on ``inputs`` so shaped and ``draws``."""
        assert self.rule is not None
        self._check_rows(backprops, inputs)
        trainable: Any = {key: self.module._parameters[key] for key in keys}
        self._record(self.module, self.rule, trainable, activations, backprops, draws)

    def _record(
        self,
        layer: nn.Module,
        rule: LayerRule,
        trainable: dict[str, Tensor],
        activations: Any,
        backprops: list[Tensor],
        draws: set[Origin],
    ) -> None:
        """One use of the layer, where autograd is off: enter its gradients in the book."""
        name, capture, book = self.name, self._capture, self._book
        rows_per_record = capture.rows_per_record
        book.on(draws)
        if self._axis == 1:
            backprops = [b.transpose(0, 1) for b in backprops]
            activations = activations.transpose(0, 1)
        rows = backprops[0].shape[0]
        if rows % rows_per_record:
            raise ValueError(
                f"layer {name!r} saw {rows} rows, which is not a multiple of rows_per_record = {rows_per_record}"
            )
        book.count(name, rows // rows_per_record)
        if rows == 0:
            found = {key: Kept(p.new_zeros(0, *p.shape)) for key, p in trainable.items()}
        else:
            found = rule(layer, activations, backprops[0])
        for key, parameter in trainable.items():
            if key not in found:
                raise NotImplementedError(
                    f"layer {name!r} ({type(layer).__name__}): its rule knows no parameter {key!r} (weight_norm?): "
                    "remove the reparametrization, register a rule with register_layer_rule, or freeze it"
                )
            gradient = found[key]
            gradient = Kept(gradient) if isinstance(gradient, Tensor) else gradient
            if rows_per_record > 1 and rows:
                gradient = gradient.fold(rows_per_record)
            gradient = capture.plan.kept_at_once(capture.name_of(parameter), gradient)
            book.enter(parameter, gradient, name, activations)
