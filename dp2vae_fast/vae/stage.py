"""What both stages run on: the records, the plan, the ledger, the keys, and training loops that survive a stop."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..config import Config
from ..engine.accounting import Mechanism, epsilon
from ..engine.gradients.plan import Plan
from ..engine.keystream import Stream
from ..runs.checkpoint import RunError
from ..runs.folder import RunFolder
from ..runs.interrupt import StopRequest
from ..runs.keys import RunKeys
from .budget import Budget
from .data import ImageData
from .loop import RecordLosses, StepInfo, StepMechanism, dp_sgd, make_optimizer
from .models import Decoder, ModelSpec


@dataclass(frozen=True)
class Progress:
    """What an observer of a run hears: where it is and what it has spent so far.

    ``steps`` 0 announces that ``stage`` begins, which has no steps to count.
    ``loss`` is not noised and only for the curator's eyes; None where there is none. ``epsilon`` is None where none was
    computed, and infinite where it has no bound.
    """

    stage: str
    step: int = 0
    steps: int = 0
    records: int = 0
    epsilon: float | None = None
    loss: Tensor | None = None


class Stateful(Protocol):
    """Anything with a state that a checkpoint can hold."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> object: ...


class GeneratorState:
    """A random generator, as a part of a checkpoint."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        self.generator.set_state(state["state"])


@dataclass
class Stage:
    """The circumstances of one stretch of a run, shared by its stages.

    ``history`` collects one row a finished step of DP-SGD (stage, step, records, loss, epsilon): for the curator only.
    """

    config: Config
    spec: ModelSpec
    train: ImageData
    budget: Budget
    run: RunFolder
    keys: RunKeys
    device: torch.device
    stop: StopRequest
    observer: Callable[[Progress], None]
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def labels(self) -> Tensor | None:
        """Labels of the training records where the model is conditional on them."""
        return self.train.labels if self.spec.num_classes else None

    def spent_epsilon(self) -> float:
        """Epsilon of everything that the ledger counts so far; infinite where the encoder was fitted without noise."""
        privacy = self.config.privacy
        if privacy.encoder == "private":
            return math.inf
        return epsilon(self.run.ledger.spent(), privacy.target_delta, privacy.accountant)

    def require_spent(self, file: str, name: str, steps: int) -> None:
        """Refuse a checkpoint that holds more steps of a mechanism than the ledger counts."""
        if self.run.ledger.steps(name) < steps:
            raise RunError(f"{file} holds steps of {name} that the ledger does not count: train into a new folder")

    def release(self, mechanism: Mechanism, compute: Callable[[Stream], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The output of a mechanism that is drawn in one piece: counted, computed with noise, kept.

        Where the run folder has it already it is not drawn again. Under keys that are used again the same noise is
        drawn again, and nothing is counted twice.
        """
        ledger, file = self.run.ledger, _file(mechanism.name)
        saved = self.run.load(file)
        self.require_spent(file, mechanism.name, 0 if saved is None else 1)
        if saved is None:
            ledger.reserve(mechanism, ledger.steps_before_key(mechanism.name) + 1)
            released = compute(self.keys.keystream(mechanism.name).stream(mechanism.name))
            saved = {"key": self.keys.number, "released": released}
            self.run.save(file, saved)
        return saved["released"]

    def step_mechanism(self, mechanism: Mechanism, rows_per_record: int = 1) -> StepMechanism:
        """A planned ``mechanism`` as DP-SGD on the training records."""
        privacy = self.config.privacy
        return StepMechanism(
            mechanism.name,
            mechanism.noise_multiplier,
            privacy.max_grad_norm,
            privacy.expected_batch_size,
            len(self.train),
            mechanism.steps,
            rows_per_record,
        )

    def decoder_optimizer(self, decoder: Decoder) -> Optimizer:
        """The optimizer of stage 2, as the configuration says."""
        settings = self.config.optimization
        return make_optimizer(
            settings.optimizer, decoder, settings.learning_rate, settings.momentum, settings.weight_decay
        )

    def run_dp_sgd(
        self,
        mechanism: Mechanism,
        module: nn.Module,
        optimizer: Optimizer,
        record_losses: RecordLosses,
        *,
        rows_per_record: int = 1,
        parts: dict[str, Stateful],
        on_step: Callable[[], None] = lambda: None,
    ) -> None:
        """Train ``module`` by DP-SGD for ``mechanism.steps`` steps, going on from the checkpoint where there is one.

        Args:
            parts: everything else whose state the checkpoint must hold.
            on_step: called after every step, before a checkpoint is written.
        """
        performance, ledger = self.config.performance, self.run.ledger
        file = _file(mechanism.name)
        every: dict[str, Stateful] = {"module": module, "optimizer": optimizer, **parts}
        done = self._restore(file, every)
        self.require_spent(file, mechanism.name, done)
        first_step = max(done, ledger.steps_before_key(mechanism.name))
        dp = self.step_mechanism(mechanism, rows_per_record)
        if first_step > done:
            warnings.warn(
                f"{first_step - done} steps of {dp.name} count as spent and are lost with the process that drew them: "
                f"{dp.steps - first_step} of {dp.steps} are left to train",
                stacklevel=2,
            )

        def after(info: StepInfo) -> None:
            on_step()
            stopping = self.stop.requested
            checkpoint = stopping or info.step % performance.checkpoint_every == 0 or info.step == dp.steps
            spent = self.spent_epsilon() if checkpoint else None
            row = {"stage": dp.name, "step": info.step, "records": info.records, "loss": info.loss}
            self.history.append(row | {"epsilon": spent if spent is None or math.isfinite(spent) else None})
            self.observer(Progress(dp.name, info.step, dp.steps, info.records, spent, info.loss))
            if checkpoint:
                for waiting in self.history:  # only now, as it waits for the device
                    waiting["loss"] = float(waiting["loss"])
                self._save(file, every, info.step)
            if stopping:
                ledger.settle(dp.mechanism, info.step)
                self.stop.obey()

        dp_sgd(
            module,
            optimizer,
            record_losses,
            dp,
            keystream=self.keys.keystream(dp.name),
            ledger=ledger,
            engine=performance.engine,
            physical_batch_size=performance.physical_batch_size,
            plan=plan_of(self.config),
            compile=performance.compile,
            first_step=first_step,
            on_step=after,
        )

    def run_ordinary(
        self,
        name: str,
        steps: int,
        optimizer: Optimizer,
        batch_loss: Callable[[], Tensor],
        *,
        parts: dict[str, Stateful],
    ) -> None:
        """``steps`` ordinary optimizer steps on what ``batch_loss()`` returns, with checkpoints called ``name``."""
        every: dict[str, Stateful] = {"optimizer": optimizer, **parts}
        for step in range(self._restore(_file(name), every) + 1, steps + 1):
            optimizer.zero_grad(set_to_none=True)
            loss = batch_loss()
            loss.backward()
            optimizer.step()
            self.observer(Progress(name, step, steps, loss=loss.detach()))
            if self.stop.requested or step % (10 * self.config.performance.checkpoint_every) == 0 or step == steps:
                self._save(_file(name), every, step)
            self.stop.obey()

    def _save(self, file: str, parts: dict[str, Stateful], step: int) -> None:
        state = {name: part.state_dict() for name, part in parts.items()}
        self.run.save(file, {"step": step, "key": self.keys.number, "history": self.history, "parts": state})

    def _restore(self, file: str, parts: dict[str, Stateful]) -> int:
        """Load the checkpoint into ``parts``; the step that it was written after, 0 where there is none.

        Random generators go on only under the keys that they were made with.
        """
        state = self.run.load(file)
        if state is None:
            return 0
        if not parts.keys() <= state["parts"].keys():
            raise RunError(f"{file} was written by another version: go on with that one, or train into a new folder")
        for name, part in parts.items():
            if not isinstance(part, GeneratorState) or state["key"] == self.keys.number:
                part.load_state_dict(state["parts"][name])
        self.history[:] = state["history"]
        return state["step"]


def plan_of(config: Config) -> Plan:
    """An empty plan with the settings of a run."""
    performance = config.performance
    return Plan(max_memory_overhead=performance.max_memory_overhead, measure=performance.measure_plan)


def _file(name: str) -> str:
    return name.replace(" ", "-") + ".pt"
