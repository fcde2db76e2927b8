"""The correctness gate: nothing is timed unless what it releases is the clipped sum, as float64 says it is.

The oracle takes every record's gradient by ``vmap(grad)`` in float64, a few records at a time; the clipping bound is
the median of their norms, so that half of the records are clipped. A variant's own sum is judged parameter by
parameter, so that a bias that is left out does not hide behind the weights:

    |found - truth|  <=  2 |framework - truth|  +  floor * reach

``framework`` is what PyTorch's own float32 backward makes of the same weighted losses; ``reach`` is the sum of the
norms that the records contribute to this parameter, which no cancellation makes small. The floor of 2e-4 is for norms
of millions of numbers in float32, which are off by 1e-5 to 6e-5, and for Opacus' 1e-6 in the clip factor. A variant
that says that it rounds norms up, so that no record exceeds the bound, may make every record shorter by 1e-3: an
error of at most 1e-3 of the reach. A sum of non-private gradients is judged the same, with factors of one. Under
bfloat16 autocast the framework's error is that of its own backward under autocast, and the floor is 5e-3: the norm of a
gradient whose terms were rounded to eight bits. It is 5e-3 with TF32 too, which our norms count as an error.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from workloads import Problem

FLOOR, ROUNDED_UP, HALF = 2e-4, 1e-3, 5e-3
CHUNK = 8


@dataclass(frozen=True)
class Sum:
    """A sum of weighted gradients by parameter: the truth, the framework's error and what the records contribute."""

    truth: dict[str, Tensor]
    own: dict[str, float]
    reach: dict[str, float]
    own_half: dict[str, float] = field(default_factory=dict)  # under bfloat16 autocast

    @property
    def own_error(self) -> float:
        """The framework's error in all parameters together, relative to the sum's norm."""
        return _norm(self.own) / _norm({name: float(t.norm()) for name, t in self.truth.items()})


@dataclass(frozen=True)
class Truth:
    """What a step of a problem must release: ``sums[True]`` private, ``sums[False]`` not."""

    bound: float
    sums: dict[bool, Sum]

    def of(self, private: bool, half: bool = False) -> Sum:
        """The sum that a variant is held against, with the framework's error in its arithmetic."""
        wanted = self.sums[private]
        return replace(wanted, own=wanted.own_half) if half else wanted

    def save(self, path: Path) -> None:
        torch.save({"bound": self.bound, "sums": {k: vars(s) for k, s in self.sums.items()}}, path)

    @staticmethod
    def load(path: Path) -> Truth:
        content = torch.load(path)
        return Truth(content["bound"], {k: Sum(**s) for k, s in content["sums"].items()})


@dataclass(frozen=True)
class Verdict:
    """``error`` is relative in norm over all parameters; ``excess`` is of the worst parameter, in units of what is
    allowed there: above 1 the variant is wrong."""

    error: float
    excess: float
    worst: str

    @property
    def wrong(self) -> bool:
        return not self.excess <= 1.0  # NaN is wrong too


def oracle(problem: Problem) -> Truth:
    """Per-record norms in float64, the bound, and both sums."""
    model = copy.deepcopy(problem.model).double()
    inputs, targets = (
        [t.double() if t.is_floating_point() else t for t in ts] for ts in (problem.inputs, problem.targets)
    )
    norms = _record_norms(problem, model, inputs, targets)
    lengths = torch.stack(list(norms.values())).square().sum(0).sqrt()
    bound = float(lengths.median())
    sums = {}
    for private, factors in ((True, (bound / lengths).clamp(max=1)), (False, torch.ones_like(lengths))):
        truth = _weighted(problem, model, inputs, targets, factors)
        single = _weighted(problem, problem.model, problem.inputs, problem.targets, factors.float())
        with torch.autocast(factors.device.type, torch.bfloat16):
            half = _weighted(problem, problem.model, problem.inputs, problem.targets, factors.float())
        own, own_half = (
            {name: float((found[name] - truth[name]).norm()) for name in truth} for found in (single, half)
        )
        reach = {name: float((factors * n).sum()) for name, n in norms.items()}
        sums[private] = Sum(truth, own, reach, own_half)
    return Truth(bound, sums)


def _record_norms(problem: Problem, model: torch.nn.Module, inputs: list[Tensor], targets: list[Tensor]) -> dict:
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: dict[str, Tensor], given: list[Tensor], wanted: list[Tensor]) -> Tensor:
        output = functional_call(model, values, tuple(t.unsqueeze(0) for t in given))
        return problem.loss.of_records(output, *(t.unsqueeze(0) for t in wanted)).sum()

    each = vmap(grad(loss), in_dims=(None, 0, 0))
    parts: dict[str, list[Tensor]] = {name: [] for name in params}
    chunk = CHUNK * (4 if problem.device.type == "cuda" else 1)
    for i in range(0, problem.batch, chunk):
        here = slice(i, i + chunk)
        for name, g in each(params, [t[here] for t in inputs], [t[here] for t in targets]).items():
            parts[name].append(g.flatten(1).norm(dim=1))
    return {name: torch.cat(column) for name, column in parts.items()}


def _weighted(problem: Problem, model: torch.nn.Module, inputs, targets, factors: Tensor) -> dict[str, Tensor]:
    losses = problem.loss.of_records(model(*inputs), *targets)
    names, params = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad((factors * losses).sum(), params)
    return {name: g.double() for name, g in zip(names, gradients, strict=True)}


def judge(found: Mapping[str, Tensor], wanted: Sum, floor: float = FLOOR) -> Verdict:
    """Hold the sum that a variant would release against the truth."""
    errors = {name: float((found[name].double() - truth).norm()) for name, truth in wanted.truth.items()}
    excess = {name: e / (2 * wanted.own[name] + floor * wanted.reach[name]) for name, e in errors.items()}
    worst = max(excess, key=lambda name: (excess[name] != excess[name], excess[name]))
    whole = _norm(errors) / _norm({name: float(t.norm()) for name, t in wanted.truth.items()})
    return Verdict(whole, excess[worst], worst)


def _norm(parts: Mapping[str, float]) -> float:
    return sum(x * x for x in parts.values()) ** 0.5
