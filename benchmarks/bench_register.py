"""A step of Opacus' engine with its own samplers and with this package's (``register_with_opacus``).

    python benchmarks/bench_register.py [--rounds 21]

Two private copies of each model, one process, one thread, the contestants taking turns; times are of the processor, so
that others' work on the machine shows less. Nothing is measured unless both take the step that one ordinary backward a
record in float64 says. Writes ``results/register.json``.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from bench_noise import race
from environment import environment
from fault_harness import RecordLoss, clipped_sum, distance_gone, make_private, one_step, record_gradients
from torch import Tensor, nn

from dp2vae_fast import register_with_opacus

RECORDS, BOUND = 64, 1.0
TOLERANCE = 1e-3  # norms that are rounded up make a step a little shorter
MODES = ("hooks", "ghost")
STOCK, OURS = "as it is", "registered"


def up(channels: int, out: int) -> list[nn.Module]:
    return [nn.GroupNorm(8, channels), nn.SiLU(), nn.ConvTranspose2d(channels, out, 4, stride=2, padding=1)]


def down(channels: int, out: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, out, 4, stride=2, padding=1), nn.GroupNorm(8, out), nn.SiLU()]


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "DCGAN decoder, 32x32": (
        lambda: nn.Sequential(
            nn.Linear(32, 128 * 16), nn.Unflatten(1, (128, 4, 4)), *up(128, 64), *up(64, 32), *up(32, 3)
        ),
        (32,),
    ),
    "DCGAN encoder, 32x32": (
        lambda: nn.Sequential(*down(3, 32), *down(32, 64), *down(64, 128), nn.Flatten(), nn.Linear(128 * 16, 32)),
        (3, 32, 32),
    ),
    "MLP decoder, 28x28": (
        lambda: nn.Sequential(nn.Linear(32, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 784)),
        (32,),
    ),
}


def build(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return make().to(dtype)


def contestant(
    make: Callable[[], nn.Module], mode: str, records: Tensor, registered: bool
) -> tuple[Callable[[], None], Tensor]:
    """Takes one step at a time, each from the same place; and how far the first one moved the parameters."""
    model = build(make)
    run = make_private(f"opacus {mode}", model, records, bound=BOUND)

    def step() -> None:
        with register_with_opacus() if registered else nullcontext():
            one_step(run, records)

    first = distance_gone(model, step)
    model.load_state_dict(build(make).state_dict())
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    return step, first


def contestants(make: Callable[[], nn.Module], mode: str, records: Tensor, want: Tensor) -> dict[str, Callable]:
    """Both, once they have taken the right step.

    Raises:
        RuntimeError: one has not.
    """
    steps = {}
    for name in (STOCK, OURS):
        steps[name], moved = contestant(make, mode, records, name == OURS)
        if not (off := float((moved - want).norm() / want.norm())) <= TOLERANCE:
            raise RuntimeError(f"{mode}, {name}: the step is off by {off:.2g} of its length; nothing is measured")
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--record", type=Path, default=Path(__file__).parent / "results" / "register.json")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # Opacus' on noise that is not cryptographic, which here is none
    torch.set_num_threads(1)
    loss, rows = RecordLoss(), []
    for name, (make, shape) in MODELS.items():
        records = torch.randn(RECORDS, *shape, generator=torch.Generator().manual_seed(0))
        oracle = build(make, torch.float64)
        want = clipped_sum(record_gradients(oracle, records.double(), lambda model, record: loss(model(record))), BOUND)
        for mode in MODES:
            steps = contestants(make, mode, records, want)
            times = race(steps, arguments.rounds, time.process_time)
            parameters = sum(p.numel() for p in oracle.parameters())
            what = {"model": name, "parameters": parameters, "mode": mode}
            rows.append({**what, "steps": times})
            medians = {step: round(q["p50_ms"], 1) for step, q in times.items()}
            print(f"{name}, {mode}: {medians}, {medians[STOCK] / medians[OURS]:.2f}x", flush=True)
    record = {"environment": environment(), "records": RECORDS, "rounds": arguments.rounds, "rows": rows}
    arguments.record.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
