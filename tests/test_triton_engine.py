"""The engine on the Triton backend: layers bounded in the arithmetic really done; a whole step as the reference's."""

from __future__ import annotations

import pytest
import torch
from cases import LAYER_CASES, LayerCase, record_loss
from test_bound import BOUND, captured, flat_factors, realised, zero_sum
from test_triton import DEVICE
from torch import nn

from dp2vae_fast import PrivacyEngine, ops

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.skipif(DEVICE != "cpu", reason="the layers of tests/cases.py are on the CPU"),
]
NAMES = ["linear", "linear sequence", "conv2d strided", "convT2d decoder", "conv2d per axis", "conv2d 1x1"]
NAMES += ["group norm", "layer norm", "rms norm one position", "embedding padded"]
CASES = [case for case in LAYER_CASES if case.name in NAMES]


@pytest.mark.parametrize("method", ["gram", "kept"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_each_layer_under_cancellation(case: LayerCase, method: str):
    torch.manual_seed(1)
    model, plain = case.make(), case.inputs(6, torch.float32)
    with ops.backend("triton,reference"):
        for inputs in [plain] if case.entries else [plain, plain + 1e3]:
            gradients = captured(model, inputs, zero_sum, method)
            assert bool((realised(gradients, flat_factors(gradients, BOUND)) <= BOUND).all())


def step(backend: str) -> list[torch.Tensor]:
    """Parameters after one private step, noise included."""
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Linear(5, 32),
        nn.Unflatten(1, (8, 2, 2)),
        nn.ConvTranspose2d(8, 4, 4, 2, 1),
        nn.GroupNorm(2, 4),
        nn.Conv2d(4, 3, 3),
    )
    with ops.backend(backend):
        private, optimizer = PrivacyEngine().privatize(
            model,
            torch.optim.Adam(model.parameters(), lr=0.1, eps=0.1),
            noise_multiplier=0.5,
            max_grad_norm=BOUND,
            sample_rate=0.1,
            expected_batch_size=4,
            noise_generator=torch.Generator().manual_seed(3),
            loss_reduction="sum",
        )
        record_loss(private(torch.randn(4, 5, generator=torch.Generator().manual_seed(4)))).sum().backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def test_a_whole_step_is_the_references():
    for one, other in zip(step("triton,reference"), step("reference"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)  # far below a step of lr = 0.1
