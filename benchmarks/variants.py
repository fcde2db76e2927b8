"""The contestants: each builds, for a problem, one object that takes full training steps.

A private step is forward, backward, clip, noise and Adam; a non-private one leaves clip and noise out. All of them are
given the same ``torch.optim.Adam(fused=True)``, its state already allocated, and a loss that is a sum. So Adam's first
moment after the first step is a tenth of the gradient that was released, which is how the gate reads it
(:func:`released`): from the very object that is timed afterwards, whatever it does inside.

A variant that does not take a problem raises; the harness records the first line of what it says.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import gate
import memory
import peers
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.optim import Adam
from workloads import Problem

from dp2vae_fast import PrivacyEngine, ops
from dp2vae_fast.engine.captured import CapturedBatches

# So small that weights stay where they are, and all variants step on the same numbers. Noise would carry weights away
# to where numbers are denormal: there gelu_backward took 2.6 times as long.
LR, BETA1 = 1e-9, 0.9
CAPTURED_BY = 12  # steps, of batches of 8 or more: the engine first looks at some


@dataclass(frozen=True)
class Run:
    """A step, and how to set the noise multiplier of those to come; ``optimizer`` is the inner Adam. A graph takes its
    memory when it is captured: ``in_graph_mib`` is what that step took above set-up."""

    step: Callable[[], object]
    set_noise: Callable[[float], None]
    optimizer: Adam
    model: nn.Module
    in_graph_mib: float | None = None


@dataclass(frozen=True)
class Variant:
    """``build(problem, bound)`` sets a run up, with noise off.

    Args:
        rounds_up: it clips by an upper bound of each norm (:mod:`gate`).
        half: it runs under bfloat16 autocast.
    """

    title: str
    build: Callable[[Problem, float], Run]
    private: bool = True
    rounds_up: bool = False
    half: bool = False

    @property
    def floor(self) -> float:
        """Of the gate."""
        return gate.HALF if self.half else gate.ROUNDED_UP if self.rounds_up else gate.FLOOR


def adam(model: nn.Module, *, counted_on_host: bool = False, **how: bool) -> Adam:
    """Adam whose state exists before the first step, so that it counts as set-up in everybody's memory. Its counters
    lie where PyTorch's fused Adam wants them, on the parameters' device, or where our own update puts them."""
    optimizer = Adam(model.parameters(), lr=LR, betas=(BETA1, 0.999), **(how or {"fused": True}))
    group = optimizer.param_groups[0]
    for p in model.parameters():
        moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
        on_device = (group["fused"] or group["capturable"]) and not counted_on_host
        step = torch.zeros((), dtype=torch.float32, device=p.device if on_device else "cpu")
        optimizer.state[p] = {"step": step, **moments}
    return optimizer


def forget_steps(optimizer: Adam) -> None:
    """Adam's state as before its first step, in place."""
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()


def released(run: Run) -> dict[str, Tensor]:
    """The gradient that the first step of ``run`` gave to Adam; zero where it gave none."""
    return {name: run.optimizer.state[p]["exp_avg"] / (1 - BETA1) for name, p in run.model.named_parameters()}


def noise_level(run: Run, before: dict[str, Tensor]) -> float:
    """Root mean square of what the second step's gradient is off the first one's, ``before``: the noise, where there is
    some, as the model has hardly moved."""
    moments = {name: run.optimizer.state[p]["exp_avg"] for name, p in run.model.named_parameters()}
    second = [(moments[name] - BETA1 * (1 - BETA1) * g) / (1 - BETA1) - g for name, g in before.items()]
    return float(torch.cat([g.flatten() for g in second]).square().mean().sqrt())


def channels_last(problem: Problem) -> Problem:
    """Weights and images with channels innermost."""

    def inner(x: Tensor) -> Tensor:
        return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x

    model = problem.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Problem(
        problem.name, model, tuple(map(inner, problem.inputs)), tuple(map(inner, problem.targets)), problem.loss
    )


def in_half(losses: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    """The same under bfloat16 autocast, with losses in float32."""

    def under_autocast(*given: Any) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return losses(*given).float()

    return under_autocast


def non_private(
    problem: Problem,
    bound: float,
    compiled: bool = False,
    channels_innermost: bool = False,
    half: bool = False,
    **how: bool,
) -> Run:
    problem = channels_last(problem) if channels_innermost else problem
    optimizer, losses = adam(problem.model, **how), problem.losses
    losses = in_half(losses, problem.device) if half else losses
    call = torch.compile(losses) if compiled else losses

    def step() -> None:
        optimizer.zero_grad()
        call().sum().backward()
        optimizer.step()

    return Run(step, lambda _: None, optimizer, problem.model)


def non_private_graph(problem: Problem, bound: float, **options: bool) -> Run:
    """The whole step, Adam included, captured as one CUDA graph over this batch."""
    if problem.device.type != "cuda":
        raise NotImplementedError(f"there are no graphs on {problem.device.type}")
    run = non_private(problem, bound, fused=True, capturable=True, **options)
    here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        for _ in range(3):
            run.step()
    here.wait_stream(aside)
    run.optimizer.zero_grad()
    graph = torch.cuda.CUDAGraph()

    def capture() -> None:
        with torch.cuda.graph(graph):
            run.step()

    taken = memory.taken_by(capture, problem.device.type)
    forget_steps(run.optimizer)
    return Run(graph.replay, run.set_noise, run.optimizer, run.model, taken)


def privatized(problem: Problem, bound: float, **options: Any) -> tuple[Adam, Any, Any]:
    """Adam, and model and optimizer made private with it, without noise."""
    inner = adam(problem.model, counted_on_host=True)
    module, optimizer = PrivacyEngine().privatize(
        problem.model,
        inner,
        noise_multiplier=0.0,
        max_grad_norm=bound,
        sample_rate=0.01,
        expected_batch_size=problem.batch,
        loss_reduction="sum",
        **options,
    )
    return inner, module, optimizer


def ours(
    problem: Problem,
    bound: float,
    channels_innermost: bool = False,
    compiled: bool = False,
    half: bool = False,
    backend: str = "",
    physical_batches: int = 1,
    **options: Any,
) -> Run:
    """``options`` are those of ``PrivacyEngine.privatize``; ``backend`` is what every op must run on; a step takes its
    batch in so many ``physical_batches``."""
    problem = channels_last(problem) if channels_innermost else problem
    inner, module, optimizer = privatized(problem, bound, **options)
    call: Any = torch.compile(module) if compiled else module
    *first, last = problem.parts(physical_batches)

    def step() -> None:
        with ops.backend(backend) if backend else nullcontext():
            for part in first:
                optimizer.signal_skip_step(True)
                take(part)
            optimizer.signal_skip_step(False)
            take(last)

    def take(part: Problem) -> None:
        losses = partial(part.losses, call)
        optimizer.zero_grad()
        (in_half(losses, problem.device) if half else losses)().sum().backward()
        optimizer.step()

    return Run(step, partial(setattr, optimizer, "noise_multiplier"), inner, problem.model)


def ours_captured(problem: Problem, bound: float, channels_innermost: bool = False, half: bool = False) -> Run:
    """Forward, backward and clipping as a CUDA graph (``CapturedBatches``), which is captured before the gate looks:
    what it judges and what is timed are replays."""
    problem = channels_last(problem) if channels_innermost else problem
    inner, module, optimizer = privatized(problem, bound)
    count = len(problem.inputs)

    def losses(*batch: Tensor) -> Tensor:
        return problem.loss.of_records(module(*batch[:count]), *batch[count:])

    batches = CapturedBatches(optimizer, in_half(losses, problem.device) if half else losses)

    def step() -> None:
        batches(*problem.inputs, *problem.targets)
        optimizer.step()
        optimizer.zero_grad()

    taken: float | None = None
    for _ in range(CAPTURED_BY):
        if not batches.captured:
            taken = memory.taken_by(step, problem.device.type)
    if not batches.captured:
        raise NotImplementedError(f"not captured: {batches.reason}")
    forget_steps(inner)
    return Run(step, partial(setattr, optimizer, "noise_multiplier"), inner, problem.model, taken)


def per_sample(problem: Problem, bound: float) -> Run:
    """DP-SGD in a dozen lines of plain PyTorch: ``vmap(grad)``, then one weighted sum a parameter."""
    optimizer, noise = adam(problem.model), [0.0]
    params = dict(problem.model.named_parameters())

    def loss(values: dict[str, Tensor], given: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> Tensor:
        output = functional_call(problem.model, values, tuple(t.unsqueeze(0) for t in given))
        return problem.loss.of_records(output, *(t.unsqueeze(0) for t in wanted)).sum()

    each = vmap(grad(loss), in_dims=(None, 0, 0))

    def step() -> None:
        found = each({name: p.detach() for name, p in params.items()}, problem.inputs, problem.targets)
        lengths = torch.stack([g.flatten(1).norm(dim=1) for g in found.values()]).norm(dim=0)
        factors = (bound / (lengths + 1e-6)).clamp(max=1)
        for name, p in params.items():
            p.grad = torch.tensordot(factors, found[name], 1) + noise[0] * bound * torch.randn_like(p)
        del found
        optimizer.step()
        optimizer.zero_grad()

    return Run(step, partial(noise.__setitem__, 0), optimizer, problem.model)


def peer(problem: Problem, bound: float, make: Callable[..., tuple[Callable, Callable]], **options: Any) -> Run:
    optimizer = adam(problem.model)
    return Run(*make(problem, optimizer, bound, **options), optimizer, problem.model)


def _opacus(mode: str) -> Callable[[Problem, float], Run]:
    return partial(peer, make=peers.opacus, mode=mode)


VARIANTS = {
    "non-private": Variant("non-private", non_private, private=False),
    "non-private-plain-adam": Variant(
        "non-private, Adam(foreach=False, fused=False)",
        partial(non_private, foreach=False, fused=False),
        private=False,
    ),
    "non-private-channels-last": Variant(
        "non-private, channels last", partial(non_private, channels_innermost=True), private=False
    ),
    "non-private-compiled": Variant("non-private, compiled", partial(non_private, compiled=True), private=False),
    "non-private-graph": Variant("non-private, CUDA graph", non_private_graph, private=False),
    "non-private-bf16": Variant("non-private, bf16", partial(non_private, half=True), private=False, half=True),
    "non-private-bf16-channels-last": Variant(
        "non-private, bf16, channels last",
        partial(non_private, half=True, channels_innermost=True),
        private=False,
        half=True,
    ),
    "ours": Variant("ours", ours, rounds_up=True),
    "ours-channels-last": Variant("ours, channels last", partial(ours, channels_innermost=True), rounds_up=True),
    "ours-captured": Variant("ours, CUDA graph", ours_captured, rounds_up=True),
    "ours-bf16": Variant("ours, bf16", partial(ours, half=True), rounds_up=True, half=True),
    "ours-bf16-channels-last": Variant(
        "ours, bf16, channels last", partial(ours, half=True, channels_innermost=True), rounds_up=True, half=True
    ),
    "ours-low-memory": Variant("ours, max_memory_overhead=1", partial(ours, max_memory_overhead=1.0), rounds_up=True),
    "ours-in-halves": Variant("ours, two physical batches", partial(ours, physical_batches=2), rounds_up=True),
    "ours-any-memory": Variant(
        "ours, max_memory_overhead=inf", partial(ours, max_memory_overhead=math.inf), rounds_up=True
    ),
    "ours-compiled": Variant("ours, compiled", partial(ours, compiled=True), rounds_up=True),
    "ours-float32-sums": Variant("ours, float32 sums", partial(ours, sum_dtype=torch.float32), rounds_up=True),
    "ours-reference": Variant("ours, without kernels", partial(ours, backend="reference"), rounds_up=True),
    "opacus-hooks": Variant("Opacus hooks", _opacus("hooks")),
    "opacus-functorch": Variant("Opacus functorch", _opacus("functorch")),
    "opacus-ew": Variant("Opacus ew", _opacus("ew")),
    "opacus-ghost": Variant("Opacus ghost", _opacus("ghost")),
    "fastdp-mixopt": Variant("FastDP MixOpt", partial(peer, make=peers.fastdp)),
    "fastdp-mixopt-origin": Variant("FastDP MixOpt, origin", partial(peer, make=peers.fastdp, origin=True)),
    "vmap": Variant("vmap(grad)", per_sample),
}


# On a GPU; what runs nowhere else is no row of a CPU's table.
ON_GPU = ["non-private", "non-private-graph", "non-private-compiled", "non-private-channels-last"]
ON_GPU += ["non-private-bf16", "non-private-bf16-channels-last"]
ON_GPU += ["ours", "ours-captured", "ours-channels-last", "ours-bf16", "ours-bf16-channels-last", "ours-reference"]
ON_GPU += ["opacus-hooks", "opacus-functorch", "opacus-ghost", "fastdp-mixopt", "vmap"]
ON_CPU = [name for name in VARIANTS if name not in ("non-private-graph", "ours-captured") and "bf16" not in name]


def titles(names: list[str]) -> dict[str, str]:
    """How tables name them."""
    return {name: VARIANTS[name].title for name in names}


def in_order(names: list[str]) -> list[str]:
    """The same in the order of tables: the non-private step, which ratios are to, first and always there."""
    return [name for name in VARIANTS if name in names or name == "non-private"]
