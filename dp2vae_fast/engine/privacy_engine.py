"""PrivacyEngine: Opacus' engine with one more ``grad_sample_mode``, and that one the default."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import opacus
from opacus.accountants import create_accountant
from opacus.grad_sample.gsm_base import AbstractGradSampleModule
from opacus.optimizers import DPOptimizer as OpacusDPOptimizer
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from .capture import Capture
from .clipping import FlatClipping
from .keystream import Keystream
from .module import FusedGradSampleHooks, FusedGradSampleModule
from .optimizer import DPOptimizer
from .sampling import PoissonDataLoader

FUSED = "fused"


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
        self._fused = True
        if secure_mode and self.keystream.source != "secret":
            raise ValueError("secure_mode=True needs a secret keystream: pass Keystream.secret() or none")
        self._captures: weakref.WeakKeyDictionary[nn.Module, Capture] = weakref.WeakKeyDictionary()

    def make_private(self, *, grad_sample_mode: str = FUSED, **kwargs: Any) -> Any:
        """Opacus' ``make_private``; see there for the arguments and returns.

        In mode ``"fused"`` it takes ``rows_per_record``, ``materialize_grad`` and ``count_rounding`` too
        (:class:`~.capture.Capture`, :class:`~.optimizer.DPOptimizer`, :class:`~.clipping.FlatClipping`).

        Raises:
            ValueError: ``noise_generator`` in secure mode; optimizer parameters that are not the module's.
            NotImplementedError: a layer that mixes records, or a clipping mode or wrapper that fused mode does not
            have.
        """
        self._select(grad_sample_mode)
        parts: Any = super().make_private(grad_sample_mode=grad_sample_mode, **kwargs)
        if self._fused:
            _, optimizer, data_loader = parts
            # int(N * (1 / batches)), which Opacus takes, is one too low for many N.
            optimizer.expected_batch_size = len(data_loader.dataset) // len(data_loader)
            if isinstance(data_loader, PoissonDataLoader):
                data_loader.batch_sampler.begin_pass = optimizer.begin_pass  # type: ignore[union-attr]
        return parts

    def make_private_with_epsilon(self, *, grad_sample_mode: str = FUSED, **kwargs: Any) -> Any:
        """Opacus' ``make_private_with_epsilon``: the noise multiplier follows from a target (epsilon, delta) and
        epochs."""
        self._select(grad_sample_mode)
        return super().make_private_with_epsilon(grad_sample_mode=grad_sample_mode, **kwargs)

    def privatize(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        *,
        noise_multiplier: float,
        max_grad_norm: float,
        sample_rate: float,
        expected_batch_size: int,
        loss_reduction: str = "sum",
        grad_sample_mode: str = FUSED,
        rows_per_record: int = 1,
        **kwargs: Any,
    ) -> tuple[nn.Module, Any]:
        """:meth:`make_private` for a loop that draws its own batches: no loader, every number public and given.

        Args:
            sample_rate: probability with which the loop puts each record into a batch
                (:class:`~.sampling.PoissonBatches`).
            expected_batch_size: public divisor of the noisy sum. With ``loss_reduction="sum"`` nothing is divided.
            rows_per_record: consecutive rows that belong to one record; fused mode only.

        Returns:
            The wrapped module and the private optimizer; the accountant counts one step of rate ``sample_rate``
            per optimizer step.
        """
        self._select(grad_sample_mode)
        if grad_sample_mode != FUSED and rows_per_record != 1:
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
        private.attach_step_hook(self.accountant.get_optimizer_hook_fn(sample_rate=sample_rate))
        return wrapped, private

    # Opacus' construction points ------------------------------------------------------------------------------------

    def _prepare_model(self, module: nn.Module, **kwargs: Any) -> Any:
        if kwargs.get("grad_sample_mode") != FUSED:
            return super()._prepare_model(module, **kwargs)
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
            self._captures[module._module] = module.capture
            return module
        if isinstance(module, AbstractGradSampleModule):
            raise ValueError(
                f"the module is already wrapped by {type(module).__name__}: pass the plain module, "
                "module.to_standard_module()"
            )
        wrapper = FusedGradSampleModule if kwargs.get("wrap_model", True) else FusedGradSampleHooks
        hooks = wrapper(module, batch_first=batch_first, loss_reduction=kwargs.get("loss_reduction", "mean"))
        self._captures[module] = hooks.capture
        return hooks

    def _prepare_optimizer(self, *, optimizer: Optimizer, grad_sample_mode: str = FUSED, **kwargs: Any) -> Any:
        if grad_sample_mode != FUSED:
            return super()._prepare_optimizer(optimizer=optimizer, grad_sample_mode=grad_sample_mode, **kwargs)
        if kwargs.pop("distributed", False):
            raise NotImplementedError("grad_sample_mode='fused' runs in one process so far: use Opacus' modes with DDP")
        clipping = kwargs.pop("clipping", "flat")
        if clipping != "flat":
            raise NotImplementedError(f"grad_sample_mode='fused' has clipping='flat' only, not {clipping!r}")
        kwargs.pop("secure_mode", None)
        generator = kwargs.pop("noise_generator", None)
        keystream = self.keystream if generator is None else Keystream.from_generator(generator)
        if isinstance(optimizer, OpacusDPOptimizer):
            optimizer = optimizer.original_optimizer
        capture = self._capture_of(optimizer)
        capture.set_rows_per_record(kwargs.pop("rows_per_record", 1))
        return DPOptimizer(
            optimizer,
            capture=capture,
            stream=keystream.stream("DP-SGD"),
            clipping=FlatClipping(count_rounding=kwargs.pop("count_rounding", True)),
            **kwargs,
        )

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
        if not poisson_sampling:
            return data_loader
        stream = self.keystream.stream("Poisson sampling")
        return PoissonDataLoader.from_data_loader(data_loader, stream, batch_first=kwargs.get("batch_first", True))

    # ---------------------------------------------------------------------------------------------------------------

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
        for module, capture in self._captures.items():
            if parameters <= set(module.parameters()):
                return capture
        raise ValueError("the optimizer's parameters are not those of a module that this engine made private")
