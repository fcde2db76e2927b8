"""The code of the documentation does what it says."""

import re
from pathlib import Path

import torch
from torch.nn import functional as F

ROOT = Path(__file__).parents[1]


def test_a_step_by_hand_takes_the_clipped_sum():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "ops.md").read_text(encoding="utf-8"), re.DOTALL)
    before, step = code.split("# Noise and Adam in one pass.")
    found: dict = {}
    exec(before, found)
    parameters = [*found["conv"].parameters(), *found["linear"].parameters()]
    expected = [torch.zeros_like(p) for p in parameters]
    for image, label in zip(found["images"], found["labels"], strict=True):
        logits = found["linear"](found["conv"](image[None]).relu().flatten(1))
        gradients = torch.autograd.grad(F.cross_entropy(logits, label[None]), parameters)
        norm = torch.stack([g.norm() for g in gradients]).norm()
        for total, gradient in zip(expected, gradients, strict=True):
            total += gradient * (found["clip"] / norm).clamp(max=1.0)
    for total, other in zip(found["sums"], expected, strict=True):
        assert (total - other).norm() <= 1e-4 * other.norm()
    start = [p.detach().clone() for p in parameters]
    exec("# " + step, found)
    assert all((p != s).all() for p, s in zip(found["params"], start, strict=True))
