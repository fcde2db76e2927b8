"""What ``make_private`` returns for the model: a wrapper, or hooks on the model as it is."""

from __future__ import annotations

from opacus.grad_sample.gsm_base import (
    OPACUS_PARAM_MONKEYPATCH_ATTRS,
    AbstractGradSampleHooks,
    AbstractGradSampleModule,
)
from torch import nn

from .capture.capture import Capture
from .counting import Draws


class FusedGradSampleHooks(AbstractGradSampleHooks):
    """Captures per-sample gradients of ``m`` without wrapping it (``wrap_model=False``); :meth:`cleanup` takes the
    hooks off.

    Args:
        m: the model.
        batch_first: see :class:`~.capture.capture.Capture`.
        loss_reduction: how the user's loss combines records, "mean" or "sum".
    """

    capture: Capture

    def __init__(self, m: nn.Module, *, batch_first: bool = True, loss_reduction: str = "mean") -> None:
        AbstractGradSampleHooks.__init__(self, m, batch_first=batch_first, loss_reduction=loss_reduction)
        self._attach(m)

    def _attach(self, m: nn.Module) -> None:
        for parameter in m.parameters():  # the parent marks parameters; this mode keeps its state elsewhere
            for attribute in OPACUS_PARAM_MONKEYPATCH_ATTRS:
                if hasattr(parameter, attribute):
                    delattr(parameter, attribute)
        self.capture = Capture(m, batch_first=self.batch_first)

    @property
    def is_copy(self) -> bool:
        """True for a deep copy: an ordinary model, whose gradients nobody captures."""
        return self.capture.module is not self._module

    def set_grad_sample_to_none(self) -> None:
        """Forget what was captured since the last step."""
        if not self.is_copy:
            self.capture.clear()

    def del_grad_sample(self) -> None:
        """The same: there is no attribute to delete."""
        self.set_grad_sample_to_none()

    def forbid_grad_accumulation(self) -> None:
        """A second batch before a step raises."""
        self.capture.grad_accumulation_allowed = False

    def allow_grad_accumulation(self) -> None:
        """A second batch before a step adds to the first.

        Raises:
            ValueError: batches are Poisson draws: a record may be in two, and would count twice.
        """
        if isinstance(self.capture.draws, Draws):
            raise ValueError(
                "Poisson sampling does not compose by accumulation, as a record may be in two draws: call step() on "
                "every batch (physical_batch_size= and BatchMemoryManager split large ones)"
            )
        self.capture.grad_accumulation_allowed = True

    def remove_hooks(self) -> None:
        """Take the hooks off the model."""
        if not self.is_copy:
            self.capture.remove()


class FusedGradSampleModule(FusedGradSampleHooks, AbstractGradSampleModule):
    """The model, wrapped: calls and attributes pass through; ``state_dict`` keys begin with ``_module.`` as in
    Opacus."""

    def __init__(self, m: nn.Module, *, batch_first: bool = True, loss_reduction: str = "mean") -> None:
        AbstractGradSampleModule.__init__(self, m, batch_first=batch_first, loss_reduction=loss_reduction)
        self._attach(m)
