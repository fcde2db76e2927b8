"""Noise + optimizer in one pass, against `normal_` into a buffer followed by the optimizer, on the CPU.

    python benchmarks/bench_noise.py [--threads 1 2] [--rounds 25]

The contestants take turns within each round, so that a busy machine slows them alike. Nothing is reported unless
the fused op first agrees with its reference. Buffers of the contestants are allocated once, outside the clock.
"""

from __future__ import annotations

import argparse
import platform
import statistics
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from dp2vae_fast.ops import noise

KEY = torch.arange(8, dtype=torch.int32)
STEP = torch.tensor(1)
STD, SCALE, LR = 1.3, 1 / 256, 1e-3
SHAPES = {
    "mlp decoder, 0.4 M in 6 tensors": [(512, 42), (512,), (600, 512), (600,), (64, 600), (64,)],
    "conv decoder, 3.0 M in 8 tensors": [
        (8192, 74),
        (8192,),
        (512, 256, 4, 4),
        (256,),
        (256, 64, 4, 4),
        (64,),
        (64, 3, 4, 4),
        (3,),
    ],
    "one tensor, 16 M": [(4096, 4096)],
}
OPTIMIZERS = {
    "SGD": lambda params, fused: torch.optim.SGD(params, lr=LR, fused=fused),
    "SGD, momentum": lambda params, fused: torch.optim.SGD(params, lr=LR, momentum=0.9, fused=fused),
    "Adam": lambda params, fused: torch.optim.Adam(params, lr=LR, fused=fused),
}


def separate(optimizer: str, shapes: list[tuple[int, ...]], fused: bool) -> Callable[[], None]:
    """`normal_`, sum and scale into .grad, then torch.optim."""
    params, sums, buffers = (_tensors(shapes) for _ in range(3))
    for param in params:
        param.requires_grad_(True).grad = torch.empty_like(param)
    stepper = OPTIMIZERS[optimizer](params, fused)

    def step() -> None:
        for param, total, buffer in zip(params, sums, buffers, strict=True):
            buffer.normal_(0, STD)
            torch.add(total, buffer, out=param.grad).mul_(SCALE)
        stepper.step()

    return step


def one_pass(optimizer: str, shapes: list[tuple[int, ...]], backend: str = "cpp") -> Callable[[], list[Tensor]]:
    """The fused op; returns the parameters, for the check."""
    params, sums = _tensors(shapes), _tensors(shapes)
    first, second = ([torch.zeros_like(p) for p in params] for _ in range(2))
    draw = (KEY, STEP, 0, list(range(len(params))), STD, SCALE)

    def step() -> list[Tensor]:
        if optimizer == "Adam":
            settings = (1, LR, 0.9, 0.999, 1e-8, 0.0, False, False)
            noise.noise_adam_(params, sums, first, second, [], *draw, *settings, backend=backend)
        else:
            momentum = 0.0 if optimizer == "SGD" else 0.9
            settings = (LR, momentum, 0.0, 0.0, False, False, False)
            noise.noise_sgd_(params, sums, first if momentum else [], *draw, *settings, backend=backend)
        return params

    return step


def _tensors(shapes: list[tuple[int, ...]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def check() -> None:
    """Refuse to report on a wrong result."""
    shapes = [(1000, 7), (3,)]
    for optimizer in OPTIMIZERS:
        for fast, slow in zip(one_pass(optimizer, shapes)(), one_pass(optimizer, shapes, "reference")(), strict=True):
            torch.testing.assert_close(fast, slow, rtol=1e-6, atol=1e-6)


def quantiles(seconds: list[float]) -> str:
    p20, p50, p80 = (1e3 * statistics.quantiles(seconds, n=10)[i] for i in (1, 4, 7))
    return f"{p50:8.2f} ({p20:.2f} to {p80:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=25)
    arguments = parser.parse_args()
    check()
    from dp2vae_fast import _C  # after the check, which says why where it is missing

    print(f"torch {torch.__version__}, {platform.machine()}, {_C.build_info()}; ms a step, median (p20 to p80)")
    print("| workload | optimizer | threads | one pass | normal_ + torch.optim | normal_ + fused torch.optim |")
    print("|---|---|---|---|---|---|")
    for workload, shapes in SHAPES.items():
        for optimizer in OPTIMIZERS:
            contestants = [
                one_pass(optimizer, shapes),
                separate(optimizer, shapes, fused=False),
                separate(optimizer, shapes, fused=True),
            ]
            for threads in arguments.threads:
                timers = [Timer("step()", globals={"step": c}, num_threads=threads) for c in contestants]
                rounds = [[timer.timeit(1).median for timer in timers] for _ in range(arguments.rounds + 2)][2:]
                cells = " | ".join(quantiles(list(column)) for column in zip(*rounds, strict=True))
                print(f"| {workload} | {optimizer} | {threads} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
