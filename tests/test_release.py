"""What is released can be used alone; the latent cache is trusted only when it is whole."""

import json
import os
import subprocess
import sys

import pytest
import small
import torch
from PIL import Image
from safetensors import safe_open

from dp2vae_fast import Trainer, load_decoder
from dp2vae_fast.runs.checkpoint import RunError
from dp2vae_fast.vae.data import to_unit
from dp2vae_fast.vae.latents import LatentCache
from dp2vae_fast.vae.models import ModelSpec, build_decoder, build_encoder
from dp2vae_fast.vae.release import sample_grid, save_decoder
from dp2vae_fast.vae.report import headline


@pytest.fixture(scope="module")
def run():
    return Trainer(small.digits(), config=small.config(noise_multiplier=1.0, test_fraction=0.2)).fit()


def test_a_saved_decoder_loads_with_the_same_samples(run, tmp_path):
    run.save(tmp_path / "run")
    loaded = load_decoder(tmp_path / "run")
    draws = [d.sample(5, generator=torch.Generator().manual_seed(1)) for d in (run.decoder, loaded)]
    assert torch.equal(*draws)
    with pytest.raises(RunError, match="already holds a run"):
        run.save(tmp_path / "run")


@pytest.mark.filterwarnings("ignore:encoder = private:UserWarning")
@pytest.mark.parametrize("encoder", ["linear", "private"])
def test_every_file_that_is_released_says_what_is_guaranteed(encoder, tmp_path):
    """Weights and pictures are passed on without their report."""
    run = Trainer(small.digits(), config=small.config(encoder=encoder)).fit()
    run.save(tmp_path / "run")
    said = headline(run.report)
    assert ("No finite ε" in said) == (encoder == "private")
    with safe_open(tmp_path / "run" / "decoder.safetensors", "pt") as weights:
        assert weights.metadata() == {"privacy": said}
    with Image.open(tmp_path / "run" / "samples.png") as picture:
        assert picture.info["privacy"] == said
    with Image.open(tmp_path / "run" / "curator" / "real.png") as picture:
        assert "curator only" in picture.info["privacy"]


def test_no_other_user_reads_what_is_the_curators(run, tmp_path):
    run.save(tmp_path / "saved")
    Trainer(small.digits(), config=small.config(), out=tmp_path / "trained").fit()
    for name in ("saved", "trained"):
        assert (tmp_path / name / "curator").stat().st_mode & 0o077 == 0
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o777 & ~umask()


def umask():
    now = os.umask(0)
    os.umask(now)
    return now


def test_a_released_decoder_needs_neither_training_code_nor_data(run, tmp_path):
    run.save(tmp_path / "run")
    (tmp_path / "released").mkdir()
    for name in ("decoder.json", "decoder.safetensors"):
        (tmp_path / "run" / name).rename(tmp_path / "released" / name)
    script = (
        "import sys; from dp2vae_fast import load_decoder\n"
        f"images = load_decoder({str(tmp_path / 'released')!r}).sample(6)\n"
        "assert images.shape == (6, 1, 8, 8)\n"
        "assert 'sklearn' not in sys.modules and 'dp2vae_fast.trainer' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, timeout=120)


def test_a_damaged_or_missing_decoder_is_refused_in_one_line(tmp_path):
    save_decoder(build_decoder(ModelSpec("mlp", (1, 8, 8), 3, width=8)), tmp_path)
    weights, settings = (tmp_path / "decoder.safetensors").read_bytes(), (tmp_path / "decoder.json").read_text()
    for name, content in (
        ("decoder.safetensors", weights[: len(weights) // 2]),
        ("decoder.json", "{"),
        ("decoder.json", json.dumps({"preset": "mlp"})),
        ("decoder.json", settings.replace('"latent_dim": 3', '"latent_dim": 4')),
    ):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(RunError, match="cannot be read") as caught:
            load_decoder(tmp_path)
        assert "\n" not in str(caught.value)
        (tmp_path / "decoder.safetensors").write_bytes(weights)
        (tmp_path / "decoder.json").write_text(settings)
    with pytest.raises(RunError, match="holds no decoder"):
        load_decoder(tmp_path / "nowhere")


def test_the_grid_has_a_row_a_class_or_is_a_square():
    labelled = sample_grid(build_decoder(ModelSpec("mlp", (1, 8, 8), 3, num_classes=4, width=8)))
    square = sample_grid(build_decoder(ModelSpec("mlp", (3, 8, 8), 3, width=8)))
    assert labelled.shape[0] / labelled.shape[1] == pytest.approx(0.4, rel=0.02) and labelled.shape[2] == 1
    assert square.shape[0] == square.shape[1] and square.shape[2] == 3


# The latent cache ------------------------------------------------------------------------------------------------


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return build_encoder(ModelSpec("mlp", (1, 8, 8), 3, num_classes=10, width=8))


def test_the_cache_holds_what_the_encoder_says_in_memory_and_on_disk(encoder, tmp_path):
    data, cpu = small.digits(), torch.device("cpu")
    indices = torch.tensor([7, 0, 199])
    images, labels = data.rows(indices)
    expected = encoder(to_unit(images), labels)
    for cache in (LatentCache.build(encoder, data, cpu), LatentCache.open(tmp_path / "z", encoder, data, cpu)):
        for found, wanted in zip(cache.posterior(indices), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_cache_that_fits_is_reused_and_any_other_is_built_anew(encoder, tmp_path):
    data, cpu, path = small.digits(), torch.device("cpu"), tmp_path / "z"
    calls = []
    encoder.register_forward_hook(lambda *_: calls.append(1))

    def builds(records=data):
        calls.clear()
        values = LatentCache.open(path, encoder, records, cpu).values.clone()
        return bool(calls), values

    assert builds()[0]
    again, values = builds()
    assert not again
    whole = path.read_bytes()
    for damaged in (whole[:-4], whole[:40] + b"\0" + whole[41:], b""):
        path.write_bytes(damaged)
        anew, rebuilt = builds()
        assert anew and torch.equal(rebuilt, values)
    (tmp_path / "z.json").unlink()
    assert builds()[0]
    assert builds(small.digits(150))[0]
    with torch.no_grad():
        encoder.head.bias += 1
    anew, moved = builds()
    assert anew and not torch.equal(moved, values)
