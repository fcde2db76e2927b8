"""Both engines of the trainer are the same mechanism: with noise 0 they give the same parameters, to rounding."""

import pytest
import torch
from torch import nn

from dp2vae_fast.engine.keystream import Keystream
from dp2vae_fast.engine.precision import sum_rounding
from dp2vae_fast.runs.ledger import Ledger
from dp2vae_fast.vae.loop import RecordLosses, StepMechanism, dp_sgd, make_optimizer
from dp2vae_fast.vae.losses import negative_elbo, negative_iwae, reconstruction
from dp2vae_fast.vae.models import VAE, ModelSpec, build_decoder, build_encoder

PRESETS = {
    "mlp": ((1, 8, 8), 16),
    "conv28": ((1, 28, 28), 16),
    "conv64": ((3, 32, 32), 16),
    "resnet64": ((3, 16, 16), 16),
}
RECORDS, STEPS, LATENT, CLASSES = 24, 20, 3, 3
# Opacus divides by norm + 1e-6, this package by the norm: losses are scaled so that norms are far above that.
SCALE = 1e6
MAX_GRAD_NORM = {"mlp": 2.7, "conv28": 11, "conv64": 36, "resnet64": 23}  # about the median: half are clipped


def train(engine, preset, scope, optimizer, dtype, *, noise=0.0, seed=7, physical=8, rows=1):
    """Parameters before and after 20 steps on fixed data, and the largest change, as flat vectors."""
    shape, width = PRESETS[preset]
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(RECORDS, *shape, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(CLASSES, (RECORDS,), generator=generator)
    latents = torch.randn(RECORDS, rows, LATENT, generator=generator, dtype=torch.float64).to(dtype)
    spec = ModelSpec(preset, shape, LATENT, CLASSES, width)
    torch.manual_seed(2)
    encoder, decoder = build_encoder(spec), build_decoder(spec)
    module = (decoder if scope == "decoder" else VAE(encoder, decoder)).to(dtype)

    def losses(model: nn.Module, indices):
        target, classes = images[indices].repeat_interleave(rows, 0), labels[indices].repeat_interleave(rows, 0)
        if scope == "decoder":
            missed = reconstruction(model(latents[indices].flatten(0, 1), classes), target, "bernoulli")
            if rows == 1:
                return SCALE * missed
            zeros = torch.zeros(len(indices), LATENT, dtype=dtype)
            return SCALE * negative_iwae(missed.reshape(-1, rows), latents[indices], zeros, zeros)
        return SCALE * negative_elbo(*_elbo_terms(model, target, classes, latents[indices, 0]), likelihood="bernoulli")

    before = flat(module)
    dp = StepMechanism("DP-SGD", noise, SCALE * MAX_GRAD_NORM[preset], 10, RECORDS, STEPS, rows)
    dp_sgd(
        module,
        make_optimizer(optimizer, module, 1e-3 / SCALE if optimizer == "sgd" else 1e-3, momentum=0.9),
        RecordLosses(lambda indices: (indices,), losses),
        dp,
        keystream=Keystream.seeded(seed),
        ledger=Ledger(),
        engine=engine,
        physical_batch_size=physical,
    )
    return before, flat(module)


def _elbo_terms(model, images, classes, eps):
    output, mean, log_variance = model(images, classes, eps)
    return output, images, mean, log_variance


def flat(module):
    return torch.cat([p.detach().double().flatten() for p in module.parameters()])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("scope", ["decoder", "whole"])
@pytest.mark.parametrize("preset", PRESETS)
def test_fused_is_opacus_in_double_precision(preset, scope, optimizer):
    before, fused = train("fused", preset, scope, optimizer, torch.float64)
    _, opacus = train("opacus", preset, scope, optimizer, torch.float64)
    moved = (opacus - before).norm()
    assert moved > 1e-3
    assert (fused - opacus).norm() <= 1e-9 * moved


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("scope", ["decoder", "whole"])
@pytest.mark.parametrize("preset", PRESETS)
def test_fused_is_opacus_in_single_precision(preset, scope, optimizer):
    """The weights, up to 80 times as long as their move, are rounded 20 times: to 80 sqrt(20) 2^-24 of the move."""
    before, fused = train("fused", preset, scope, optimizer, torch.float32)
    _, opacus = train("opacus", preset, scope, optimizer, torch.float32)
    moved = (opacus - before).norm()
    assert opacus.norm() <= 90 * moved and (fused - opacus).norm() <= 2.2e-5 * moved


def test_both_engines_draw_the_same_noise():
    before, fused = train("fused", "mlp", "decoder", "sgd", torch.float64, noise=1.3)
    _, opacus = train("opacus", "mlp", "decoder", "sgd", torch.float64, noise=1.3)
    _, other = train("fused", "mlp", "decoder", "sgd", torch.float64, noise=1.3, seed=8)
    moved = (opacus - before).norm()
    rounding = sum_rounding(10, torch.float64)  # by which the noise of "fused" is larger
    assert (fused - opacus).norm() <= 2 * rounding * moved and (fused - other).norm() > 0.1 * moved


@pytest.mark.parametrize("engine", ["fused", "opacus"])
def test_the_physical_batch_size_changes_nothing_but_rounding(engine):
    before, small = train(engine, "mlp", "decoder", "sgd", torch.float64, physical=3)
    _, large = train(engine, "mlp", "decoder", "sgd", torch.float64, physical=64)
    assert (small - large).norm() <= 1e-12 * (large - before).norm()


def test_several_samples_a_record_are_one_unit():
    """IWAE with K rows a record, against the same loss with one record a batch and per-record clipping by hand."""
    before, rows = train("fused", "mlp", "decoder", "sgd", torch.float64, rows=4)
    _, split = train("fused", "mlp", "decoder", "sgd", torch.float64, rows=4, physical=1)
    assert (rows - split).norm() <= 1e-12 * (rows - before).norm()
    with pytest.raises(NotImplementedError, match="fused"):
        train("opacus", "mlp", "decoder", "sgd", torch.float64, rows=4)
