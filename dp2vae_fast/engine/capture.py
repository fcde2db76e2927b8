"""The only place with hooks: what every layer saw in one backward pass, without its weight gradient.

While a layer's forward runs, its trainable parameters are replaced by detached tensors, so that autograd computes
input gradients only. An identity node on the layer's output (:mod:`.tap`) holds the layer's input and, in the
backward pass, hands it on together with the output gradient. The layer's rule turns the pair into a per-sample
:class:`~.gradients.Gradient`, and :class:`Capture` keeps the book: parameter -> its gradients, one entry a use.

What the taps cannot see must not pass in silence:

* a parameter used anywhere else than in its own layer's forward receives an ordinary gradient from autograd, neither
  clipped nor noised: its arrival raises;
* a layer without a rule keeps parameters that autograd differentiates, and the two totals must agree;
* the rows of every layer are counted against the inputs of the outermost call, so that positions or copies folded
  into the batch axis are not taken for records of their own;
* the first batch's gradients are checked against autograd's own.

:mod:`.guards` and :mod:`.verify` hold these checks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from opacus.layers.dp_rnn import RNNLinear
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from . import fallback, guards
from .gradients import Gradient, Kept
from .layers import LayerRule, find_rule, is_cross_record
from .plan import Plan
from .precision import autocast_as, autocast_dtype
from .products import add
from .tap import Taps
from .traced import TracedCalls
from .verify import FirstBatch

Origin = tuple[str, int, int, int | None]
"""Where gradients come from: ``("draw", id of a sampler, number, its records)``, or ``("batch", id of a capture,
number, None)``."""


class _Layer(NamedTuple):
    """A layer with parameters of its own."""

    number: int  # in the module's order of modules
    name: str
    keys: list[str]  # its own parameters
    rule: LayerRule | None


class Capture:
    """Hooks on every layer of ``module`` that owns parameters, and the book of per-sample gradients they fill.

    Args:
        module: the model; its forward and backward stay the user's.
        batch_first: False where every layer's input and output has the batch as its second axis.
        rows_per_record: consecutive rows of the batch that belong to one record (K samples of a latent, augmentations).
        plan: decides per parameter whether its gradients are formed and kept.
        verify: check the first batch's gradients against autograd's (:mod:`.verify`): one more forward and backward.

    Row i of every layer must be of record ``i // rows_per_record``, and the loss a sum or mean over records: one that
    compares records looks the same to the hooks.

    Raises:
        NotImplementedError: a layer in training mode mixes records (batch normalisation, running statistics).
        ValueError: the module's gradients are captured already.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        batch_first: bool = True,
        rows_per_record: int = 1,
        plan: Plan | None = None,
        verify: bool = True,
    ) -> None:
        self.module = module
        self.batch_first = batch_first
        self.set_rows_per_record(rows_per_record)
        self.plan = plan or Plan()
        self.grad_accumulation_allowed = True
        self.draws: Callable[[], set[Origin]] = set  # those that a forward may be on, where somebody knows
        self.owners: dict[Tensor, Callable[[], None]] = {}  # parameter -> takes its gradients before the next batch
        self._names: dict[Tensor, str] = {p: name for name, p in module.named_parameters()}
        self._book: dict[Tensor, list[Gradient]] = {}
        self._dropped: set[Tensor] = set()  # parameters whose gradients of this batch nobody wants
        self._records: int | None = None
        self._batch = 0  # how many batches were captured
        self._draws: set[Origin] = set()
        self._held: list[tuple[str, Tensor, int]] = []  # what the book's gradients are made from, and its version
        self._swapped: dict[nn.Module, dict[str, Tensor]] = {}
        self._guarded: set[Tensor] = set()
        self._suspended = False
        self.taps = Taps()
        self._ticket: Tensor | None = None  # of a call that is traced, and its module
        self._ticket_of: nn.Module | None = None
        self.rows = guards.Rows(0 if batch_first else 1)
        self.traced = TracedCalls(self)
        self.first_batch = FirstBatch(0 if batch_first else 1, self.taps, wanted=verify)
        self._layers = set(module.modules())
        self.modules: list[nn.Module] = []  # by number
        self.buffered: list[tuple[str, nn.Module]] = []  # with buffers of their own
        self._own: dict[nn.Module, _Layer] = {}
        self._handles: list[Any] = []
        for layer in self._layers:
            hooks = (getattr(hook, "func", hook) for hook in layer._forward_pre_hooks.values())
            owners = (getattr(hook, "__self__", None) for hook in hooks)
            if any(isinstance(owner, Capture) and layer in owner._layers for owner in owners):
                raise ValueError("the module is private already: call cleanup() on what make_private returned for it")
        for number, (name, layer) in enumerate(module.named_modules()):
            self.modules.append(layer)
            if next(layer.buffers(recurse=False), None) is not None:
                self.buffered.append((name, layer))
                self._handles += guards.watch_buffers(name, layer, lambda: not self._suspended)
            if reason := is_cross_record(layer):
                refuse = guards.refuse_in_training(f"layer {name!r} ({type(layer).__name__}) {reason}")
                refuse(layer, ())
                self._handles.append(layer.register_forward_pre_hook(refuse))
            if layer is module or next(layer.children(), None) is not None:
                self._handles += [
                    layer.register_forward_pre_hook(partial(self._open, number), with_kwargs=True),
                    layer.register_forward_hook(self._close, always_call=True),
                ]
            inner = {p for child in layer.children() for p in child.parameters()}  # what is theirs is used there
            if own := [key for key, p in layer.named_parameters(recurse=False) if p not in inner]:
                self._own[layer] = ours = _Layer(number, name, own, find_rule(layer))
                self._handles += [
                    layer.register_forward_pre_hook(partial(self._enter, ours), with_kwargs=True),
                    # First of all hooks: the output as the layer made it, before another hook changes it.
                    layer.register_forward_hook(
                        partial(self._leave, ours), prepend=True, with_kwargs=True, always_call=True
                    ),
                ]
        self._guard(self._names)

    @property
    def attached(self) -> bool:
        """False once the hooks are off the module."""
        return bool(self._handles)

    def set_rows_per_record(self, rows: int) -> None:
        """Rows of the batch that belong to one record, from the next forward on."""
        if rows < 1:
            raise ValueError(f"rows_per_record is {rows}: give the number of rows of one record, at least 1")
        self.rows_per_record = rows

    def name_of(self, parameter: Tensor) -> str:
        """The parameter's name in the module."""
        return self._names.get(parameter, "?")

    # The book ----------------------------------------------------------------------------------------------------

    @property
    def records(self) -> int | None:
        """Records of the backward passes since the last :meth:`take` or :meth:`clear`; None if there was none."""
        return self._records

    @property
    def origins(self) -> set[Origin]:
        """What the captured gradients come from: this batch, and the draws that its forwards were on."""
        return {("batch", id(self), self._batch, None), *self._draws}

    def trainable(self) -> set[Tensor]:
        """The parameters with gradients, at present."""
        return {p for p in self._names if p.requires_grad}

    def holds(self, parameters: Iterable[Tensor]) -> bool:
        """Whether gradients of any of ``parameters`` wait to be taken."""
        return any(p in self._book for p in parameters)

    def take(self, parameters: Sequence[Tensor]) -> list[Gradient | None]:
        """Remove and return the gradients of ``parameters``; None for one that no record used.

        Raises:
            RuntimeError: what they are made from has been overwritten since the backward pass.
        """
        changed = [name for name, tensor, version in self._held if tensor._version != version]
        if self.taps.lost():
            self.drop(parameters)
            raise RuntimeError(
                "a compiled model's backward pass ran without the gradients of every layer arriving (merged by the "
                "compiler, or replayed): do not compile it"
            )
        if self.first_batch.waiting and self._records and not changed:
            self._check_first_batch()
        elif not self.first_batch.waiting:
            self.first_batch.wait_for(p for p in parameters if p in self._book and p in self._names)
        found = self.drop(parameters)
        if changed and any(found):
            raise RuntimeError(
                f"the input of layer {changed[0]!r} was modified in place between the backward pass and the step: "
                "step first"
            )
        whole = [None if uses is None else add(uses) for uses in found]
        self.plan.prepare([(self.name_of(p), g) for p, g in zip(parameters, whole, strict=True) if g is not None][::-1])
        return [
            None if g is None else self.plan.realize(self.name_of(p), g) for p, g in zip(parameters, whole, strict=True)
        ]

    def _check_first_batch(self) -> None:
        """Compare the whole book with autograd, whichever part of it is asked for."""
        # By a plan of its own: it sees uses one by one, and what it settled would show in later batches whether this
        # one had been the first.
        plan = replace(self.plan)
        plan.prepare([(self.name_of(p), g) for p, uses in self._book.items() for g in uses])
        found = {
            name: (p, [plan.realize(name, g) for g in self._book.get(p, [])])
            for p, name in self._names.items()
            if p.requires_grad and p not in self._dropped
        }
        self._suspended = True
        try:
            self.first_batch.check(found, self._records or 0, self.rows_per_record)
        finally:
            self._suspended = False

    def drop(self, parameters: Sequence[Tensor]) -> list[list[Gradient] | None]:
        """Remove the gradients of ``parameters``, whatever has become of what they are made from."""
        self._guard(parameters)
        found = [self._book.pop(p, None) for p in parameters]
        self._dropped.update(parameters)
        if not self._book:
            self.clear()
        return found

    def clear(self) -> None:
        """Forget what was captured."""
        self._book.clear()
        self._dropped.clear()
        self._draws.clear()
        self._held.clear()
        self._records = None
        self.taps.lost()  # and begins to count anew
        self.first_batch.forget()

    def remove(self) -> None:
        """Take every hook off the module again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._layers.clear()
        self.clear()

    def __deepcopy__(self, memo: dict) -> Capture:
        """The same: the copy of a captured module carries its hooks, which pass over layers that are not their own."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a private module holds hooks: save its state_dict(), or to_standard_module() after training")

    def _batch_axis(self, layer: nn.Module) -> int:
        """Where a layer's own inputs and outputs have the batch: Opacus' recurrent layers call their cells step by
        step, on ``[N, features]``, whichever way round their sequences are."""
        return 0 if self.batch_first or isinstance(layer, RNNLinear) else 1

    # The hooks ---------------------------------------------------------------------------------------------------

    def _open(self, number: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before the root's or a container's forward."""
        if not self._suspended and module in self._layers:
            self.rows.open(module)
            self._begin_call(number, module, args, kwargs)

    def _close(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if not self._suspended:
            self.rows.close(module)
        return self._end_call(module, output)

    def _begin_call(self, number: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before a call that no container's call surrounds, or none that is traced."""
        if self._suspended or module not in self._layers:
            return
        outermost = self.rows.outermost in (None, module)
        if torch.compiler.is_compiling():
            if (outermost or self._ticket is None) and torch.is_grad_enabled():
                self._ticket, self._ticket_of = self.traced.begin(number, args, kwargs), module
            return
        if not outermost:
            return
        self._ticket = None
        if self.rows.outermost is module:
            self.rows.count(tree_leaves((args, kwargs)))
        if self.first_batch.waiting:
            self.first_batch.begin(module, args, kwargs, self.trainable())

    def _end_call(self, module: nn.Module, output: Any) -> Any:
        """After it: its output again, if it was tapped."""
        if self._suspended:
            return self.first_batch.note(module, output)
        if module not in self._layers:
            return None
        if self.rows.outermost is None:
            self.rows.sizes = set()
        if self._ticket is not None:
            if module is not self._ticket_of:
                return None
            ticket, self._ticket = self._ticket, None
            return self.traced.end(ticket, output)
        return self.first_batch.end(output) if self.first_batch.waiting and self.rows.outermost is None else None

    def _enter(self, own: _Layer, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before a layer's forward: put stand-ins in place of its trainable parameters.

        They are detached, so that autograd forms no weight gradient; those of a layer without a rule it does
        differentiate, for :func:`~.guards.compare_totals`.
        """
        if self.rows.outermost is not layer:
            self._begin_call(own.number, layer, args, kwargs)
        if self._suspended or layer not in self._layers or not torch.is_grad_enabled() or not layer.training:
            return
        if not torch.compiler.is_compiling():
            self.begin_batch()
        if layer in self._swapped:  # its last forward was interrupted, or is still running: it calls itself
            for key in self._swapped[layer]:  # what that forward made of them is in no tap
                if (leaf := layer._parameters[key]) is not None and leaf.requires_grad:
                    leaf.register_post_accumulate_grad_hook(partial(guards.compare_totals, own.name, key, {}))
            layer._parameters.update(self._swapped.pop(layer))  # type: ignore[arg-type]
        trainable: dict[str, Tensor] = {
            key: p for key in own.keys if (p := layer._parameters.get(key)) is not None and p.requires_grad
        }
        if trainable:
            self._swapped[layer] = trainable
            stand_ins = {key: p.detach() for key, p in trainable.items()}
            if own.rule is None:
                stand_ins = {key: p.requires_grad_() for key, p in stand_ins.items()}
            layer._parameters.update(stand_ins)  # type: ignore[arg-type]

    def begin_batch(self) -> None:
        """Where gradients of another batch are in the book, see that they are taken."""
        # A forward outside any backward pass, after one: these are new records. (Inside one it is a checkpoint's
        # recomputation.)
        if self._records is not None and torch._C._current_graph_task_id() == -1:
            for close_batch in {self.owners[p] for p in self._book if p in self.owners}:
                close_batch()
            if self._records is not None:
                names = ", ".join(repr(self.name_of(p)) for p in self._book)
                raise RuntimeError(
                    f"a second batch began before the first one's gradients were taken (of {names}): call step() or "
                    "zero_grad() of the optimizer that holds these parameters, or freeze them where none does"
                )

    def _leave(self, own: _Layer, layer: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """After a layer's forward: put the parameters back and tap the output. Runs after an exception too."""
        tapped = self._tap(own, layer, args, kwargs, output)
        if self.rows.outermost is layer:
            return tapped
        ended = self._end_call(layer, output if tapped is None else tapped)
        return tapped if ended is None else ended

    def _tap(self, own: _Layer, layer: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        trainable = self._swapped.pop(layer, None)
        if trainable is None:
            return None
        stand_ins: dict[str, Any] = {key: layer._parameters[key] for key in trainable}
        layer._parameters.update(trainable)  # type: ignore[arg-type]
        if output is None:
            return None
        first = args[0] if args else next(iter(kwargs.values()), None)
        if (rule := own.rule) is None or not (
            isinstance(output, Tensor) and output.is_floating_point() and isinstance(first, Tensor)
        ):
            return self._tap_any(own, layer, trainable, stand_ins, (args, kwargs), output)
        if self._ticket is not None:
            return self.traced.tap(self._ticket, own.number, list(trainable), first, output)
        guards.check_rows(own.name, [output], self.rows.sizes, self._batch_axis(layer), self.rows_per_record)
        draws = self.draws()

        def report(saved: tuple[Tensor, ...], backprops: tuple[Tensor, ...]) -> None:
            if self.wants_report():
                self._draws |= draws
                self._record(own, layer, rule, trainable, saved[0].detach(), list(backprops))

        return self.taps.on([output], [first], report)[0]

    def _tap_any(
        self,
        own: _Layer,
        layer: nn.Module,
        trainable: dict[str, Tensor],
        stand_ins: dict[str, Tensor],
        call: tuple[tuple, dict],
        output: Any,
    ) -> Any:
        """Tap a layer without a rule, or one called with or returning several tensors."""
        name = own.name
        totals: dict[str, tuple[Tensor, float]] = {}
        for key, leaf in stand_ins.items():
            if leaf.requires_grad:
                leaf.register_post_accumulate_grad_hook(partial(guards.compare_totals, name, key, totals))
        inputs, call_structure = tree_flatten(call)
        outputs, output_structure = tree_flatten(output)
        is_tensor = [isinstance(x, Tensor) for x in inputs]
        if not any(is_tensor):
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
        tapped = [i for i, x in enumerate(outputs) if isinstance(x, Tensor) and x.is_floating_point()]
        if not tapped:
            return None
        rows = [outputs[i] for i in tapped]
        guards.check_rows(name, rows, self.rows.sizes, self._batch_axis(layer), self.rows_per_record)
        constants = [None if t else x for x, t in zip(inputs, is_tensor, strict=True)]
        kind, draws = outputs[tapped[0]].device.type, self.draws()
        precision = partial(autocast_as, kind, autocast_dtype(kind))

        def report(saved: tuple[Tensor, ...], backprops: tuple[Tensor, ...]) -> None:
            if not self.wants_report():
                return
            self._draws |= draws
            found = iter(saved)
            leaves = [next(found).detach() if t else x for x, t in zip(constants, is_tensor, strict=True)]
            args, kwargs = call = tree_unflatten(leaves, call_structure)
            again = partial(self._run_by_record, name, layer, call, list(backprops), precision, totals)
            activations = args[0] if args else next(iter(kwargs.values()))
            self._record(own, layer, own.rule or again, trainable, activations, list(backprops))

        tensors = [x for x, t in zip(inputs, is_tensor, strict=True) if t]
        for i, x in zip(tapped, self.taps.on(rows, tensors, report), strict=True):
            outputs[i] = x
        return tree_unflatten(outputs, output_structure)

    def wants_report(self) -> bool:
        """Inside a tap's backward: false in a backward pass that means no parameter."""
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "create_graph=True (a gradient penalty) needs second derivatives, which have no per-sample "
                "gradient: call the model in eval mode with its parameters frozen, or leave the penalty out"
            )
        return self.taps.reaches_parameters()

    def record_traced(
        self,
        number: int,
        keys: Sequence[str],
        activations: Tensor,
        backprops: list[Tensor],
        sizes: set[int],
        draws: set[Origin],
    ) -> None:
        """One use of a layer in a compiled graph, of an outermost call on ``sizes`` rows and ``draws``."""
        layer = self.modules[number]
        own = self._own[layer]
        assert own.rule is not None
        guards.check_rows(own.name, backprops, sizes, self._batch_axis(layer), self.rows_per_record)
        self._draws |= draws
        trainable: Any = {key: layer._parameters[key] for key in keys}
        self._record(own, layer, own.rule, trainable, activations, backprops)

    @torch.no_grad()
    def _record(
        self,
        own: _Layer,
        layer: nn.Module,
        rule: LayerRule,
        trainable: dict[str, Tensor],
        activations: Any,
        backprops: list[Tensor],
    ) -> None:
        """One use of a layer, seen in the backward pass: enter its gradients in the book."""
        name = own.name
        if self._batch_axis(layer) == 1:
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
        if self._records is None:
            self._batch += 1
        self._records = records
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
            if self.rows_per_record > 1 and rows:
                gradient = gradient.fold(self.rows_per_record)
            gradient = self.plan.kept_at_once(self.name_of(parameter), gradient)
            if not isinstance(gradient, Kept):
                self._held.append((name, activations, activations._version))
            self._book.setdefault(parameter, []).append(gradient)

    def _run_by_record(
        self,
        name: str,
        layer: nn.Module,
        call: tuple[tuple, dict],
        backprops: list[Tensor],
        precision: Callable[[], torch.autocast],
        totals: dict[str, tuple[Tensor, float]],
        *_: Any,
    ) -> dict[str, Tensor]:
        """The rule of a layer that has none: run it again under the ``precision`` of its forward, and leave the
        totals for :func:`~.guards.compare_totals`."""
        self._suspended = True
        try:
            with precision():
                found = fallback.grad_samples(layer, call, backprops, axis=self._batch_axis(layer))
        except NotImplementedError as error:
            raise NotImplementedError(f"layer {name!r}: {error}") from error
        finally:
            self._suspended = False
        for key, samples in found.items():
            totals[key] = (samples.sum(0), fallback.tolerance(samples, call, backprops))
        return found

    def _guard(self, parameters: Iterable[Tensor]) -> None:
        """Refuse ordinary gradients of ``parameters``, such as were unfrozen since the last call included."""
        for p in parameters:
            if p.requires_grad and p not in self._guarded:
                self._guarded.add(p)
                self._handles += guards.refuse_unseen_use(self.name_of(p), p, lambda: not self._suspended)
