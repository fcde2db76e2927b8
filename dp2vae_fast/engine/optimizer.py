"""DPOptimizer: clipped sum, noise and the inner optimizer's step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from opacus.optimizers import DPOptimizer as OpacusDPOptimizer
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from .. import ops
from .capture.book import Origin
from .capture.capture import Capture
from .clipping import Clipping, FlatClipping
from .gradients.gradient import Gradient
from .keystream import Stream
from .pending import Pending
from .precision import BATCHES_IN_FLOAT32, full_precision, roundings_on, sum_rounding
from .update import FusedUpdate


class DPOptimizer(OpacusDPOptimizer):
    """Takes per-sample gradients from a :class:`~.capture.capture.Capture`, clips, sums, adds noise, and steps the
    inner optimizer.

    ``grad = (sum_n c_n g_n + noise_multiplier * sensitivity * z) / expected_batch_size``, z standard normal. The
    sum runs over all physical batches since the last step, in float32 or wider; the division
    (``loss_reduction="mean"`` only) is by the *public* expected batch size.

    Where the inner optimizer is SGD, Adam or AdamW, noise and step happen in one pass and the private gradient is
    never in memory; pass ``materialize_grad=True`` to have it in ``p.grad`` after the step, as Opacus does.

    Guarantees:
        No record contributes more than ``max_grad_norm`` to the sum, over all parameters of this optimizer
        together, and none changes the sum as rounded by more than :meth:`sensitivity`. A record whose gradient is not
        finite contributes exactly zero; an empty batch contributes zero, and its step is noised and counted.

    Args:
        optimizer: the inner optimizer; its state and param_groups stay its own.
        noise_multiplier: standard deviation of the noise in units of the sensitivity; 0 for none (no privacy).
        max_grad_norm: bound of each record's gradient norm, in units of the gradient of one record's loss.
        expected_batch_size: public number of records that a batch is expected to have: the divisor of
            ``loss_reduction="mean"``, and what the rounding of the sum is bounded by.
        loss_reduction: how the user's loss combines records, "mean" or "sum".
        capture: where per-sample gradients come from.
        stream: where noise comes from.
        clipping: from squared norms to factors; flat clipping unless given.
        materialize_grad: keep the private gradient in ``p.grad`` and call the inner optimizer's own ``step``.
        sum_dtype: float32 leaves products over several positions to the vendor library, which adds up all records at
            once, and their rounding out of :meth:`sensitivity`. That is faster where no native kernel keeps records
            apart and float64 is slow.

    Attributes:
        padded: every physical batch is announced by :meth:`next_physical_batch`; one that is not raises.
        fetches_ahead: batches may be drawn, and signalled, before those in front of them are stepped on.
        largest_batch: records of the largest batch, where draws are not Poisson's.
        pending: what the pending sum comes from.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: int | None,
        loss_reduction: str = "mean",
        capture: Capture,
        stream: Stream,
        clipping: Clipping | None = None,
        materialize_grad: bool = False,
        sum_dtype: torch.dtype = torch.float64,
    ) -> None:
        if expected_batch_size is None:
            raise ValueError("expected_batch_size is missing: give the public number of records expected in a batch")
        if isinstance(optimizer, LBFGS):
            raise NotImplementedError(
                "LBFGS takes several gradients a step, all of which would be released: use another"
            )
        if sum_dtype not in (torch.float32, torch.float64):
            raise ValueError(f"sum_dtype is {sum_dtype}: choose torch.float64 or torch.float32")
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size,
            loss_reduction=loss_reduction,
        )
        optimizer.zero_grad(set_to_none=True)  # an un-noised gradient of before would still move a frozen parameter
        self.capture = capture
        self.stream = stream
        self.clipping = clipping or FlatClipping()
        self.sum_dtype = sum_dtype
        self.padded = self.fetches_ahead = False
        self.largest_batch = 0
        self.pending = Pending()
        self._announced: tuple[Tensor, bool] | None = None  # mask, and whether the draw ends
        self._materialize_grad = materialize_grad
        self.update = self._fused_update()
        self._sums: dict[Tensor, Tensor] = {}
        self._batches = 0
        self._replayed = False  # the pending sum has a batch that was replayed, and no step since
        self._bound = 0.0
        self._counted_std: float | None = None  # of the noise that the step at hand has been counted with
        self._check_settings()
        capture.owners.update(dict.fromkeys(self.params, self._close_batch))

    def _fused_update(self) -> FusedUpdate | None:
        return None if self._materialize_grad else FusedUpdate.of(self.original_optimizer)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the private module.

        Raises:
            ValueError: others, which would have no gradient and be moved by noise alone.
        """
        given = param_group["params"]
        added = [given] if isinstance(given, Tensor) else list(given)
        if any(self.capture.name_of(p) == "?" for p in added):
            raise ValueError(
                "add_param_group was given a parameter that the private module did not have at make_private: it would "
                "be moved by noise alone. Make the module private again with all of its parameters"
            )
        self.original_optimizer.add_param_group(param_group | {"params": added})
        self.capture.owners.update(dict.fromkeys(added, self._close_batch))
        self.update = self._fused_update()

    @property
    def origins(self) -> set[Origin]:
        """What the pending sum was drawn from, for telling one draw from another."""
        return self.pending.origins

    # What Opacus' loop, schedulers and memory manager call ----------------------------------------------------------

    @property
    def accumulated_iterations(self) -> int:
        """Batches of records (not physical batches) since the last step, one whose gradients are still captured
        included; 1 where there is none."""
        captured = self.capture.records is not None and self.capture.holds(self.params)
        return max(1, self._batches + self._replayed + captured)

    def sensitivity(self) -> float:
        """How far adding or removing one record can move the sum that the noise is added to, in Euclidean norm.

        That is the clipping bound, and a little more for the rounding of the sum (:func:`~.precision.sum_rounding`).
        While a sum is pending the bound is the largest that a part of it was clipped to, should a schedule lower
        ``max_grad_norm`` between physical batches.
        """
        bound = max(self._bound, self.clipping.sensitivity(self.max_grad_norm))
        kinds = {(p.dtype, p.device) for p in self.params}
        dtype = torch.float64 if all(dtype == torch.float64 for dtype, _ in kinds) else torch.float32
        largest = self.largest_batch and max(self.largest_batch * self.accumulated_iterations, self.pending.records)
        roundings = max((roundings_on(device) for _, device in kinds), default=1)
        return bound * (1.0 + sum_rounding(self._expected_records, dtype, largest, roundings))

    @property
    def _expected_records(self) -> float:
        assert self.expected_batch_size is not None
        return self.expected_batch_size * self.accumulated_iterations

    def attach_step_hook(self, fn: Callable[[OpacusDPOptimizer], None]) -> None:
        """Call ``fn`` whenever a step is counted, after what was attached before: nothing takes the accountant's
        place. A noise multiplier or bound that it sets is the next step's, as the noise of this one is counted."""
        before = self.step_hook

        def both(optimizer: OpacusDPOptimizer) -> None:
            if before is not None:
                before(optimizer)
            fn(optimizer)

        self.step_hook = both

    def clip_and_accumulate(self) -> None:
        """Clip the captured gradients and add them to the pending sum."""
        with full_precision(self.params), self._all_or_nothing():
            self._clip_and_accumulate()
            self.capture.check_first_batch()

    def _clip_and_accumulate(self) -> None:
        records, params = self.capture.records, self.params
        mask = self.mask
        if self.capture.holds(params):
            if self._replayed:  # before it
                self._refuse_accumulation()
                self._batches += 1
            self._note_origins(self.capture.origins, (records or 0) if mask is None else int(mask.sum()))
        gradients = self.capture.take(params)
        self._batches += 1
        self._replayed = False
        if self.padded and self._announced is None:
            raise RuntimeError(
                "a padded batch without its mask, whose padding would count as records: take the batches from the "
                "data loader that make_private returned, one step each and without BatchMemoryManager"
            )
        used = {p: g for p, g in zip(params, gradients, strict=True) if g is not None}
        if not records or not used:
            return
        if mask is not None and len(mask) != records:
            raise ValueError(f"the mask has {len(mask)} rows, the batch {records} records: give one bool a record")
        del gradients
        self._add(self.clipped_sums(used, records, mask))

    def clipped_sums(
        self, gradients: dict[Any, Gradient], records: int, mask: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Each parameter and the clipped sum of its ``gradients``, of ``records`` records each, such as are not masked;
        one after the other, and taken from the dictionary, so that what a gradient is made from can go."""
        scale = records if self.loss_reduction == "mean" else 1  # undo the mean's division by this batch's own size
        factors = self.clipping.factors(gradients, self.max_grad_norm, scale, mask)
        self._note_bound()
        while gradients:
            p, g = gradients.popitem()
            weighted = g.weighted_sum(factors[p], self.sum_dtype)
            del g
            yield p, weighted

    def _add(self, sums: Iterable[tuple[Tensor, Tensor]]) -> None:
        narrow = self.pending.batches <= BATCHES_IN_FLOAT32
        for p, weighted in sums:
            pending = self._sums.get(p)
            if pending is None:
                self._sums[p] = weighted
            elif narrow and pending.dtype == weighted.dtype:
                pending.add_(weighted)
            else:
                self._sums[p] = pending.double().add_(weighted)

    def add_replayed(self, sums: Iterable[tuple[Tensor, Tensor]], records: int) -> None:
        """Add a batch of ``records`` records whose :meth:`clipped_sums` a graph has formed, in place of a forward and a
        backward pass: a :meth:`step` follows."""
        self.capture.begin_batch()
        if self._replayed:
            self._close_batch()
        with self._all_or_nothing():
            self.capture.book.begin()
            self._note_origins(self.capture.origins | self.capture.draws(), records)
            self._note_bound()
            self._add(sums)
            self._replayed = True

    def _note_bound(self) -> None:
        """A part of the pending sum is clipped to the bound of this moment; as a number, which no user changes."""
        self._bound = max(self._bound, float(self.clipping.sensitivity(self.max_grad_norm)))

    def _note_origins(self, origins: set[Origin], records: int) -> None:
        """Where gradients come from; without accumulation, one draw only, and each of its records once."""
        self.pending.add(origins, records)
        if self.capture.grad_accumulation_allowed:
            return
        try:
            self.pending.check(signalled=bool(self._step_skip_queue))
        except ValueError:
            self.capture.drop(self.params)
            raise

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Forget a sum that an error or an interrupt left incomplete: it must not be added to the next one."""
        try:
            yield
        except BaseException:
            self._forget_sums()
            raise

    def next_physical_batch(self, mask: Tensor, first: bool = True, last: bool = True) -> None:
        """Announce a padded batch.

        Args:
            mask: bool ``[N]``, False where a row is padding.
            first, last: its draw begins with it; ends with it, and so does the step.

        Raises:
            RuntimeError: there was no step on the batch before.
        """
        if self._announced is not None or (first and self._is_last_step_skipped):
            raise RuntimeError(
                "there was no step on the batch before this one, which would mix their draws: call backward() and "
                "step() on every batch before the next is fetched, empty batches too, and step() alone after an error"
            )
        self._announced = mask, last

    @property
    def mask(self) -> Tensor | None:
        """Of the padded batch that is announced and had no step yet."""
        return None if self._announced is None else self._announced[0]

    def begin_pass(self) -> bool:
        """A new pass over the data begins. True if that cut a draw short between its physical batches.

        The part of it that is pending is forgotten: with a later draw it would be one step on two draws, in both of
        which a record may be.
        """
        cut_short = self._is_last_step_skipped or bool(self._step_skip_queue) or self._announced is not None
        if cut_short:
            self._step_skip_queue.clear()
            self._is_last_step_skipped, self._announced = False, None
            self.zero_grad()
        elif not self.capture.grad_accumulation_allowed:
            self._forget_sums()
        return cut_short

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        """Clip and accumulate; unless this step is to be skipped, put the private gradient in ``p.grad`` and count
        the step."""
        if not self._begin_step():
            return False
        with self._all_or_nothing():
            self.add_noise()
            self.scale_grad()
            self._end_step()
        return True

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; a physical batch that is not its logical batch's last (``signal_skip_step``) is only
        accumulated. What ``closure`` returns is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.update is None or not self.update.usable:
            if self.pre_step():
                self.original_optimizer.step()
            return loss
        if self._begin_step():
            with self._all_or_nothing():
                self.update.step(self._pending_sums(), stream=self.stream, std=self._noise_std(), scale=self._scale())
                self._end_step()
        return loss

    @property
    def grad_samples(self) -> list[Tensor]:
        raise AttributeError(
            "per-sample gradients are not kept, and p.grad_sample is never set: use grad_sample_mode='hooks', or for "
            "a layer's norms dp2vae_fast.ops"
        )

    def add_noise(self) -> None:
        """``p.grad = sum + noise``."""
        sums = self._pending_sums()
        if (std := self._noise_std()) > 0:
            every = [p for group in self.param_groups for p in group["params"]]
            indices = [i for i, p in enumerate(every) if p.requires_grad]  # as the update in one pass numbers them
            self.stream.add_noise_([ops.lying(s) for s in sums], std, indices)
        for p, total in zip(self.params, sums, strict=True):
            p.grad = total.to(p.dtype)

    def scale_grad(self) -> None:
        """Divide by the expected batch size where the user's loss is a mean."""
        for p in self.params:
            if p.grad is not None:
                p.grad.mul_(self._scale())

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Forget captured gradients; forget the pending sum too unless the last step was a skipped one."""
        self.capture.drop(self.params)
        if not self._is_last_step_skipped:
            self._forget_sums()
        self._batches, self._replayed = 0, False
        self.original_optimizer.zero_grad(set_to_none)

    # ---------------------------------------------------------------------------------------------------------------

    def _end_step(self) -> None:
        self.max_grad_norm = self.clipping.next_bound(self.max_grad_norm, self._expected_records)
        self._forget_sums()

    def _forget_sums(self) -> None:
        self._sums.clear()
        self.clipping.forget()
        self.pending.clear()
        self._batches = 0
        self._bound, self._replayed, self._counted_std = 0.0, False, None

    def _begin_step(self) -> bool:
        """Close the physical batch. False if the step is to be skipped; otherwise the accountant has counted it."""
        self._check_settings()
        self.clip_and_accumulate()
        with self._all_or_nothing():
            signalled = bool(self._step_skip_queue)
            self.pending.origins |= self.capture.draws()  # of an empty draw, too
            for group in self.param_groups:
                for p in group["params"]:
                    if not p.requires_grad:
                        p.grad = None  # of a time when it was trained, by whatever
            if self._is_part_of_a_batch():
                self._is_last_step_skipped = True
                self._batches = 0  # the rest of this batch is to come
                return False
            in_parts = self.padded or self._is_last_step_skipped  # of which one may be missing, after an error
            if signalled:
                self.pending.check_drawn_ahead()
            if not in_parts and not self.capture.grad_accumulation_allowed:
                self.pending.check_whole()
            self._is_last_step_skipped = False
            self._sum_up()
            self._counted_std = self._noise_std()
            if self.step_hook:
                self.step_hook(self)
            return True

    def _is_part_of_a_batch(self) -> bool:
        if self._announced is not None:
            (_, last), self._announced = self._announced, None
            return not last
        signals, of_a_loader = len(self._step_skip_queue), bool(self.capture.draws())
        if not self.fetches_ahead and (signals > 1 or (of_a_loader and signals == 0 and self._is_last_step_skipped)):
            self._step_skip_queue.clear()
            self._is_last_step_skipped = False
            raise RuntimeError(
                "a batch before this one had no step, or two: draws or records would be mixed. Call step() "
                "once on every batch, empty ones too. The sum of this draw has been dropped"
            )
        return self._check_skip_next_step()

    def _sum_up(self) -> None:
        """This process's part of the sum is complete: here others add theirs (:mod:`.distributed`)."""

    def _check_settings(self) -> None:
        """What a schedule may have set since the last step."""
        if not 0.0 < self.max_grad_norm < math.inf:
            raise ValueError(f"max_grad_norm is {self.max_grad_norm}: it must be positive and finite")
        if not 0.0 <= self.noise_multiplier < math.inf:
            raise ValueError(f"noise_multiplier is {self.noise_multiplier}: it must be finite and not negative")
        self.clipping.gradient_noise_multiplier(self.noise_multiplier)

    def _noise_std(self) -> float:
        """That of the step which has been counted, whatever a step hook has set for the next one."""
        if self._counted_std is not None:
            return self._counted_std
        return self.clipping.gradient_noise_multiplier(self.noise_multiplier) * self.sensitivity()

    def _scale(self) -> float:
        if self.loss_reduction == "sum":
            return 1.0
        return 1.0 / self._expected_records

    def _pending_sums(self) -> list[Tensor]:
        """One a parameter, in float32 or wider, lying in memory as it does."""
        return [_laid_out(self._sums.get(p), p) for p in self.params]

    def _close_batch(self) -> None:
        """A second batch begins before a step: true accumulation, where sampling allows it."""
        self._refuse_accumulation()
        self.clip_and_accumulate()

    def _refuse_accumulation(self) -> None:
        if not self.capture.grad_accumulation_allowed:
            raise ValueError(
                "Poisson sampling does not compose by accumulation, and this optimizer had no step on the batch before "
                "(or another was stepped in its place): call optimizer.step() after every batch (BatchMemoryManager "
                "splits large batches), and backward() once on the sum of several losses"
            )

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a DPOptimizer holds hooks and a secret noise stream: save its state_dict() instead")


def _laid_out(total: Tensor | None, parameter: Tensor) -> Tensor:
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    if total is None:
        return torch.zeros_like(parameter, dtype=dtype)
    if total.stride() == parameter.stride():
        return total if total.dtype == dtype else total.to(dtype)
    return torch.empty_like(parameter, dtype=dtype).copy_(total)
