"""Clipping: from the gradients of a batch to one factor a record, and the sensitivity that follows.

A clipping mode answers four questions: by what is each record's gradient scaled, how much can one record then change
the sum, how much of the noise is left for that sum, and what is the bound of the next step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops.norm import product_error
from .gradients.gradient import Gradient
from .gradients.products import Product
from .keystream import Keystream, Stream
from .precision import STILL_COUNTED

# Where the error bound of a squared norm is more than this part of it, the norm is taken again in float64: otherwise
# the record would be clipped by more than half of that too short.
_LOOSE = 0.01
_GRAM_NUMBERS = 2**22  # float64 numbers of Gram matrices held at a time


def bounded_norms(
    gradients: Sequence[Gradient], harmless: float = 0.0, second_look: bool = True
) -> tuple[Tensor, Tensor]:
    """Squared norms ``[L, N]`` of L parameters' gradients and bounds ``[L, N]`` of their errors.

    A record whose errors are large beside its norm, as where a Gram sum cancels, is taken again in float64; each
    record by what it is itself, whatever else is in the batch. One whose bound is no longer than ``harmless`` is
    left alone. Without a ``second_look`` all are: they keep the wider bound, and no value is looked at.
    """
    terms = [g.norm_sq() for g in gradients]
    dtype = torch.float64 if any(n.dtype == torch.float64 for n, _ in terms) else torch.float32
    if dtype == torch.float64:
        terms = [(n.to(dtype), e.to(dtype)) for n, e in terms]
    norm_sq, error = (torch.stack(rows) for rows in zip(*terms, strict=True))
    if second_look and dtype == torch.float32:
        total, uncertain = norm_sq.sum(0), error.sum(0)
        loose = uncertain > _LOOSE * total
        if bool(loose.any()):  # no more is asked of most batches
            loose &= (total + uncertain > harmless**2) & uncertain.isfinite()
            if bool(loose.any()):
                _take_again(gradients, loose, total, norm_sq, error)
    return norm_sq, error


def _take_again(gradients: Sequence[Gradient], loose: Tensor, total: Tensor, norm_sq: Tensor, error: Tensor) -> None:
    """Norms and errors of the records that are ``loose``, anew where they come of sums that cancel; ``total``: the sum
    of norms that it is measured by."""
    for row, gradient in enumerate(gradients):
        # What has one position is multiplied in float32 after all, with operands rounded as its error says; and what is
        # formed is longer than the exact gradient by more than its own small error says.
        if not isinstance(gradient, Product) or gradient.formed or gradient.cost.positions == 1:
            continue
        again = (loose & (error[row] > _LOOSE / len(gradients) * total)).nonzero().flatten()
        for records in again.split(max(1, _GRAM_NUMBERS // gradient.cost.positions**2)) if len(again) else ():
            exact, exact_error = gradient.in_float64(records).norm_sq()
            rough = error[row, records].double()
            # What will be added up is multiplied in float32, and may be longer than the exact gradient by that; `rough`
            # counted the roundings of the product, and of its operands, twice.
            longer = (0.5 * product_error(gradient.cost.positions, norm_sq) * rough).sqrt()
            bound = exact_error + 2.0**-23 * exact + longer * (2 * exact.sqrt() + longer)
            error[row, records] = torch.maximum(STILL_COUNTED * rough, bound).float()
            norm_sq[row, records] = exact.float()


@dataclass(kw_only=True)
class Clipping:
    """A clipping mode. Fields that have a default are options of ``make_private``.

    Args:
        count_rounding: divide by an upper bound of the norm (as computed, plus a bound of its rounding error)
            instead of the norm as computed. Off, a record may exceed the bound by rounding: for comparisons only.

    Attributes:
        second_look: take norms again in float64 where rounding would clip a record much too short. Which records that
            is must be looked at, which a captured batch cannot be (:mod:`.captured`); it is for all batches or for
            none, as a record's factor must not depend on the batches before.
        count: a number that each record of the pending sum adds to, for modes that release one (with noise).
    """

    count_rounding: bool = True
    second_look: bool = field(default=True, init=False, repr=False)
    count: float = field(default=0.0, init=False, repr=False)

    def sensitivity(self, max_grad_norm: float) -> float:
        """Largest norm of one record's part of the sum."""
        return max_grad_norm

    def factors(
        self,
        gradients: Mapping[Any, Gradient],
        max_grad_norm: float,
        scale: float = 1.0,
        mask: Tensor | None = None,
    ) -> dict[Any, Tensor]:
        """Weights ``[N]`` for the gradients as captured, such that ``weight * gradient`` is ``c_n * scale * gradient``.

        Args:
            gradients: those of the parameters that were used, by parameter, each of the same N records.
            max_grad_norm: the bound C; ``c_n = min(1, C / |scale * g_n|)``, 0 for a record that is not finite.
            scale: what the captured gradients must be multiplied with to be those of one record's loss.
            mask: bool ``[N]``, False for padding, whose weight is 0.
        """
        found: dict[Any, Tensor] = {}
        for own, bound in self._groups(gradients, max_grad_norm):
            norm_sq, error = bounded_norms(list(own.values()), self._harmless(bound / scale), self.second_look)
            if not self.count_rounding:
                error = torch.zeros_like(error)
            factors = self._rule(norm_sq, error, bound, scale)
            if mask is not None:
                factors = torch.where(mask.to(factors.device), factors, 0.0)
            self._note(factors, scale, mask)
            found |= dict.fromkeys(own, factors)
        return found

    # What a mode may do differently.

    def _groups(
        self, gradients: Mapping[Any, Gradient], max_grad_norm: float
    ) -> Iterable[tuple[Mapping[Any, Gradient], float]]:
        """Gradients that are clipped together, and their bound."""
        return [(gradients, max_grad_norm)]

    def _note(self, factors: Tensor, scale: float, mask: Tensor | None) -> None:
        """Add to ``count`` what the records of a batch, ``scale`` times a factor of at most 1 each, add to it."""

    def _harmless(self, bound: float) -> float:
        """Norm up to which a record's factor does not depend on its norm."""
        return bound

    def _rule(self, norm_sq: Tensor, error: Tensor, bound: float, scale: float) -> Tensor:
        return scale * ops.clip_factors(norm_sq, error, bound / scale)

    def gradient_noise_multiplier(self, noise_multiplier: float) -> float:
        """Noise multiplier left for the sum of gradients, where a whole step may spend ``noise_multiplier``."""
        return noise_multiplier

    def next_bound(self, max_grad_norm: float, records: float) -> float:
        """The bound of the next step, after one on ``records`` expected records."""
        return max_grad_norm

    def forget(self) -> None:
        """The pending sum was dropped: drop what belongs to it."""
        self.count = 0.0


@dataclass(kw_only=True)
class FlatClipping(Clipping):
    """Every record's gradient, over all parameters together, is scaled to norm at most ``max_grad_norm``."""


@dataclass(kw_only=True)
class AutomaticClipping(Clipping):
    """Every record's gradient is scaled to nearly ``max_grad_norm``, short ones too (Bu, Wang, Zha and Karypis 2023).

    Args:
        stability: added to the norm, in units of the gradient of one record's loss; gradients much shorter than that
            stay short.
    """

    stability: float = 0.01

    def __post_init__(self) -> None:
        if not 0.0 < self.stability < math.inf:
            raise ValueError(f"stability is {self.stability}: it must be positive and finite")

    def _harmless(self, bound: float) -> float:
        return 0.0

    def _rule(self, norm_sq: Tensor, error: Tensor, bound: float, scale: float) -> Tensor:
        return ops.normalize_factors(norm_sq, error, bound, self.stability / scale)


@dataclass(kw_only=True)
class GroupClipping(Clipping):
    """Each group of parameters has a bound of its own ("per layer"); the record's whole gradient then is at most
    ``sqrt(sum of their squares)`` long, which is the optimizer's ``max_grad_norm``.

    Args:
        groups: for each parameter the number of its group.
        bounds: for each group its bound; a schedule of ``max_grad_norm`` scales all of them.
    """

    groups: Mapping[Any, int]
    bounds: Sequence[float]

    def __post_init__(self) -> None:
        if not self.bounds or not all(0.0 < b < math.inf for b in self.bounds):
            raise ValueError(f"max_grad_norm is {list(self.bounds)}: every bound must be positive and finite")

    @property
    def max_grad_norm(self) -> float:
        """The bound of all groups together."""
        return math.hypot(*self.bounds)

    @classmethod
    def of(
        cls, names: Mapping[Any, str], bounds: float | Sequence[float] | Mapping[str, float], **options
    ) -> GroupClipping:
        """From what a user writes.

        Args:
            names: the trainable parameters of the optimizer, in its order, and their names.
            bounds: one bound a parameter; or ``{name or prefix of names up to a dot: bound of all these together}``,
                the longest prefix first; or one number for the whole, split equally among the parameters.
        """
        if isinstance(bounds, Mapping):
            prefixes = sorted(bounds, key=len, reverse=True)

            def group(name: str) -> int:
                found = [p for p in prefixes if not p or name == p or name.startswith(p + ".")]
                if not found:
                    raise ValueError(f"max_grad_norm names no group for parameter {name!r}: add it, or a prefix of it")
                return prefixes.index(found[0])

            groups = {p: group(name) for p, name in names.items()}
            if unused := [p for i, p in enumerate(prefixes) if i not in groups.values()]:
                raise ValueError(f"max_grad_norm names {unused[0]!r}, which is no trainable parameter: remove it")
            return cls(groups=groups, bounds=[float(bounds[p]) for p in prefixes], **options)
        each = {p: i for i, p in enumerate(names)}
        if isinstance(bounds, Sequence):
            if len(bounds) != len(names):
                raise ValueError(
                    f"max_grad_norm has {len(bounds)} bounds for {len(names)} trainable parameters: give one for each"
                )
            return cls(groups=each, bounds=[float(b) for b in bounds], **options)
        return cls(groups=each, bounds=[bounds / math.sqrt(len(names))] * len(names), **options)

    def _groups(
        self, gradients: Mapping[Any, Gradient], max_grad_norm: float
    ) -> Iterable[tuple[Mapping[Any, Gradient], float]]:
        members: dict[int, dict[Any, Gradient]] = {}
        for parameter, gradient in gradients.items():
            if parameter not in self.groups:
                raise ValueError(
                    "a parameter is trained that was frozen at make_private, and has no bound of its own: make the "
                    "module private with all parameters that will be trained"
                )
            members.setdefault(self.groups[parameter], {})[parameter] = gradient
        for group, own in members.items():
            share = self.bounds[group] / self.max_grad_norm * (1 - 2.0**-50)  # rounding included
            yield own, share * max_grad_norm


@dataclass(kw_only=True)
class AdaptiveClipping(Clipping):
    """Flat clipping whose bound follows a quantile of the gradient norms (Andrew, Thakkar, McMahan and Ramaswamy 2021).

    After every step ``C <- C exp(-clipbound_learning_rate (fraction - target_unclipped_quantile))`` with the noisy
    fraction of records that were not clipped. Each record counts as 1/2 or -1/2, so that its sensitivity is 1/2; the
    count's noise has standard deviation ``unclipped_num_std``, and the step as a whole is one Gaussian mechanism of the
    given noise multiplier z if the gradients get ``(z^-2 - (2 unclipped_num_std)^-2)^(-1/2)`` of it. The fraction is
    over the *public* expected batch size.

    Args:
        stream: where the count's noise comes from.
        target_unclipped_quantile: fraction of records that should not be clipped.
        clipbound_learning_rate: of the bound's logarithm.
        unclipped_num_std: standard deviation of the count's noise, in records; more than half the noise multiplier.
        min_clipbound, max_clipbound: public limits of the bound.
    """

    stream: Stream
    target_unclipped_quantile: float = 0.5
    clipbound_learning_rate: float = 0.2
    unclipped_num_std: float = 10.0
    min_clipbound: float = 1e-3
    max_clipbound: float = 1e3

    def __post_init__(self) -> None:
        if not 0.0 < self.min_clipbound < self.max_clipbound < math.inf:
            raise ValueError(
                f"min_clipbound is {self.min_clipbound}, max_clipbound {self.max_clipbound}: give 0 < min < max, finite"
            )
        if not 0.0 <= self.target_unclipped_quantile <= 1.0:
            raise ValueError(
                f"target_unclipped_quantile is {self.target_unclipped_quantile}: it is a fraction between 0 and 1"
            )
        if not 0.0 < self.unclipped_num_std < math.inf:
            raise ValueError(f"unclipped_num_std is {self.unclipped_num_std}: it must be positive and finite")

    def _note(self, factors: Tensor, scale: float, mask: Tensor | None) -> None:
        unclipped = int((factors >= scale).sum())
        self.count += unclipped - 0.5 * (len(factors) if mask is None else int(mask.sum()))

    def gradient_noise_multiplier(self, noise_multiplier: float) -> float:
        if noise_multiplier == 0.0:
            return 0.0
        left = noise_multiplier**-2 - (2 * self.unclipped_num_std) ** -2
        if left <= 0.0:
            raise ValueError(
                f"noise_multiplier is {noise_multiplier}, which the count's own noise uses up: raise unclipped_num_std "
                f"({self.unclipped_num_std}) above {noise_multiplier / 2:g}"
            )
        return left**-0.5

    def next_bound(self, max_grad_norm: float, records: float) -> float:
        count = torch.tensor([self.count], dtype=torch.float64)
        self.stream.add_noise_([count], self.unclipped_num_std)
        self.count = 0.0
        fraction = float(count) / records + 0.5
        moved = max_grad_norm * math.exp(-self.clipbound_learning_rate * (fraction - self.target_unclipped_quantile))
        return min(max(moved, self.min_clipbound), self.max_clipbound)


_MODES: dict[str, type[Clipping]] = {
    "flat": FlatClipping,
    "per_layer": GroupClipping,
    "automatic": AutomaticClipping,
    "adaptive": AdaptiveClipping,
}


def clipping_of(options: dict[str, Any], names: Mapping[Any, str], keystream: Keystream) -> tuple[Clipping, float]:
    """The mode that ``options`` of ``make_private`` ask for, taken out of them with its own, and its first bound.

    Args:
        names: the trainable parameters of the optimizer, in its order, and their names.
        keystream: where a mode that releases a number takes its noise from.
    """
    mode, bound = options.pop("clipping", "flat"), options["max_grad_norm"]
    if mode != "per_layer" and isinstance(bound, Sequence | Mapping):
        raise ValueError(f"max_grad_norm has several bounds, clipping={mode!r} takes one: use 'per_layer'")
    if mode not in _MODES:
        raise ValueError(f"clipping is {mode!r}: choose 'flat', 'per_layer', 'automatic' or 'adaptive'")
    kind = _MODES[mode]
    known = [f.name for f in fields(kind) if f.init and f.default is not MISSING]
    own = {name: options.pop(name) for name in known if name in options}
    if kind is GroupClipping:
        clipping = GroupClipping.of(names, bound, **own)
        return clipping, clipping.max_grad_norm
    if kind is AdaptiveClipping:
        own["stream"] = keystream.stream("clipping bound")
    return kind(**own), bound
