"""Stage 1: no encoder with a guarantee may know a record but through an accounted mechanism."""

import shutil

import numpy as np
import pytest
import small
import torch

from dp2vae_fast.config import ENCODERS, ConfigError, load_config
from dp2vae_fast.runs.checkpoint import RunError, load_checkpoint, save_checkpoint
from dp2vae_fast.trainer import Trainer, train_decoder
from dp2vae_fast.vae.budget import SHARES, plan_budget
from dp2vae_fast.vae.data import load_images, make_image_data
from dp2vae_fast.vae.encoder import MODES, pretrain
from dp2vae_fast.vae.stage import Stage

PUBLIC = "public"


def saved_as(file, data):
    np.savez(file, images=data.images.numpy(), labels=data.labels.numpy(), num_classes=10)
    return file


def other_digits(first):
    """A hundred of the digits that small.digits() are no part of, from the given number on."""
    return load_images("digits").subset(torch.arange(first, first + 100))


@pytest.fixture
def public_file(tmp_path):
    """Public images of the records' shape: other digits than those that are trained on."""
    return saved_as(tmp_path / "public.npz", load_images("digits").subset(torch.arange(400, 600)))


def with_canary():
    base = small.digits()
    canary = (torch.arange(64).reshape(1, 1, 8, 8) % 2 * 255).to(torch.uint8)
    return make_image_data(
        torch.cat((base.images, canary)), torch.cat((base.labels, torch.tensor([3]))), name="canary", num_classes=10
    )


class Replay:
    """Holds the outputs of accounted mechanisms fixed: the first run records them, the second is given them."""

    def __init__(self, monkeypatch):
        self.outputs, self.states = {}, {}
        release, run_dp_sgd = Stage.release, Stage.run_dp_sgd

        def held(stage, mechanism, compute):
            if mechanism.name not in self.outputs:
                self.outputs[mechanism.name] = release(stage, mechanism, compute)
            return self.outputs[mechanism.name]

        def trained(stage, mechanism, module, optimizer, losses, **rest):
            key = (mechanism.name, len(stage.train)) if mechanism.name == "DP-SGD" else mechanism.name
            if key not in self.states:
                run_dp_sgd(stage, mechanism, module, optimizer, losses, **rest)
                if mechanism.name != "DP-SGD":
                    self.states[key] = {k: v.clone() for k, v in module.state_dict().items()}
            else:
                module.load_state_dict(self.states[key])

        monkeypatch.setattr(Stage, "release", held)
        monkeypatch.setattr(Stage, "run_dp_sgd", trained)


@pytest.mark.parametrize("mode", MODES)
def test_a_canary_reaches_the_clipped_sum_only_through_accounted_mechanisms(mode, monkeypatch, public_file):
    Replay(monkeypatch)
    extra = {"public_encoder": str(public_file)} if mode == PUBLIC else {}
    settings = small.config(encoder=mode, optimizer="sgd", learning_rate=1.0, steps=1, noise_multiplier=0, **extra)
    decoders = []
    for train in (small.digits(), with_canary()):
        pretrained = pretrain(small.stage(train, settings))
        # The same batch, without the canary; without noise one step of SGD is the clipped sum itself.
        decoder = train_decoder(small.stage(small.digits(), settings), pretrained)
        decoders.append(torch.cat([p.detach().flatten() for p in decoder.parameters()]))
    assert torch.equal(*decoders) == MODES[mode].end_to_end


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_spends_what_it_plans_and_reports_it(mode, public_file):
    extra = {"public_encoder": str(public_file)} if mode == PUBLIC else {}
    with pytest.warns(UserWarning, match="end-to-end") if mode == "private" else _nothing():
        settings = small.config(encoder=mode, test_fraction=0, target_epsilon=10, **extra)
        run = Trainer(small.digits(), config=settings).fit()
    report = run.report
    budget = plan_budget(run.config, 200)
    assert [m["name"] for m in report["mechanisms"]] == [m.name for m in (*budget.stage1.values(), budget.step)]
    assert [m["steps"] for m in report["mechanisms"]] == [m.steps for m in (*budget.stage1.values(), budget.step)]
    assert report["statement"] == MODES[mode].statement and report["end_to_end"] == MODES[mode].end_to_end
    if mode == "private":
        assert report["epsilon"] is None and report["epsilon_given_encoder"] == pytest.approx(10, rel=0.02)
    else:
        assert 9.8 < report["epsilon"] <= 10
    assert run.decoder.sample(3).shape == (3, 1, 8, 8)


def _nothing():
    import contextlib

    return contextlib.nullcontext()


def test_the_default_mode_has_an_end_to_end_guarantee():
    assert MODES[load_config().privacy.encoder].end_to_end


def test_a_mode_is_known_wherever_it_must_be():
    assert set(MODES) == set(ENCODERS) == set(SHARES)


def test_a_private_decoder_starts_from_scratch_and_public_weights_of_labels():
    pretrained = pretrain(small.stage(small.digits(), small.config(encoder="private")))
    again = pretrain(small.stage(with_canary(), small.config(encoder="private")))
    assert all(
        torch.equal(a, b) for a, b in zip(pretrained.decoder.parameters(), again.decoder.parameters(), strict=True)
    )
    assert torch.equal(pretrained.decoder.label_weights, torch.full((10,), 0.1))


def test_a_public_encoder_comes_from_another_runs_checkpoint_too(tmp_path, public_file):
    with pytest.warns(UserWarning, match="end-to-end"):
        other = Trainer(
            str(public_file), recipe="digits", out=tmp_path / "a", **small.SETTINGS, encoder="private"
        ).fit()
    checkpoint = tmp_path / "a" / "curator" / "stage1.pt"
    settings = small.config(encoder="public", public_encoder=str(checkpoint))
    encoder = pretrain(small.stage(small.digits(), settings)).encoder
    saved = load_checkpoint(checkpoint)
    assert saved is not None
    assert all(torch.equal(value, saved["encoder"][name]) for name, value in encoder.state_dict().items())
    with pytest.raises(RunError, match="training records themselves"):
        pretrain(small.stage(other.train_data, settings))
    with pytest.raises(RunError, match="same model settings"):
        pretrain(small.stage(small.digits(), small.config(encoder="public", public_encoder=str(checkpoint), width=32)))
    for bad in (tmp_path / "missing.pt", tmp_path / "a" / "curator" / "class-means.pt"):
        with pytest.raises(RunError, match=r"no stage1\.pt"):
            pretrain(small.stage(small.digits(), small.config(encoder="public", public_encoder=str(bad))))


def test_the_data_set_that_the_training_records_are_a_part_of_is_not_public():
    settings = load_config(
        recipe="digits", overrides=small.SETTINGS | {"encoder": "public", "public_encoder": "digits"}
    )
    with pytest.raises(RunError, match="training records themselves"):
        Trainer(config=settings).fit()


def fitted_on(out, data, **settings):
    """The stage1.pt of a run on ``data``."""
    quick = {"steps": 1, "pretrain_steps": 2, "warm_start_steps": 1, "test_fraction": 0}
    Trainer(data, config=small.config(**quick, **settings), out=out).fit()
    return out / "curator" / "stage1.pt"


def use(file, data):
    return pretrain(small.stage(data, small.config(encoder="public", public_encoder=str(file))))


@pytest.mark.filterwarnings("ignore:encoder = private:UserWarning")
@pytest.mark.parametrize("first", ["data set", "private", "dp", "without lineage"])
def test_records_do_not_become_public_on_the_way_through_other_runs(first, tmp_path):
    """An encoder passed on twice is still derived from all records that any of the runs was given."""
    secret, one, two = small.digits(), other_digits(300), other_digits(400)
    if first == "data set":
        source = saved_as(tmp_path / "secret.npz", secret)
    else:
        source = fitted_on(tmp_path / "first", secret, encoder="dp" if first == "dp" else "private")
    for name, data in (("one", one), ("two", two)):
        source = fitted_on(tmp_path / name, data, encoder="public", public_encoder=str(source))
    if first == "without lineage":
        saved = load_checkpoint(source)
        assert saved is not None
        saved["records"] = saved.pop("lineage")
        save_checkpoint(source, saved)
        for data in (secret, other_digits(600)):
            with pytest.raises(RunError, match="does not say which records"):
                use(source, data)
        return
    for data in (secret, one, two, secret.subset(torch.arange(40, 60))):
        with pytest.raises(RunError, match="derived from them, which are not public"):
            use(source, data)
    use(source, other_digits(600))


@pytest.mark.parametrize("inside", [".", "curator", "curator/public.npz"])
def test_pictures_in_the_folder_of_a_run_are_no_public_data_set(inside, tmp_path, public_file):
    fitted_on(tmp_path / "run", other_digits(300))
    shutil.copy(public_file, tmp_path / "run" / "curator")
    with pytest.raises(RunError, match=r"holds a run: name its curator/stage1\.pt"):
        use(tmp_path / "run" / inside, small.digits())


def test_pre_training_goes_on_with_no_other_public_data(tmp_path):
    """Else the lineage would name the second data set alone."""
    file, settings = tmp_path / "public.npz", {"encoder": "public", "test_fraction": 0, "checkpoint_every": 1}
    config = small.config(public_encoder=str(file), pretrain_steps=20, **settings)

    def crash(progress):
        if (progress.stage, progress.step) == ("pre-training", 11):
            raise KeyboardInterrupt

    saved_as(file, other_digits(300))
    with pytest.raises(KeyboardInterrupt):
        Trainer(small.digits(), config=config, out=tmp_path / "run", observer=crash).fit()
    saved_as(file, other_digits(400))
    with pytest.raises(RunError, match=r"public\.npz does not hold the images that pre-training began with"):
        Trainer(small.digits(), config=config, out=tmp_path / "run", resume=True).fit()
    saved_as(file, other_digits(300))
    Trainer(small.digits(), config=config, out=tmp_path / "run", resume=True).fit()


def test_a_public_data_set_must_fit_and_must_not_be_the_private_one(tmp_path):
    mine = small.digits()
    saved_as(tmp_path / "same.npz", mine)
    np.savez(tmp_path / "large.npz", images=np.zeros((5, 16, 16), np.uint8), labels=np.arange(5) % 2, num_classes=10)
    np.savez(tmp_path / "classes.npz", images=np.zeros((12, 8, 8), np.uint8), labels=np.arange(12))
    for name, message in (
        ("same", "training records themselves"),
        ("large", r"images \[1, 16, 16\] and 10 classes"),
        ("classes", r"images \[1, 8, 8\] and 12 classes"),
    ):
        settings = small.config(encoder="public", public_encoder=str(tmp_path / f"{name}.npz"))
        with pytest.raises(RunError, match=message):
            pretrain(small.stage(mine, settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shares": {"means": 0.5}}, "name just those"),
        ({"shares": {"means": 0.5, "encoder": 0.2}}, "covariance"),
        ({"encoder": "private", "shares": {"means": 0.1}}, "spends on none"),
        ({"target_epsilon": 1e-4, "steps": 100000}, "cannot be reached"),
    ],
)
def test_impossible_budgets_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        plan_budget(small.config(**settings), 200)


@pytest.mark.parametrize("mode", SHARES)
def test_a_noise_multiplier_fixes_the_whole_budget(mode):
    extra = {"public_encoder": "x.pt"} if mode == PUBLIC else {}
    budget = plan_budget(small.config(encoder=mode, noise_multiplier=2.0, **extra), 200)
    assert budget.step.noise_multiplier == 2.0 and all(m.noise_multiplier > 0 for m in budget.stage1.values())
    quiet = plan_budget(small.config(encoder=mode, noise_multiplier=0, **extra), 200)
    assert [m.noise_multiplier for m in (*quiet.stage1.values(), quiet.step)] == [0.0] * (1 + len(SHARES[mode]))
