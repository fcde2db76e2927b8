"""The only place with hooks: what every layer saw in one backward pass, without its weight gradient.

While a layer's forward runs, its trainable parameters are replaced by detached tensors, so that autograd computes
input gradients only. An identity node on the layer's output (:class:`_Tap`) holds the layer's input and, in the
backward pass, hands it on together with the output gradient. The layer's rule turns the pair into a per-sample
:class:`~.gradients.Gradient`, and :class:`Capture` keeps the book: parameter -> its gradients, one entry a use.

A parameter that is used anywhere else than in its own layer's forward still receives an ordinary gradient from
autograd. That gradient would be neither clipped nor noised, so its arrival raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from . import fallback
from .gradients import Gradient, Kept, add
from .layers import LayerRule, find_rule, is_cross_record
from .plan import Plan


class _Tap(torch.autograd.Function):
    """Identity on a layer's outputs; its backward reports (saved inputs, output gradients) and lets the gradients
    pass."""

    @staticmethod
    def forward(ctx: Any, report: Callable, count: int, anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        # `anchor` requires a gradient, so that the node exists even where the layer's input needs none.
        ctx.report, ctx.count = report, count
        ctx.save_for_backward(*tensors[count:])
        return tuple(output.detach() for output in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *backprops: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved = ctx.saved_tensors
        ctx.report(saved, backprops)
        return (None, None, None, *backprops, *(None for _ in saved))


class Capture:
    """Hooks on every layer of ``module`` that owns parameters, and the book of per-sample gradients they fill.

    Args:
        module: the model; its forward and backward stay the user's.
        batch_first: False where every layer's input and output has the batch as its second axis.
        rows_per_record: consecutive rows of the batch that belong to one record (K samples of a latent, augmentations).
        plan: decides per parameter whether its gradients are formed and kept.

    Raises:
        NotImplementedError: a layer in training mode mixes records (batch normalisation, running statistics).
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        batch_first: bool = True,
        rows_per_record: int = 1,
        plan: Plan | None = None,
    ) -> None:
        self.module = module
        self.batch_first = batch_first
        self.set_rows_per_record(rows_per_record)
        self.plan = plan or Plan()
        self.grad_accumulation_allowed = True
        self.before_next_batch: list[Callable[[], None]] = []
        self._names: dict[Tensor, str] = {p: name for name, p in module.named_parameters()}
        self._book: dict[Tensor, list[Gradient]] = {}
        self._records: int | None = None
        self._swapped: dict[nn.Module, dict[str, Tensor]] = {}
        self._verified: set[nn.Module] = set()
        self._suspended = False
        self._anchor = torch.zeros((), requires_grad=True)
        self._handles: list[Any] = []
        for name, layer in module.named_modules():
            if reason := is_cross_record(layer):
                refuse = self._refuse_in_training(f"layer {name!r} ({type(layer).__name__}) {reason}")
                refuse(layer, ())
                self._handles.append(layer.register_forward_pre_hook(refuse))
            if next(layer.parameters(recurse=False), None) is not None:
                rule = find_rule(layer)
                self._handles += [
                    layer.register_forward_pre_hook(self._enter, with_kwargs=True),
                    layer.register_forward_hook(self._leave(name, rule), with_kwargs=True, always_call=True),
                ]
        for parameter in self._names:
            if parameter.requires_grad:
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._refuse_unseen_use))

    def set_rows_per_record(self, rows: int) -> None:
        """Rows of the batch that belong to one record, from the next forward on."""
        if rows < 1:
            raise ValueError(f"rows_per_record is {rows}: give the number of rows of one record, at least 1")
        self.rows_per_record = rows

    # The book ----------------------------------------------------------------------------------------------------

    @property
    def records(self) -> int | None:
        """Records of the backward passes since the last :meth:`take` or :meth:`clear`; None if there was none."""
        return self._records

    def take(self, parameters: Sequence[Tensor]) -> list[Gradient | None]:
        """Remove and return the gradients of ``parameters``; None for one that no record used."""
        found = [self._book.pop(p, None) for p in parameters]
        if not self._book:
            self._records = None
        return [
            None if uses is None else self.plan.realize(self._names[p], add(uses))
            for p, uses in zip(parameters, found, strict=True)
        ]

    def clear(self) -> None:
        """Forget what was captured."""
        self._book.clear()
        self._records = None

    def remove(self) -> None:
        """Take every hook off the module again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()

    # The hooks ---------------------------------------------------------------------------------------------------

    @staticmethod
    def _refuse_in_training(message: str) -> Callable:
        def hook(layer: nn.Module, args: tuple) -> None:
            if layer.training:
                raise NotImplementedError(message)

        return hook

    def _enter(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before a layer's forward: put detached tensors in place of its trainable parameters."""
        if self._suspended or not torch.is_grad_enabled() or not layer.training:
            return
        # A forward outside any backward pass, after one: these are new records. (Inside one it is a checkpoint's
        # recomputation.)
        if self._records is not None and torch._C._current_graph_task_id() == -1:
            for callback in self.before_next_batch:
                callback()
            if self._records is not None:
                raise RuntimeError(
                    "a second batch began before the first one's gradients were taken: "
                    "call optimizer.step() or zero_grad()"
                )
        trainable: dict[str, Tensor] = {
            name: p for name, p in layer._parameters.items() if p is not None and p.requires_grad
        }
        if trainable:
            self._swapped[layer] = trainable
            layer._parameters.update({name: p.detach() for name, p in trainable.items()})  # type: ignore[misc]

    def _leave(self, name: str, rule: LayerRule | None) -> Callable:
        """After a layer's forward: put the parameters back and tap the output. Runs after an exception too."""

        def hook(layer: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            trainable = self._swapped.pop(layer, None)
            if trainable is None:
                return None
            layer._parameters.update(trainable)  # type: ignore[arg-type]
            if output is None:
                return None
            inputs, call_structure = tree_flatten((args, kwargs))
            outputs, output_structure = tree_flatten(output)
            is_tensor = [isinstance(x, Tensor) for x in inputs]
            tapped = [i for i, x in enumerate(outputs) if isinstance(x, Tensor) and x.is_floating_point()]
            if not tapped:
                return None
            constants = [None if t else x for x, t in zip(inputs, is_tensor, strict=True)]

            def report(saved: tuple[Tensor, ...], backprops: tuple[Tensor, ...]) -> None:
                rows = iter(saved)
                leaves = [next(rows).detach() if t else x for x, t in zip(constants, is_tensor, strict=True)]
                self._record(name, layer, rule, trainable, tree_unflatten(leaves, call_structure), list(backprops))

            tensors = [x for x, t in zip(inputs, is_tensor, strict=True) if t]
            anchor = self._anchor.to(outputs[tapped[0]].device)
            for i, x in zip(
                tapped,
                _Tap.apply(report, len(tapped), anchor, *(outputs[i] for i in tapped), *tensors),
                strict=True,
            ):
                outputs[i] = x
            return tree_unflatten(outputs, output_structure)

        return hook

    @torch.no_grad()
    def _record(
        self,
        name: str,
        layer: nn.Module,
        rule: LayerRule | None,
        trainable: dict[str, Tensor],
        call: tuple[tuple, dict],
        backprops: list[Tensor],
    ) -> None:
        """One use of a layer, seen in the backward pass: enter its gradients in the book."""
        args, kwargs = call
        activations = args[0] if args else next(iter(kwargs.values()))
        if not self.batch_first:
            backprops = [b.transpose(0, 1) for b in backprops]
            activations = activations.transpose(0, 1)
        rows = backprops[0].shape[0]
        if rows % self.rows_per_record:
            raise ValueError(
                f"layer {name!r} saw {rows} rows, which is not a multiple of rows_per_record = {self.rows_per_record}"
            )
        records = rows // self.rows_per_record
        if self._records not in (None, records):
            raise ValueError(
                f"layer {name!r} saw {records} records, other layers of the same backward pass {self._records}: "
                "every layer's input must have the batch as its first axis"
            )
        self._records = records
        if rows == 0:
            found = {key: Kept(p.new_zeros(0, *p.shape)) for key, p in trainable.items()}
        elif rule is not None:
            found = rule(layer, activations, backprops[0])
        else:
            found = self._run_by_record(name, layer, call, backprops)
        for key, parameter in trainable.items():
            gradient = found[key]
            gradient = Kept(gradient) if isinstance(gradient, Tensor) else gradient
            if self.rows_per_record > 1 and rows:
                gradient = gradient.fold(self.rows_per_record)
            self._book.setdefault(parameter, []).append(gradient)

    def _run_by_record(
        self, name: str, layer: nn.Module, call: tuple[tuple, dict], backprops: list[Tensor]
    ) -> dict[str, Tensor]:
        if not self.batch_first:
            raise NotImplementedError(
                f"layer {name!r} ({type(layer).__name__}) has no per-sample rule: batch_first=False needs one"
            )
        self._suspended = True
        try:
            found = fallback.grad_samples(layer, call, backprops, verify=layer not in self._verified)
        except NotImplementedError as error:
            raise NotImplementedError(f"layer {name!r}: {error}") from error
        finally:
            self._suspended = False
        self._verified.add(layer)
        return found

    def _refuse_unseen_use(self, parameter: Tensor) -> None:
        parameter.grad = None
        raise NotImplementedError(
            f"parameter {self._names[parameter]!r} was used outside its own layer's forward (functional weight "
            "tying, a penalty on weights, a layer in eval mode under gradients): such a use has no per-sample "
            "gradient. Call the layer itself, use the optimizer's weight_decay, or freeze the parameter"
        )
