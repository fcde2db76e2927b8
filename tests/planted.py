"""Variants for tests of the benchmark: a right one, and some with a fault that its gate must find."""

from __future__ import annotations

import os
import time
from functools import partial

from variants import Run, Variant, adam, per_sample
from workloads import Problem


def _clips_to_more(problem: Problem, bound: float) -> Run:
    return per_sample(problem, 1.1 * bound)


def _drops_a_bias(problem: Problem, bound: float) -> Run:
    """Its smallest parameter gets no gradient, as a layer without a rule might."""
    run = per_sample(problem, bound)
    smallest = min(problem.model.parameters(), key=lambda p: p.numel())

    def step() -> None:
        moments = run.optimizer.state[smallest]
        run.step()
        moments["exp_avg"].zero_()

    return Run(step, run.set_noise, run.optimizer, run.model)


def _does_not_clip(problem: Problem, bound: float) -> Run:
    return per_sample(problem, 1e6 * bound)


def _refuses(problem: Problem, bound: float) -> Run:
    raise NotImplementedError("no rule for this\nand a second line")


def _ends(problem: Problem, bound: float, hang: bool) -> Run:
    def step() -> None:
        time.sleep(3600) if hang else os._exit(3)

    return Run(step, lambda _: None, adam(problem.model), problem.model)


def _adds_no_noise(problem: Problem, bound: float) -> Run:
    run = per_sample(problem, bound)
    return Run(run.step, lambda _: None, run.optimizer, run.model)


RIGHT = Variant("right", per_sample)
CLIPS_TO_MORE = Variant("clips to 1.1 C", _clips_to_more)
DROPS_A_BIAS = Variant("drops a bias", _drops_a_bias)
DOES_NOT_CLIP = Variant("does not clip", _does_not_clip)
ADDS_NO_NOISE = Variant("adds no noise", _adds_no_noise)
REFUSES = Variant("refuses", _refuses)
DIES = Variant("dies", partial(_ends, hang=False))
HANGS = Variant("hangs", partial(_ends, hang=True))
