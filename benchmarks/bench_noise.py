"""Noise + optimizer in one pass, against `normal_` followed by torch.optim, on the CPU.

    python benchmarks/bench_noise.py [--threads 1 2] [--rounds 25] [--patience 60]

The contestants take turns within each round, in a different order every time. A row during which other processes
used more than a tenth of a core is measured again, for as long as ``--patience`` allows, and the record says how much
it was: two threads on two cores of which one is taken measure the scheduler.

Nothing is timed unless one pass first ends where torch.optim does on the same noise. Buffers are allocated once,
outside the clock. The rival is written as fast as PyTorch allows: noise is drawn into ``.grad`` itself, already scaled,
and the sums are added to it in one call. It also runs without noise, which shows what noise costs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from environment import environment
from timing import used_elsewhere
from torch import Tensor

from dp2vae_fast.ops import noise

KEY = torch.arange(8, dtype=torch.int32)
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
    "SGD": lambda params, **how: torch.optim.SGD(params, lr=LR, **how),
    "SGD, momentum": lambda params, **how: torch.optim.SGD(params, lr=LR, momentum=0.9, **how),
    "Adam": lambda params, **how: torch.optim.Adam(params, lr=LR, **how),
}
Step = Callable[[], None]


def separate(
    optimizer: str, params: list[Tensor], sums: list[Tensor], draw: Callable[[Tensor, int], object] | None, **how: bool
) -> Step:
    """``grad = SCALE * sum + SCALE * STD * z`` with z from `draw`, then torch.optim."""
    grads = [torch.zeros_like(param) for param in params]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    stepper = OPTIMIZERS[optimizer](params, **how)

    def step() -> None:
        if draw is None:
            torch._foreach_copy_(grads, sums)
        else:
            for index, grad in enumerate(grads):
                draw(grad, index)
            torch._foreach_add_(grads, sums, alpha=SCALE)
        stepper.step()

    return step


def one_pass(optimizer: str, params: list[Tensor], sums: list[Tensor], backend: str = "cpp") -> Step:
    first, second = ([torch.zeros_like(param) for param in params] for _ in range(2))
    indices, taken = list(range(len(params))), 0

    def step() -> None:
        nonlocal taken
        draw = (KEY, torch.tensor(taken), 0, indices, STD, SCALE)
        taken += 1
        if optimizer == "Adam":
            settings = (taken, LR, 0.9, 0.999, 1e-8, 0.0, False, False)
            noise.noise_adam_(params, sums, first, second, [], *draw, *settings, backend=backend)
        else:
            momentum = 0.0 if optimizer == "SGD" else 0.9
            settings = (LR, momentum, 0.0, 0.0, False, False, taken == 1)
            noise.noise_sgd_(params, sums, first if momentum else [], *draw, *settings, backend=backend)

    return step


def _tensors(shapes: list[tuple[int, ...]], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def same_noise() -> Callable[[Tensor, int], None]:
    """A `draw` for `separate`: the noise of `one_pass`, from the reference."""
    taken: Counter[int] = Counter()

    def draw(grad: Tensor, index: int) -> None:
        z = noise.normals(KEY, torch.tensor(taken[index]), 0, index, grad.numel())
        grad.copy_(z.reshape(grad.shape)).mul_(STD * SCALE)
        taken[index] += 1

    return draw


def check(contestant: Callable[[str, list[Tensor], list[Tensor]], Step] = one_pass) -> None:
    """Refuse to report on a wrong result: three steps from zero must end where torch.optim does on the same noise.

    Raises:
        RuntimeError: they do not, up to 1e-5 of the distance gone.
    """
    shapes = [(1000, 7), (3,), (257,)]
    for optimizer in OPTIMIZERS:
        params, expected, sums = [torch.zeros(s) for s in shapes], [torch.zeros(s) for s in shapes], _tensors(shapes)
        fast, slow = contestant(optimizer, params, sums), separate(optimizer, expected, sums, same_noise())
        for _ in range(3):
            fast()
            slow()
        for found, other in zip(params, expected, strict=True):
            if not (found - other).abs().max() <= 1e-5 * other.abs().max():
                raise RuntimeError(f"{optimizer}: one pass and torch.optim disagree; nothing is measured")


def contestants(optimizer: str, shapes: list[tuple[int, ...]], isas: list[str]) -> dict[str, Step]:
    from dp2vae_fast import _C

    def on(isa: str, step: Step) -> Step:
        def selected() -> None:
            _C.select_isa(isa)
            step()

        return selected

    def torch_optim(draw: Callable[[Tensor, int], object] | None, **how: bool) -> Step:
        return separate(optimizer, _tensors(shapes), _tensors(shapes), draw, **how)

    def normal(grad: Tensor, index: int) -> None:
        grad.normal_(0, STD * SCALE)

    return {
        **{f"one pass, {isa}": on(isa, one_pass(optimizer, _tensors(shapes), _tensors(shapes))) for isa in isas},
        "normal_ + torch.optim": torch_optim(normal),
        "normal_ + fused torch.optim": torch_optim(normal, fused=True),
        "fused torch.optim, no noise": torch_optim(None, fused=True),
    }


def quantiles(seconds: list[float]) -> dict[str, float]:
    tenths = statistics.quantiles(seconds, n=10)
    return {"p20_ms": 1e3 * tenths[1], "p50_ms": 1e3 * tenths[4], "p80_ms": 1e3 * tenths[7]}


def race(
    steps: dict[str, Step], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, dict[str, float]]:
    """Quantiles of each contestant's time, the first two rounds left out."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for turn in range(rounds + 2):
        order = order[1:] + order[:1]
        for name in order:
            start = clock()
            steps[name]()
            if turn >= 2:
                seconds[name].append(clock() - start)
    return {name: quantiles(column) for name, column in seconds.items()}


def quiet_race(steps: dict[str, Step], rounds: int, patience: float) -> tuple[dict[str, dict[str, float]], float]:
    """`race`, repeated until the machine was quiet or patience (seconds) ran out; with the cores used elsewhere."""
    give_up = time.monotonic() + patience
    while True:
        before, start = used_elsewhere(), time.monotonic()
        row = race(steps, rounds)
        cores = (used_elsewhere() - before) / (time.monotonic() - start)
        if cores < 0.1 or time.monotonic() > give_up:
            return row, round(max(cores, 0.0), 2)
        time.sleep(1)


def gain(row: dict[str, dict[str, float]]) -> float:
    """Of one pass with the best instruction set over the faster of the two rivals that draw noise."""
    rivals = [row[name]["p50_ms"] for name in row if name.startswith("normal_")]
    return min(rivals) / next(iter(row.values()))["p50_ms"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--patience", type=float, default=60.0)
    parser.add_argument("--record", type=Path, default=Path(__file__).parent / "results" / "noise_cpu.json")
    arguments = parser.parse_args()
    check()
    from dp2vae_fast import _C  # after the check, which says why where it is missing

    isas = _C.build_info()["isas"].split()
    for isa in reversed(isas):  # the best stays selected
        _C.select_isa(isa)
        check()
    made = {**environment(), "native": _C.build_info()}
    print(f"{made}\nms a step, median (p20 to p80)\n", flush=True)
    rows = []
    for workload, shapes in SHAPES.items():
        for optimizer in OPTIMIZERS:
            steps = contestants(optimizer, shapes, isas)
            if not rows:
                print(f"| workload | optimizer | threads | {' | '.join(steps)} | gain |")
                print("|---" * (len(steps) + 4) + "|")
            for threads in arguments.threads:
                torch.set_num_threads(threads)
                row, elsewhere = quiet_race(steps, arguments.rounds, arguments.patience)
                what = {"workload": workload, "optimizer": optimizer, "threads": threads}
                rows.append({**what, "cores_used_elsewhere": elsewhere, "steps": row})
                cells = [f"{q['p50_ms']:.2f} ({q['p20_ms']:.2f} to {q['p80_ms']:.2f})" for q in row.values()]
                print(
                    f"| {workload} | {optimizer} | {threads} | {' | '.join(cells)} | {gain(row):.2f}x |"
                    + (" BUSY" if elsewhere >= 0.1 else ""),
                    flush=True,
                )
    record = {"environment": made, "rounds": arguments.rounds, "rows": rows}
    arguments.record.parent.mkdir(parents=True, exist_ok=True)
    arguments.record.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
