"""Stage 1 with the outputs of its accounted mechanisms held: drawn once, and the same ones again for other records.

What is left is all that may not depend on a record. The first time, what a mechanism does with its noise is noted; the
second time, with one record more, how far that record moves it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..engine.accounting import Mechanism
from ..engine.audit import FALSE_ALARM, Check
from ..engine.audit.randomness import noise_p_values, worst
from ..engine.keystream import Stream
from .loop import RecordLosses
from .stage import Stage

Outputs = dict[str, Tensor]


@dataclass
class Drawn:
    """What became known of a mechanism that is drawn in one piece.

    ``noise_multiplier`` is the planned one, ``asked`` the standard deviations that noise was asked of, ``normal`` the
    noise that came over them, ``sums`` the tensors it was added to, ``outputs`` and ``quiet`` the outputs with and
    without it.
    """

    noise_multiplier: float
    asked: list[float]
    normal: list[Tensor]
    sums: list[Tensor]
    outputs: Outputs
    quiet: Outputs
    contribution: float | None = None

    @property
    def noise(self) -> float:
        """Noise asked for over noise planned (for a sensitivity of 1); 0 where none was, where what came is not normal
        of that size, or where it was not used."""
        used = any(not torch.equal(self.outputs[key], self.quiet[key]) for key in self.quiet)
        if len(self.asked) != 1 or not used or self.noise_multiplier == 0:
            return 0.0
        sound = worst(noise_p_values([self.normal]))[1] >= FALSE_ALARM
        return self.asked[0] / self.noise_multiplier if sound else 0.0

    def moved_by(self, sums: Sequence[Tensor], quiet: Outputs) -> float:
        """How far one record more moves the mechanism, in units of what its noise is scaled to.

        Where noise is added to the sum itself, that is the change of the sum. Where it is drawn apart and added later,
        it is the change of the output against the noise in the output, which must then be isotropic and the output
        linear; six standard errors are taken off for the noise being a sample.
        """
        if not self.asked or self.asked[0] == 0:
            return math.inf
        if any(bool(x.any()) for x in self.sums):
            return _norm([a - b for a, b in zip(sums, self.sums, strict=True)]) * self.noise_multiplier / self.asked[0]
        elements = sum(x.numel() for x in self.sums)
        spread = _norm([self.outputs[key] - self.quiet[key] for key in quiet]) / math.sqrt(elements)
        change = _norm([quiet[key] - self.quiet[key] for key in quiet])
        return math.inf if spread == 0 else change * self.noise_multiplier / spread / (1 + 6 / math.sqrt(2 * elements))


@dataclass
class Held:
    """Outputs of the accounted mechanisms of stage 1, by name."""

    drawn: dict[str, Drawn] = field(default_factory=dict)
    trained: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def stage(self, stage: Stage) -> HeldStage:
        """``stage`` with its accounted mechanisms held."""
        return HeldStage(**{f.name: getattr(stage, f.name) for f in fields(Stage)}, held=self)

    def checks(self) -> list[Check]:
        """``stage 1 noise`` and ``stage 1 contribution``, where stage 1 draws a mechanism in one piece."""
        moved = [d.contribution for d in self.drawn.values() if d.contribution is not None]
        if not moved:
            return []
        names = ", ".join(self.drawn)
        return [
            Check(
                "stage 1 noise",
                min(d.noise for d in self.drawn.values()),
                1.0,
                f"least noise asked for over that planned, of {names}; 0 where none was, where what came is not normal "
                "of that size, or where the output is the same without",
                at_least=True,
            ),
            Check(
                "stage 1 contribution",
                max(moved),
                1 + 1e-9,
                f"how far the canary moves {names}, at most, in units of what their noise is scaled to",
            ),
        ]


@dataclass
class HeldStage(Stage):
    """A stage whose accounted mechanisms give what :class:`Held` has of them."""

    held: Held = field(default_factory=Held)

    def release(self, mechanism: Mechanism, compute: Callable[[Stream], Outputs]) -> Outputs:
        """What ``compute`` released the first time."""
        known = self.held.drawn.get(mechanism.name)
        silent = _Witness(None)
        if known is None:
            witnesses: list[_Witness] = []

            def witnessed(stream: Stream) -> Outputs:
                witnesses.append(_Witness(stream))
                return compute(cast(Stream, witnesses[-1]))

            outputs = super().release(mechanism, witnessed)
            quiet = compute(cast(Stream, silent))
            asked = [std for witness in witnesses for std in witness.asked]
            normal = [z for witness in witnesses for z in witness.normal]
            known = Drawn(mechanism.noise_multiplier, asked, normal, silent.sums, outputs, quiet)
            self.held.drawn[mechanism.name] = known
        elif known.contribution is None:
            quiet = compute(cast(Stream, silent))
            known.contribution = known.moved_by(silent.sums, quiet)
        return known.outputs

    def run_dp_sgd(
        self, mechanism: Mechanism, module: nn.Module, optimizer: Optimizer, record_losses: RecordLosses, **rest: Any
    ) -> None:
        """The weights that training ended with the first time."""
        trained = self.held.trained
        if mechanism.name not in trained:
            super().run_dp_sgd(mechanism, module, optimizer, record_losses, **rest)
            trained[mechanism.name] = {key: value.clone() for key, value in module.state_dict().items()}
        module.load_state_dict(trained[mechanism.name])


class _Witness:
    """Stands between a mechanism and its stream, and notes what noise was asked of and for; without a stream, gives
    none."""

    def __init__(self, stream: Stream | None) -> None:
        self.stream = stream
        self.asked: list[float] = []
        self.sums: list[Tensor] = []
        self.normal: list[Tensor] = []

    def add_noise_(self, tensors: Sequence[Tensor], std: float, indices: Sequence[int] | None = None) -> None:
        self.asked.append(float(std))
        self.sums += [x.clone() for x in tensors]
        if self.stream is not None:
            before = [x.clone() for x in tensors]
            self.stream.add_noise_(tensors, std, indices)
            self.normal += [(x - b) / std for x, b in zip(tensors, before, strict=True)] if std else []


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(x.double().square().sum()) for x in tensors))
