"""Presets: shapes, errors, and that no record sees another one."""

import pytest
import torch

from dp2vae_fast.vae.models import (
    PRESETS,
    VAE,
    ModelError,
    ModelSpec,
    build_decoder,
    build_encoder,
)

SHAPES = {"mlp": (1, 8, 8), "conv28": (1, 28, 28), "conv64": (3, 64, 64), "resnet64": (3, 64, 64)}
SMALL_WIDTH = {"mlp": 16, "conv28": 8, "conv64": 16, "resnet64": 16}


def spec(preset, *, classes=3, shape=None, likelihood="bernoulli", width=None):
    return ModelSpec(
        preset,
        shape or SHAPES[preset],
        4,
        num_classes=classes,
        width=width or SMALL_WIDTH[preset],
        likelihood=likelihood,
    )


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("classes", [0, 3])
def test_presets_give_images_and_posteriors_of_the_right_shape(preset, classes):
    s = spec(preset, classes=classes)
    vae = VAE(build_encoder(s), build_decoder(s))
    images = torch.rand(2, *SHAPES[preset])
    labels = torch.tensor([0, 2]) if classes else None
    output, mean, log_variance = vae(images, labels, torch.randn(2, 4))
    assert output.shape == images.shape and mean.shape == log_variance.shape == (2, 4)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_standard_width_builds_and_other_sizes_that_fit_do_too(preset):
    default = build_decoder(ModelSpec(preset, SHAPES[preset], 4))
    assert default.sample(1).shape == (1, *SHAPES[preset])
    channels, height, width = SHAPES[preset]
    other = (channels, height * 2, width) if preset != "mlp" else (3, 5, 7)
    s = spec(preset, shape=other)
    assert build_decoder(s).sample(3).shape == (3, *other)
    assert build_encoder(s)(torch.rand(2, *other), torch.tensor([1, 1]))[0].shape == (2, 4)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_record_gets_the_same_output_in_any_company(preset):
    s = spec(preset)
    decoder, encoder = build_decoder(s).double(), build_encoder(s).double()
    z, labels = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    images = torch.rand(5, *SHAPES[preset], dtype=torch.float64)
    torch.testing.assert_close(decoder(z, labels)[3:4], decoder(z[3:4], labels[3:4]), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        encoder(images, labels)[0][3:4], encoder(images[3:4], labels[3:4])[0], rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_samples_are_pixels_and_follow_labels_and_generator(likelihood):
    decoder = build_decoder(spec("mlp", likelihood=likelihood))
    decoder.label_weights.copy_(torch.tensor([0.0, 1.0, 0.0]))
    draw = [decoder.sample(7, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*draw) and 0 <= draw[0].min() and draw[0].max() <= 1
    assert decoder.draw_labels(9).tolist() == [1] * 9
    first, second = (decoder.sample(2, torch.full((2,), k), generator=torch.Generator().manual_seed(3)) for k in (0, 1))
    assert not torch.equal(first, second)
    assert decoder.sample(0).shape == (0, 1, 8, 8)
    assert decoder.sample(2, torch.tensor([1, 0], dtype=torch.uint8)).shape == (2, 1, 8, 8)


def test_large_draws_are_made_in_parts_with_the_same_result():
    decoder = build_decoder(ModelSpec("conv64", (3, 64, 64), 4, width=16))
    whole = decoder.sample(20, generator=torch.Generator().manual_seed(0))
    z = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(whole, decoder.mean(z), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: build_decoder(ModelSpec("mpl", (1, 8, 8), 4)), 'preset "mpl"'),
        (lambda: build_decoder(ModelSpec("conv28", (1, 30, 28), 4)), "multiples of 4"),
        (lambda: build_encoder(ModelSpec("conv64", (3, 72, 72), 4)), "multiples of 16"),
        (lambda: build_decoder(ModelSpec("resnet64", (3, 60, 64), 4)), "64x60"),
        (lambda: build_decoder(ModelSpec("conv64", (3, 64, 64), 4, width=20)), "width = 20"),
        (lambda: build_decoder(spec("mlp"))(torch.zeros(1, 4)), "give it labels"),
        (lambda: build_decoder(spec("mlp")).sample(2, torch.tensor([0, 3])), "no class 3: labels are 0 to 2"),
        (lambda: build_decoder(spec("mlp")).sample(2, torch.tensor([0])), "one label for each of the 2"),
        (lambda: build_decoder(spec("mlp")).sample(2, torch.tensor([0.0, 1.0])), "labels are torch.float32"),
        (lambda: build_decoder(spec("mlp")).sample(-1), "n = -1"),
        (lambda: build_decoder(spec("mlp", classes=0)).sample(1, torch.tensor([0])), "not conditional"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(make, names):
    with pytest.raises(ModelError) as caught:
        make()
    assert names in str(caught.value) and "\n" not in str(caught.value)
