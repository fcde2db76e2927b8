"""Other packages' steps, set up as their own documentation does, on batches of our own."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opacus.grad_sample.utils import prepare_module
from opacus.optimizers import get_optimizer_class
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import nn
from torch.optim import Optimizer
from workloads import Problem, RecordLoss

Parts = tuple[Callable[[], object], Callable[[float], None]]
FASTDP = "DP2VAE_BENCH_FASTDP"  # set by --fastdp for the processes of a race


def opacus(problem: Problem, inner: Optimizer, bound: float, mode: str) -> Parts:
    """Opacus' module, optimizer and, for "ghost", criterion: what its ``make_private`` returns but for the loader."""
    ghost = mode == "ghost"
    own = {"max_grad_norm": bound} if ghost else {}
    module: nn.Module = prepare_module(problem.model, mode, loss_reduction="sum", batch_first=True, **own)  # type: ignore[assignment]
    optimizer_class: Any = get_optimizer_class("flat", False, mode)
    optimizer = optimizer_class(
        inner,
        noise_multiplier=0.0,
        max_grad_norm=bound,
        expected_batch_size=problem.batch,
        loss_reduction="sum",
    )
    loss: Any = RecordLoss(problem.loss.of_records)
    if ghost:
        loss = DPLossFastGradientClipping(module, optimizer, loss, "sum")  # type: ignore[arg-type]

    def step() -> None:
        optimizer.zero_grad()
        loss(module(*problem.inputs), *problem.targets).backward()
        optimizer.step()

    def set_noise(multiplier: float) -> None:
        optimizer.noise_multiplier = multiplier

    return step, set_noise


def fastdp(problem: Problem, inner: Optimizer, bound: float, origin: bool = False) -> Parts:
    """FastDP's MixOpt mode with Abadi's clipping; ``origin`` is its trick of asking autograd for one bias only."""
    engine_class = _import_fastdp().PrivacyEngine
    names = [name for name, _ in problem.model.named_parameters()]
    engine = engine_class(
        problem.model,
        batch_size=problem.batch,
        sample_size=100 * problem.batch,
        max_grad_norm=bound,
        epochs=1,
        noise_multiplier=1.0,
        clipping_mode="MixOpt",
        clipping_fn="Abadi",
        loss_reduction="sum",
        origin_params=[next(name for name in names if name.endswith("bias"))] if origin else None,
    )
    engine.attach(inner)
    loss = RecordLoss(problem.loss.of_records)

    def step() -> None:
        loss(problem.model(*problem.inputs), *problem.targets).backward()
        inner.step()
        inner.zero_grad()

    def set_noise(multiplier: float) -> None:
        for p in problem.model.parameters():
            p.noise = multiplier * bound  # type: ignore[attr-defined]

    set_noise(0.0)
    return step, set_noise


class _Anything(types.ModuleType):
    """A module in which every name is a class of its own."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, type(name, (nn.Module,), {}))
        return getattr(self, name)


def _import_fastdp() -> Any:
    """FastDP from the checkout that ``--fastdp`` names. It imports transformers for classes that no model here has:
    where that is not installed, empty classes stand in."""
    path = os.environ.get(FASTDP)
    if not path or not Path(path, "fastDP").is_dir():
        raise RuntimeError("no checkout of FastDP: give --fastdp PATH (github.com/awslabs/fast-differential-privacy)")
    sys.path.append(path)
    try:
        importlib.import_module("transformers")
    except ModuleNotFoundError:
        for name in (
            "",
            ".utils",
            ".modeling_outputs",
            ".pytorch_utils",
            ".models",
            ".models.t5",
            ".models.t5.modeling_t5",
        ):
            full = f"transformers{name}"
            sys.modules[full] = _Anything(full)
            above, _, last = full.rpartition(".")
            if above:
                setattr(sys.modules[above], last, sys.modules[full])
        sys.modules["transformers.utils"].logging = types.SimpleNamespace(get_logger=logging.getLogger)  # type: ignore[attr-defined]
    return importlib.import_module("fastDP")
