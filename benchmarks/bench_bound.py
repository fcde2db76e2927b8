"""What the error bound of the norms costs: how far it shortens real gradients, and how far noise grows with it.

    python benchmarks/bench_bound.py

Gradients of every preset's decoder on digits and on crops of two photographs, at initialisation and after some
training, in float32 and under bfloat16 autocast. The clip factor of every record is held against C / norm, with the
norm of the very same operands in float64; C is half the smallest norm, so every record is clipped. Once with the norms
that the planner chooses, once with Gram norms wherever a layer may have one, which it would choose for lack of memory.
Nothing is written where a record contributes more than C. Writes ``results/bound.json``.
"""

from __future__ import annotations

import argparse
import json
from copy import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from environment import environment
from sklearn.datasets import load_digits, load_sample_image
from torch import Tensor

from dp2vae_fast import ops
from dp2vae_fast.engine.capture.capture import Capture
from dp2vae_fast.engine.clipping import FlatClipping
from dp2vae_fast.engine.gradients.gradient import Gradient, Kept
from dp2vae_fast.engine.gradients.plan import Plan
from dp2vae_fast.engine.precision import records_at_most, sum_rounding
from dp2vae_fast.vae.losses import reconstruction
from dp2vae_fast.vae.models import Decoder, ModelSpec, build_decoder

RECORDS, LATENTS, STEPS = 64, 8, 40
MODELS = {"mlp": (8, 256), "conv28": (28, 64), "conv64": (64, 256), "resnet64": (64, 32)}  # preset: (side, width)
GRAM = {"conv28": 32, "conv64": 8}  # preset: records whose norms are taken by Gram matrices
DATA = {"digits": 10, "photographs": 2}  # number of classes
PRECISIONS = {"float32": torch.float32, "bf16 autocast": torch.bfloat16}
BATCHES = (64, 256, 1024, 4096, 16384)


def load(data: str, side: int) -> tuple[Tensor, Tensor]:
    """``RECORDS`` images ``[N, C, side, side]`` in [0, 1] and their labels."""
    if data == "digits":
        found = load_digits()
        images = torch.tensor(found.images[:RECORDS] / 16, dtype=torch.float32).unsqueeze(1)
        return F.interpolate(images, side, mode="bilinear"), torch.tensor(found.target[:RECORDS])
    generator, crops = torch.Generator().manual_seed(0), []
    for name in ("china.jpg", "flower.jpg"):
        picture = torch.tensor(load_sample_image(name)).permute(2, 0, 1).float() / 255
        for _ in range(RECORDS // 2):
            top, left = (int(torch.randint(size - 128, (1,), generator=generator)) for size in picture.shape[1:])
            crops.append(picture[:, top : top + 128, left : left + 128])
    return F.interpolate(torch.stack(crops), side, mode="area"), torch.arange(RECORDS) // (RECORDS // 2)


def latents(images: Tensor) -> Tensor:
    """Whitened principal components, in place of an encoder."""
    flat = images.flatten(1)
    components, _, _ = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    return components[:, :LATENTS] * RECORDS**0.5


def train(decoder: Decoder, z: Tensor, labels: Tensor, images: Tensor) -> None:
    optimizer = torch.optim.Adam(decoder.parameters(), lr=3e-3)
    for step in range(STEPS):
        rows = torch.arange(16) + 16 * step % RECORDS
        optimizer.zero_grad()
        reconstruction(decoder(z[rows], labels[rows]), images[rows], "bernoulli").mean().backward()
        optimizer.step()
    optimizer.zero_grad()


def watched(gradient: Gradient, again: set[int]) -> Gradient:
    """``gradient``, noting which of its records are taken again in float64."""
    copied = copy(gradient)

    def in_float64(records: Tensor) -> Gradient:
        again.update(records.tolist())
        return gradient.in_float64(records)

    vars(copied)["in_float64"] = in_float64
    return copied


def scaled(gradient: Any, factors: Tensor) -> Gradient:
    """With the factor multiplied into one operand, in float32 as the engine does."""
    field = "values" if isinstance(gradient, Kept) else "backprops"
    operand = ops.widen(getattr(gradient, field))
    return replace(gradient, **{field: operand * factors.reshape(-1, *[1] * (operand.dim() - 1))})


def exact_norms(gradients: list[Gradient]) -> Tensor:
    """In float64, of gradients that are formed, so by another way than the engine's."""
    every = torch.arange(gradients[0].records)
    return sum(
        (g.in_float64(every).grad_sample().flatten(1).square().sum(1) for g in gradients), torch.zeros(())
    ).sqrt()


@dataclass(frozen=True)
class Row:
    """``short_*``: by what part of itself a factor is below C / norm."""

    preset: str
    data: str
    steps: int
    precision: str
    norms: str
    short_median: float
    short_max: float
    again: float
    largest: float


def measure(
    decoder: Decoder, z: Tensor, labels: Tensor, images: Tensor, dtype: torch.dtype, plan: Plan
) -> dict[str, float]:
    capture = Capture(decoder, plan=plan)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        output = decoder(z, labels)
    reconstruction(output.float(), images, "bernoulli").sum().backward()
    gradients = [g for g in capture.take(list(decoder.parameters())) if g is not None]
    capture.remove()
    exact, again = exact_norms(gradients), set[int]()
    bound = float(exact.min()) / 2
    factors = FlatClipping().factors({i: watched(g, again) for i, g in enumerate(gradients)}, bound)[0]
    short = 1 - factors.double() * exact / bound
    return {
        "short_median": float(short.median()),
        "short_max": float(short.max()),
        "again": len(again) / len(images),
        "largest": float(exact_norms([scaled(g, factors) for g in gradients]).max()) / bound,
    }


def rows() -> list[Row]:
    found = []
    for preset, (side, width) in MODELS.items():
        for data, classes in DATA.items():
            images, labels = load(data, side)
            z = latents(images)
            torch.manual_seed(0)
            spec = ModelSpec(preset, tuple(images.shape[1:]), LATENTS, classes, width)  # type: ignore[arg-type]
            decoder = build_decoder(spec)
            for steps in (0, STEPS):
                if steps:
                    train(decoder, z, labels, images)
                for precision, dtype in PRECISIONS.items():
                    for norms, plan, few in (
                        ("planned", Plan(), RECORDS),
                        (
                            "Gram",
                            Plan(forced=dict.fromkeys(dict(decoder.named_parameters()), "gram")),
                            GRAM.get(preset, 0),
                        ),
                    ):
                        if few == 0:
                            continue
                        batch = z[:few], labels[:few], images[:few]
                        row = Row(preset, data, steps, precision, norms, **measure(decoder, *batch, dtype, plan))
                        print(row, flush=True)
                        if not row.largest <= 1.0:
                            raise SystemExit(f"a record contributes {row.largest} C: not recorded")
                        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, default=Path(__file__).parent / "results" / "bound.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    record = {
        "environment": environment(),
        "records": RECORDS,
        "widths": {preset: width for preset, (_, width) in MODELS.items()},
        "rows": [asdict(row) for row in rows()],
        "sums": [{"expected": b, "at_most": records_at_most(b), "rounding": sum_rounding(b)} for b in BATCHES],
    }
    arguments.record.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
