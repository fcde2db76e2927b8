"""PrivacyEngine: Opacus' engine with one more ``grad_sample_mode``, and that one the default."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from inspect import signature
from typing import Any
from weakref import WeakSet

import opacus
import torch
from opacus.accountants import create_accountant
from opacus.grad_sample.gsm_base import AbstractGradSampleModule
from opacus.optimizers import DPOptimizer as OpacusDPOptimizer
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from .accounting import epsilon_of, smallest_noise
from .capture.capture import Capture
from .clipping import clipping_of
from .counting import Draws, StepCounter, begins_with
from .distributed import DistributedDPOptimizer, Ranks
from .gradients.plan import Plan
from .keystream import Keystream
from .loader import PoissonDataLoader, public_rate, refuse_repetition
from .module import FusedGradSampleHooks, FusedGradSampleModule
from .optimizer import DPOptimizer

FUSED = "fused"
_OPTIONS = (  # of mode "fused", beside the parameters of make_private
    "rows_per_record",
    "verify_first_step",
    "plan",
    "max_memory_overhead",
    "materialize_grad",
    "sum_dtype",
    "count_rounding",
    "stability",
    "target_unclipped_quantile",
    "clipbound_learning_rate",
    "min_clipbound",
    "max_clipbound",
    "unclipped_num_std",
)


class PrivacyEngine(opacus.PrivacyEngine):
    """Opacus' ``PrivacyEngine`` whose default ``grad_sample_mode`` is ``"fused"``.

    In this mode one backward pass yields every record's gradient norm without storing per-sample gradients, noise
    comes from a ChaCha20 stream, and :meth:`make_private` returns ``(module, optimizer, data_loader)``; the user's loop
    stays as it is. Opacus' own modes are passed through unchanged.

    Args:
        accountant: "prv", "rdp" or "gdp" (Opacus' accountants).
        secure_mode: fused mode draws noise and Poisson coins from the operating system's key by default, so True only
            forbids anything else (``noise_generator``, a seeded keystream). Opacus' own modes would need
            torchcsprng: refused.
        keystream: the key that noise and coins come from; a new secret one unless given.
    """

    def __init__(
        self,
        *,
        accountant: str = "prv",
        secure_mode: bool = False,
        keystream: Keystream | None = None,
    ) -> None:
        # Not super().__init__: it warns that the noise is not cryptographic, or demands torchcsprng. Ours is,
        # without it.
        self.accountant = create_accountant(mechanism=accountant)
        self.secure_mode = secure_mode
        self.secure_rng = None
        self.dataset = None
        self.keystream = keystream or Keystream.secret()
        self._keystreams = {self.keystream.fingerprint: self.keystream}  # all that this engine draws from
        self._drawn: tuple[int, ...] = (0, 0)  # what of them a run before this one has drawn: steps and coin steps
        self._fused = True
        self._loader_options: dict[str, int | None] = {}
        self._counter = StepCounter(lambda: self.accountant)
        self._ranks: Ranks | None = None  # those that train the module made private last
        if secure_mode and self.keystream.source != "secret":
            raise ValueError("secure_mode=True needs a secret keystream: pass Keystream.secret() or none")
        self._captures: WeakSet[Capture] = WeakSet()  # of the modules made private, which hold them

    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: Optimizer,
        criterion: Any = None,
        data_loader: DataLoader,
        noise_multiplier: float,
        max_grad_norm: float | Sequence[float] | Mapping[str, float],
        batch_first: bool = True,
        loss_reduction: str = "mean",
        poisson_sampling: bool = True,
        clipping: str = "flat",
        noise_generator: torch.Generator | None = None,
        grad_sample_mode: str = FUSED,
        wrap_model: bool = True,
        rand_on_empty: bool = False,
        dataset_size: int | None = None,
        physical_batch_size: int | None = None,
        **options: Any,
    ) -> Any:
        """Make module, optimizer and data loader private; the user's loop stays as it is.

        Args:
            module: the model. Its gradients must come from the loss of a batch alone. To train it in several processes
                wrap it in Opacus' ``DifferentiallyPrivateDistributedDataParallel`` and call this on every rank, with
                the same data set and settings: ``batch_size`` is that of all ranks together, or one rank's where the
                loader has a ``DistributedSampler`` (:mod:`.distributed`).
            optimizer: over parameters of ``module``.
            criterion: for Opacus' mode "ghost", whose backward pass it replaces; not used in mode "fused".
            data_loader: gives batches of records.
            noise_multiplier: standard deviation of the noise in units of the optimizer's ``sensitivity()``.
            max_grad_norm: bound of a record's gradient norm. With ``clipping="per_layer"`` one bound a trainable
                parameter, a dictionary of bounds by name or prefix of names, or one number that is split among them.
            batch_first: False where every layer has the batch as its second axis.
            loss_reduction: how the user's loss combines records, "mean" or "sum".
            poisson_sampling: draw every record on its own coin. False leaves the loader as it is, and the accountant's
                assumption unmet.
            clipping: "flat", "per_layer", "automatic" or "adaptive" (:mod:`.clipping`).
            noise_generator: derive the key of the noise from it, for reproducible runs. Generators of one state give
                models of one engine noise of their own, but two engines the same: the second is warned.
            grad_sample_mode: "fused", or one of Opacus' own.
            wrap_model: False puts the hooks on ``module`` itself, and returns an object for taking them off.
            rand_on_empty: only False in mode "fused", which takes empty batches as they are.
            dataset_size: public number that stands for that of the records
                (:meth:`~.loader.PoissonDataLoader.from_data_loader`).
            physical_batch_size: yield padded batches of this many rows, several a step where a draw is larger. Padding
                contributes nothing; ``data_loader.mask`` says which rows are padding.
            options: of mode "fused": ``rows_per_record``, ``verify_first_step`` (:class:`~.capture.capture.Capture`),
                ``plan`` or just its ``max_memory_overhead`` (:class:`~.gradients.plan.Plan`),
                ``materialize_grad`` and ``sum_dtype`` (:class:`~.optimizer.DPOptimizer`), ``count_rounding``; with
                clipping "automatic" ``stability``; with clipping "adaptive", as in Opacus,
                ``target_unclipped_quantile``, ``clipbound_learning_rate``, ``min_clipbound``, ``max_clipbound``,
                ``unclipped_num_std`` (:class:`~.clipping.AdaptiveClipping`).

        Returns:
            ``(module, optimizer, data_loader)``; for Opacus' mode "ghost" ``(module, optimizer, criterion,
            data_loader)``.

        Raises:
            ValueError: ``noise_generator`` in secure mode; optimizer parameters that are not the module's; an option
                out of range.
            TypeError: an option that nothing takes.
            NotImplementedError: a layer that mixes records; what fused mode does not have.
        """
        self._select(grad_sample_mode)
        common: dict[str, Any] = dict(
            module=module,
            optimizer=optimizer,
            data_loader=data_loader,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            batch_first=batch_first,
            loss_reduction=loss_reduction,
            poisson_sampling=poisson_sampling,
            clipping=clipping,
            noise_generator=noise_generator,
            grad_sample_mode=grad_sample_mode,
            wrap_model=wrap_model,
            rand_on_empty=rand_on_empty,
        )
        if criterion is not None:
            common["criterion"] = criterion
        if grad_sample_mode != FUSED:
            if dataset_size is not None or physical_batch_size is not None:
                raise NotImplementedError("dataset_size and physical_batch_size need grad_sample_mode='fused'")
            return super().make_private(**common, **options)
        if not poisson_sampling and (dataset_size is not None or physical_batch_size is not None):
            raise ValueError("dataset_size and physical_batch_size are for Poisson sampling: set poisson_sampling=True")
        self._loader_options = {"dataset_size": dataset_size, "physical_batch_size": physical_batch_size}
        try:
            parts: Any = super().make_private(**common, **options)
        finally:
            self._loader_options = {}
        _, private_optimizer, loader = parts
        private_optimizer.fetches_ahead = loader.num_workers > 0
        rate, batch_size = 1 / len(loader), None
        if isinstance(loader, PoissonDataLoader):
            rate = loader.sample_rate
            self._join(private_optimizer, loader)
        else:  # Opacus takes int(N * (1 / batches)), which is one too low for many N
            private_optimizer.expected_batch_size = len(loader.dataset) // len(loader)
            private_optimizer.largest_batch = batch_size = loader.batch_size or len(loader.dataset)
        private_optimizer.step_hook = None  # Opacus', with Opacus' rate
        private_optimizer.attach_step_hook(self._counter.hook(rate, batch_size))
        return parts

    def make_private_with_epsilon(
        self,
        *,
        module: nn.Module,
        optimizer: Optimizer,
        data_loader: DataLoader,
        target_epsilon: float,
        target_delta: float,
        epochs: int,
        max_grad_norm: float | Sequence[float] | Mapping[str, float],
        epsilon_tolerance: float = 1e-3,
        alphas: Sequence[float] | None = None,
        **options: Any,
    ) -> Any:
        """:meth:`make_private` with the noise multiplier that spends (target_epsilon, target_delta) in ``epochs``.

        Args:
            epochs: passes over the data loader.
            epsilon_tolerance: how far below ``target_epsilon`` the epsilon of all passes may stay.
            alphas: orders that the accountant "rdp" tries.
            options: all other arguments of :meth:`make_private`.

        Guarantees:
            :meth:`get_epsilon` is at most the target after ``epochs`` passes of this engine's first training.

        Raises:
            ValueError: a target that is no positive number or that no noise reaches; less than one pass.
        """
        if epochs < 1:
            raise ValueError(f"epochs is {epochs}: there must be at least one pass over the data loader")
        rate, steps = 1 / len(data_loader), len(data_loader)
        if (size := options.get("dataset_size")) is not None:
            rate, steps = public_rate(data_loader, size)
        if len(self.accountant) > 0:
            warnings.warn(
                "this PrivacyEngine has counted steps already: the noise multiplier for target_epsilon leaves them "
                "out, and the total will be higher",
                stacklevel=2,
            )
        orders: dict[str, Any] = {} if alphas is None else {"alphas": list(alphas)}
        kind = self.accountant.mechanism()

        def spent(noise: float) -> float:
            return epsilon_of([(noise, rate, epochs * steps)], target_delta, kind, **orders)

        noise_multiplier = smallest_noise(spent, target_epsilon, tolerance=1e-6, epsilon_tolerance=epsilon_tolerance)
        if noise_multiplier is None:
            raise ValueError(
                f"target_epsilon = {target_epsilon:g} cannot be reached at target_delta = {target_delta:g} by any "
                "noise multiplier up to a million: raise one of them, or take fewer epochs"
            )
        return self.make_private(
            module=module,
            optimizer=optimizer,
            data_loader=data_loader,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            **options,
        )

    def privatize(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        *,
        noise_multiplier: float,
        max_grad_norm: float | Sequence[float] | Mapping[str, float],
        sample_rate: float,
        expected_batch_size: int,
        loss_reduction: str,
        grad_sample_mode: str = FUSED,
        rows_per_record: int | None = None,
        **kwargs: Any,
    ) -> tuple[nn.Module, Any]:
        """:meth:`make_private` for a loop that draws its own batches: no loader, every number public and given.

        Args:
            sample_rate: probability with which the loop puts each record into a batch
                (:class:`~.sampling.PoissonBatches`).
            expected_batch_size: public divisor of the noisy sum. With ``loss_reduction="sum"`` nothing is divided.
            loss_reduction: how the loop's loss combines records, "mean" or "sum". A mean that is called a sum breaks
                the guarantee: its divisor depends on all records.
            rows_per_record: consecutive rows that belong to one record (1 unless given); fused mode only.
            kwargs: ``clipping``, ``noise_generator`` and the options of :meth:`make_private`.

        Returns:
            The wrapped module and the private optimizer; the accountant counts one step of rate ``sample_rate``
            per optimizer step.
        """
        if not 0.0 < sample_rate <= 1.0:  # a rate of 0 would cost nothing
            raise ValueError(f"sample_rate is {sample_rate}: it is a probability in (0, 1]")
        if not 0.0 < expected_batch_size < math.inf:
            raise ValueError(f"expected_batch_size is {expected_batch_size}: it must be positive and finite")
        self._select(grad_sample_mode)
        if grad_sample_mode != FUSED and rows_per_record not in (None, 1):
            raise NotImplementedError(f"rows_per_record = {rows_per_record} needs grad_sample_mode='fused'")
        if grad_sample_mode == FUSED:
            kwargs["rows_per_record"] = rows_per_record
        wrapped = self._prepare_model(
            module,
            max_grad_norm=max_grad_norm,
            loss_reduction=loss_reduction,
            grad_sample_mode=grad_sample_mode,
        )
        wrapped.forbid_grad_accumulation()  # a record may be in two Poisson draws
        private = self._prepare_optimizer(
            optimizer=optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size,
            loss_reduction=loss_reduction,
            grad_sample_mode=grad_sample_mode,
            **kwargs,
        )
        if grad_sample_mode == FUSED:
            private.attach_step_hook(self._counter.hook(sample_rate))
        else:
            private.attach_step_hook(self.accountant.get_optimizer_hook_fn(sample_rate=sample_rate))
        return wrapped, private

    def get_epsilon(self, delta: float) -> float:
        """What all steps counted so far have spent at ``delta``: 0 before the first, infinity where one had no noise.

        Of the accountant "prv" it is the looser bound of "rdp" where Opacus' arithmetic would report too little
        (:func:`~.accounting.epsilon_of`): ``accountant.get_epsilon`` is Opacus' own, and does not see to that.

        Raises:
            ValueError: ``delta`` outside (0, 1).
        """
        return epsilon_of(self.accountant.history, delta, self.accountant.mechanism())

    def save_checkpoint(self, *, checkpoint_dict: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Opacus' ``save_checkpoint``, and how far noise and coins have been drawn."""
        position = tuple(map(max, (0, 0), *(keystream.position for keystream in self._keystreams.values())))
        super().save_checkpoint(checkpoint_dict=(checkpoint_dict or {}) | {"keystream_position": position}, **kwargs)

    def load_checkpoint(self, *, path: Any, torch_load_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> dict:
        """Opacus' ``load_checkpoint``; no step that this engine has counted is forgotten, and where the key is the
        same, as with a seed, noise and coins go on behind theirs.

        Raises:
            ValueError: the checkpoint is of another run than the steps counted so far.
        """
        counted = list(self.accountant.history)
        if counted:
            start = path.tell() if hasattr(path, "tell") else None
            saved = torch.load(path, **(torch_load_kwargs or {}), weights_only=False)["privacy_accountant_state_dict"]
            if start is not None:
                path.seek(start)
            if not (begins_with(saved["history"], counted) or begins_with(counted, saved["history"])):
                raise ValueError(
                    "the checkpoint is of another run than the steps that this PrivacyEngine has counted, which would "
                    "be forgotten: load it into a fresh PrivacyEngine"
                )
        else:
            self._counter.forget()
        checkpoint = super().load_checkpoint(path=path, torch_load_kwargs=torch_load_kwargs, **kwargs)
        if not begins_with(self.accountant.history, counted):
            self.accountant.history = counted
            warnings.warn(
                "this PrivacyEngine has counted more steps than the checkpoint, and keeps them: what was trained since "
                "the checkpoint has been spent",
                stacklevel=2,
            )
        steps = sum(steps for *_, steps in self.accountant.history)
        self._drawn = tuple(map(max, self._drawn, checkpoint.pop("keystream_position", (steps, steps))))
        for keystream in self._keystreams.values():
            keystream.skip_to(*self._drawn)
        return checkpoint

    # Opacus' construction points ------------------------------------------------------------------------------------

    def _prepare_model(self, module: nn.Module, **kwargs: Any) -> Any:
        if kwargs.get("grad_sample_mode") != FUSED:
            return super()._prepare_model(module, **kwargs)
        if hasattr(module, "_orig_mod"):
            raise NotImplementedError(
                "the module was compiled before make_private, which must come first: pass the plain module, and "
                "compile what make_private returns"
            )
        self._ranks = Ranks.of(module)
        self.validate(module=module, optimizer=None, data_loader=None)
        batch_first = kwargs.get("batch_first", True)
        if isinstance(module, FusedGradSampleModule):
            if module.batch_first != batch_first or module.loss_reduction != kwargs.get("loss_reduction", "mean"):
                raise ValueError(
                    "the module is already wrapped with another batch_first or loss_reduction: pass the plain module, "
                    "module.to_standard_module()"
                )
            if module.is_copy or not module.capture.attached:
                raise ValueError(
                    "the module is a copy of a private one, or no longer private: pass the plain module, "
                    "module.to_standard_module()"
                )
            self._captures.add(module.capture)
            return module
        if isinstance(module, AbstractGradSampleModule):
            raise ValueError(
                f"the module is already wrapped by {type(module).__name__}: pass the plain module, "
                "module.to_standard_module()"
            )
        wrapper = FusedGradSampleModule if kwargs.get("wrap_model", True) else FusedGradSampleHooks
        hooks = wrapper(module, batch_first=batch_first, loss_reduction=kwargs.get("loss_reduction", "mean"))
        self._captures.add(hooks.capture)
        return hooks

    def _prepare_optimizer(self, *, optimizer: Optimizer, grad_sample_mode: str = FUSED, **kwargs: Any) -> Any:
        if grad_sample_mode != FUSED:
            return super()._prepare_optimizer(optimizer=optimizer, grad_sample_mode=grad_sample_mode, **kwargs)
        if kwargs.pop("distributed", False) and self._ranks is None:
            raise ValueError(
                "distributed=True needs a module wrapped in "
                "opacus.distributed.DifferentiallyPrivateDistributedDataParallel"
            )
        kwargs.pop("secure_mode", None)
        generator = kwargs.pop("noise_generator", None)
        keystream = self.keystream if generator is None else self._own(Keystream.from_generator(generator))
        kind, ranks = DPOptimizer, self._ranks
        if ranks is not None:
            kind = partial(DistributedDPOptimizer, ranks=ranks)
            ranks.agree(kwargs | {"secure_mode": self.secure_mode})
            ranks.check_parameters(optimizer)
            keystream = self._own(ranks.share(keystream))
        if isinstance(optimizer, OpacusDPOptimizer):
            optimizer = optimizer.original_optimizer
        capture = self._capture_of(optimizer)
        rows, verify = kwargs.pop("rows_per_record", None), kwargs.pop("verify_first_step", True)
        self._set_capture(capture, rows, verify, _plan_of(kwargs))
        mode = kwargs.get("clipping", "flat")
        trainable = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        names = {p: capture.name_of(p) for p in trainable}
        kwargs["clipping"], kwargs["max_grad_norm"] = clipping_of(kwargs, names, keystream)
        if unknown := kwargs.keys() - signature(DPOptimizer).parameters.keys():
            name, options = min(unknown), [*_OPTIONS, *signature(self.make_private).parameters]
            near = [] if name in options else get_close_matches(name, options, n=1)
            way_out = f"did you mean {near[0]!r}?" if near else "leave it out"
            raise TypeError(f"make_private has no option {name!r} with clipping={mode!r}: {way_out}")
        return kind(optimizer, capture=capture, stream=keystream.stream("DP-SGD"), **kwargs)

    @staticmethod
    def _set_capture(capture: Capture, rows_per_record: int | None, verify: bool, plan: Plan | None) -> None:
        """What an optimizer asks of the capture, which it may share with others."""
        shared = bool(capture.owners)
        if rows_per_record is not None and rows_per_record != capture.rows_per_record:
            if shared:
                raise ValueError(
                    f"rows_per_record is {rows_per_record}, and {capture.rows_per_record} for another optimizer of the "
                    "same module: a record has one number of rows"
                )
            capture.set_rows_per_record(rows_per_record)
        if not verify and not shared:
            capture.first_batch.turn_off()
        if plan is not None:
            names = [name for name, _ in capture.module.named_parameters()]
            if unknown := plan.forced.keys() - set(names):
                name = min(unknown)
                near = get_close_matches(name, names, n=1)
                way_out = f"did you mean {near[0]!r}?" if near else "use the names of named_parameters()"
                raise ValueError(f"the plan forces {name!r}, which is no parameter of the module: {way_out}")
            capture.plan = plan

    def _prepare_data_loader(self, data_loader: DataLoader, *, poisson_sampling: bool, **kwargs: Any) -> DataLoader:
        if not self._fused:
            return super()._prepare_data_loader(data_loader, poisson_sampling=poisson_sampling, **kwargs)
        if kwargs.get("rand_on_empty"):
            raise NotImplementedError(
                "rand_on_empty=True would add a made-up record: fused mode takes empty batches as they are"
            )
        if self.dataset not in (None, data_loader.dataset):
            warnings.warn(
                "this PrivacyEngine has counted steps on another data set object: its epsilon is that of one data set. "
                "Use a new engine for new data.",
                stacklevel=3,
            )
        self.dataset = data_loader.dataset
        ranks = self._ranks
        if ranks is not None:
            size = self._loader_options.get("dataset_size")
            ranks.check_loader(data_loader, poisson_sampling=poisson_sampling, dataset_size=size)
        if not poisson_sampling:
            refuse_repetition(data_loader)
            return data_loader
        if ranks is None:
            stream, share = self.keystream.stream("Poisson sampling"), (0, 1)
        else:
            stream = ranks.own_stream(self._own(ranks.share(self.keystream)), "Poisson sampling")
            share = (ranks.rank, ranks.size)
        return PoissonDataLoader.from_data_loader(
            data_loader,
            stream,
            batch_first=kwargs.get("batch_first", True),
            share=share,
            **self._loader_options,
        )

    # ---------------------------------------------------------------------------------------------------------------

    def _join(self, optimizer: DPOptimizer, loader: PoissonDataLoader) -> None:
        """What the loader knows of its draws and the optimizer must."""
        optimizer.expected_batch_size = loader.expected_batch_size
        known = optimizer.capture.draws
        optimizer.capture.draws = draws = known if isinstance(known, Draws) else Draws()
        draws.add(loader.draws, self._counter)
        optimizer.pending.one_draw_at_a_time, optimizer.pending.data_of = True, draws.data_of
        optimizer.pending.sampler = loader.draws
        loader.draws.begin_pass = optimizer.begin_pass
        if loader.is_padded:
            optimizer.padded = True
            loader.on_batch = optimizer.next_physical_batch

    def _own(self, keystream: Keystream) -> Keystream:
        """The one of this engine that has the key of ``keystream``, for no two of them may draw the same."""
        keystream = self._keystreams.setdefault(keystream.fingerprint, keystream)
        keystream.skip_to(*self._drawn)
        return keystream

    def _select(self, grad_sample_mode: str) -> None:
        self._fused = grad_sample_mode == FUSED
        if self.secure_mode and not self._fused:
            raise ValueError(
                f"secure_mode=True with grad_sample_mode={grad_sample_mode!r} needs torchcsprng, which is not "
                "available: "
                "use grad_sample_mode='fused'"
            )

    def _capture_of(self, optimizer: Optimizer) -> Capture:
        """The capture of the module that the optimizer's parameters belong to."""
        parameters = {p for group in optimizer.param_groups for p in group["params"]}
        for capture in self._captures:
            if capture.attached and parameters <= set(capture.module.parameters()):
                return capture
        raise ValueError("the optimizer's parameters are not those of a module that this engine made private")


def _plan_of(options: dict[str, Any]) -> Plan | None:
    """The plan that ``options`` ask for, taken out of them."""
    plan, overhead = options.pop("plan", None), options.pop("max_memory_overhead", None)
    if plan is not None and overhead is not None:
        raise ValueError("plan and max_memory_overhead are both given: set the plan's own max_memory_overhead")
    return Plan(max_memory_overhead=overhead) if overhead is not None else plan
