"""The audit of whole runs: modes with a guarantee pass, `private` and every planted fault fail by name."""

import json

import numpy as np
import pytest
import small
import torch
from test_cli import in_process

from dp2vae_fast import ops
from dp2vae_fast.engine.audit import Check
from dp2vae_fast.engine.keystream import Stream
from dp2vae_fast.engine.sampling import PoissonBatches
from dp2vae_fast.engine.update import FusedUpdate
from dp2vae_fast.runs.checkpoint import RunError
from dp2vae_fast.runs.interrupt import Stopped
from dp2vae_fast.trainer import Trainer
from dp2vae_fast.vae import audit, encoder, loop, moments
from dp2vae_fast.vae.audit import audit_run, verdict, write_audit
from dp2vae_fast.vae.data import load_images, make_image_data
from dp2vae_fast.vae.encoder import MODES, EncoderMode
from dp2vae_fast.vae.latents import LatentCache
from dp2vae_fast.vae.stage import plan_of

ENGINE = ["contribution", "neighbours", "divisor", "noise", "sampler", "one-run epsilon"]


@pytest.fixture
def public_file(tmp_path):
    others = load_images("digits").subset(torch.arange(400, 600))
    np.savez(tmp_path / "public.npz", images=others.images.numpy(), labels=others.labels.numpy(), num_classes=10)
    return str(tmp_path / "public.npz")


def audited(data=None, canaries: int = 60, **settings) -> dict[str, Check]:
    settings = small.config(noise_multiplier=2.0, **settings)
    data = small.digits() if data is None else data
    checks = audit_run(small.stage(data, settings), lambda records: small.stage(records, settings), canaries=canaries)
    return {check.name: check for check in checks}


def failed(checks: dict[str, Check]) -> list[str]:
    return [name for name, check in checks.items() if not check.passed]


def enlarged(data, scale):
    images = data.images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return make_image_data(images, data.labels, name=data.name, num_classes=data.num_classes)


@pytest.mark.parametrize("mode", MODES)
def test_modes_with_a_guarantee_pass_and_private_fails_in_the_encoder_shift(mode, public_file):
    checks = audited(encoder=mode, **({"public_encoder": public_file} if mode == "public" else {}))
    assert list(checks) == [
        "encoder shift",
        *([] if mode == "private" else ["stage 1 noise", "stage 1 contribution"]),
        *ENGINE,
    ]
    assert failed(checks) == ([] if MODES[mode].end_to_end else ["encoder shift"])
    assert checks["contribution"].measured > 0.99


def test_stage_2_is_audited_with_the_optimizer_and_the_plan_of_the_run(monkeypatch):
    made = []

    def noted(*args, **rest):
        made.append(args)
        return privatize(*args, **rest)

    privatize = audit.privatize
    monkeypatch.setattr(audit, "privatize", noted)
    settings = small.config(optimizer="sgd", momentum=0.5, weight_decay=0.1, max_memory_overhead=1.5)
    stage = small.stage(small.digits(), settings)
    audit.stage_2(stage, encoder.pretrain(stage), canaries=1)
    _, optimizer, *_, plan = made[0]
    assert (optimizer.param_groups[0]["momentum"], optimizer.param_groups[0]["weight_decay"]) == (0.5, 0.1)
    assert plan == plan_of(settings)


def test_several_samples_a_record_colour_and_no_labels():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (80, 3, 8, 8), generator=generator, dtype=torch.uint8)
    settings = {"conditional": False, "iwae_samples": 3, "likelihood": "gaussian", "optimizer": "sgd"}
    assert failed(audited(make_image_data(pixels, name="noise"), **settings)) == []


def test_the_reference_engine_is_audited_as_it_is():
    """Opacus' optimizer lets a record through whose gradient is not finite, as the report's arithmetic says."""
    assert failed(audited(engine="opacus")) == ["contribution", "neighbours"]


# Planted faults ----------------------------------------------------------------------------------------------------


def test_an_encoder_that_was_fitted_to_the_records_without_noise(monkeypatch):
    """As in `private`, but under the name and the budget of a mode with a guarantee."""

    def fit(stage):
        honest = MODES["private"].fit(stage)
        return encoder.Pretrained(honest.encoder, encoder._started_at_means(stage))

    monkeypatch.setitem(MODES, "linear", EncoderMode(fit, True, "a false claim"))
    monkeypatch.setattr(encoder, "_new_linear", lambda stage: encoder.build_encoder(stage.spec))
    checks = audited()
    assert failed(checks) == ["encoder shift"] and checks["encoder shift"].measured > 0.001


def test_a_first_decoder_that_knows_the_records(monkeypatch):
    fresh = encoder._warm_started

    def peeking(stage, *rest):
        decoder = fresh(stage, *rest)
        decoder.body[-1].bias.data += 1e-3 * stage.train.images.float().mean()
        return decoder

    monkeypatch.setattr(encoder, "_warm_started", peeking)
    checks = audited()
    assert failed(checks) == ["encoder shift"] and "first decoder shifts" in checks["encoder shift"].explanation


def test_latents_that_are_scaled_by_all_records(monkeypatch):
    """No encoder is fitted without noise, and yet every latent knows every record."""
    build = LatentCache.build

    def standardised(*args):
        cache = build(*args)
        cache.values[:, 0] -= cache.values[:, 0].mean(0)
        return cache

    monkeypatch.setattr(LatentCache, "build", staticmethod(standardised))
    checks = audited()
    assert failed(checks) == ["encoder shift"] and checks["encoder shift"].measured > 1e-4


@pytest.mark.parametrize("factor", [0.0, 0.9])
def test_class_means_with_too_little_noise(factor, monkeypatch):
    means = encoder.class_means
    monkeypatch.setattr(
        encoder,
        "class_means",
        lambda *args, noise_multiplier, **rest: means(*args, noise_multiplier=factor * noise_multiplier, **rest),
    )
    checks = audited()
    assert failed(checks)[0] == "stage 1 noise" and checks["stage 1 noise"].measured == pytest.approx(factor)
    assert set(failed(checks)) <= {"stage 1 noise", "stage 1 contribution"}


def test_noise_that_stage_1_asks_for_and_leaves_out(monkeypatch):
    means = encoder.class_means

    def forgetful(*args, noise_multiplier, stream, **rest):
        stream.add_noise_([torch.zeros(3)], noise_multiplier)
        return means(*args, noise_multiplier=0.0, stream=stream, **rest)

    monkeypatch.setattr(encoder, "class_means", forgetful)
    assert failed(audited()) == ["stage 1 noise", "stage 1 contribution"]


@pytest.mark.parametrize("name", ["class_means", "covariance"])
@pytest.mark.parametrize(
    ("fault", "scale"),  # at which thumbnails are as large as the images, or smaller
    [("noise that is halved on its way", 1), ("clipping at twice the bound", 1), ("clipping at twice the bound", 5)],
)
def test_moments_whose_noise_and_sensitivity_do_not_match(name, fault, scale, monkeypatch):
    computed, add, clipped = getattr(encoder, name), Stream.add_noise_, moments._clipped

    def faulty(*args, **rest):
        with pytest.MonkeyPatch.context() as patch:
            if fault.startswith("noise"):
                patch.setattr(Stream, "add_noise_", lambda self, x, std, *more: add(self, x, std / 2, *more))
            else:
                patch.setattr(moments, "_clipped", lambda x: 2 * clipped(x))
            return computed(*args, **rest)

    monkeypatch.setattr(encoder, name, faulty)
    checks = audited(enlarged(small.digits(), scale))
    if fault.startswith("noise"):
        assert "stage 1 noise" in failed(checks) and set(failed(checks)) <= {"stage 1 noise", "stage 1 contribution"}
    else:
        assert failed(checks) == ["stage 1 contribution"] and checks["stage 1 contribution"].measured > 1.5


def test_a_loop_that_takes_its_batches_from_a_shuffle(monkeypatch):
    def shuffled(self):
        size = round(self.dataset_size * self.sample_rate)
        return self.split(
            torch.randperm(self.dataset_size, generator=torch.Generator().manual_seed(self.turn()))[:size]
        )

    turns = iter(range(10**9))
    monkeypatch.setattr(PoissonBatches, "turn", lambda self: next(turns), raising=False)
    monkeypatch.setattr(PoissonBatches, "__next__", shuffled)
    assert failed(audited()) == ["sampler"]


def test_a_loop_that_divides_by_the_realised_batch(monkeypatch):
    privatize, step_on = audit.privatize, audit.step_on
    public = {}

    def remembered(*args, **rest):
        parts = privatize(*args, **rest)
        public[id(parts[1])] = parts[1].expected_batch_size
        return parts

    def divided(module, optimizer, losses, draw, device):
        optimizer.expected_batch_size = max(1, sum(int(part.mask.sum()) for part in draw))
        result = step_on(module, optimizer, losses, draw, device)
        optimizer.expected_batch_size = public[id(optimizer)]
        return result

    monkeypatch.setattr(audit, "privatize", remembered)
    monkeypatch.setattr(audit, "step_on", divided)
    assert set(failed(audited())) >= {"divisor"}


def test_dp_sgd_without_its_noise(monkeypatch):
    step = FusedUpdate.step
    monkeypatch.setattr(FusedUpdate, "step", lambda self, sums, *, std, **rest: step(self, sums, std=0.0, **rest))
    checks = audited(canaries=150)
    assert failed(checks) == ["noise", "one-run epsilon"]
    assert checks["one-run epsilon"].measured > 2 > checks["one-run epsilon"].limit


def test_clip_doubled(monkeypatch):
    factors = ops.clip_factors
    monkeypatch.setattr(ops, "clip_factors", lambda *args: 2 * factors(*args))
    checks = audited()
    assert failed(checks) == ["contribution", "neighbours"]
    assert checks["contribution"].measured == pytest.approx(2, rel=0.01)


def test_padding_that_is_not_masked(monkeypatch):
    """Then the record that fills up physical batches is in every one of them."""
    monkeypatch.setattr(loop.torch, "where", lambda mask, losses, other: losses)
    assert "noise" not in failed(audited()) and "neighbours" in failed(audited())


def test_no_noise_at_all():
    checks = audited_without_noise()
    assert {"stage 1 noise", "noise"} <= set(failed(checks))


def audited_without_noise() -> dict[str, Check]:
    settings = small.config(noise_multiplier=0)
    checks = audit_run(
        small.stage(small.digits(), settings), lambda records: small.stage(records, settings), canaries=8
    )
    return {check.name: check for check in checks}


# The doors ---------------------------------------------------------------------------------------------------------


def test_a_verdict_has_no_figure_and_the_report_carries_it(tmp_path):
    settings = {"config": small.config(test_fraction=0), "out": tmp_path / "run"}
    run = Trainer(small.digits(), **settings).fit()
    run.save(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "privacy.json").read_text())["audit"] == "not run"
    checks = [
        Check("one", 0.5, 1.0, "fine"),
        Check("two", float("inf"), 1.0, "not"),
        Check("three", 0.1, 1.0, "x", True),
    ]
    write_audit(tmp_path / "run", checks)
    written = json.loads((tmp_path / "run" / "curator" / "audit.json").read_text())
    assert [c["passed"] for c in written["checks"]] == [True, False, False] and not written["passed"]
    assert written["checks"][1]["measured"] is None
    report = json.loads((tmp_path / "run" / "privacy.json").read_text())
    assert report == run.report | {"audit": "failed: two, three"}
    assert "Audit: failed: two, three." in (tmp_path / "run" / "privacy.md").read_text()
    assert verdict(checks[:1]) == "passed: one"
    idle = Check("idle", 0.0, 1.0, "nothing can be told", can_fail=False)
    assert verdict([*checks[:1], idle]) == "passed: one; could not fail: idle"
    assert Trainer(small.digits(), resume=True, **settings).fit().report["audit"] == "failed: two, three"
    for damaged in ("{", "[]", "{}"):
        (tmp_path / "run" / "curator" / "audit.json").write_text(damaged)
        with pytest.raises(RunError, match=r"audit\.json cannot be read as an audit: delete it"):
            Trainer(small.digits(), resume=True, **settings).fit()
    (tmp_path / "run" / "curator" / "audit.json").unlink()
    for damaged in ("{", "[]", "{}"):
        (tmp_path / "run" / "privacy.json").write_text(damaged)
        with pytest.raises(RunError, match=r"privacy\.json cannot be read as a report: train --resume writes it anew"):
            write_audit(tmp_path / "run", checks)
    assert Trainer(small.digits(), resume=True, **settings).fit().report["audit"] == "failed: two, three"


def test_the_command_audits_a_configuration_and_a_run(tmp_path, capsys, monkeypatch):
    few = ["--canaries", 20]
    settings = small.config(noise_multiplier=3.0, seed=None)
    Trainer(config=settings, out=tmp_path / "run").fit().save(tmp_path / "run")
    code, printed, err = in_process(capsys, monkeypatch, "audit", tmp_path / "run", *few)
    assert code == 0, err
    assert all(name in printed for name in ["encoder shift", *ENGINE]) and "for the curator" in printed
    assert json.loads((tmp_path / "run" / "privacy.json").read_text())["audit"].startswith("passed: encoder shift")
    assert json.loads((tmp_path / "run" / "curator" / "audit.json").read_text())["passed"]
    code, printed, _ = in_process(
        capsys, monkeypatch, "audit", "--encoder", "private", "--noise-multiplier", 3, *few, *small.FLAGS
    )
    assert code == 1 and "failed" in printed
    for arguments, message in (
        ([tmp_path], "holds no run"),
        ([tmp_path / "run", "--epsilon", 1], "has its own configuration"),
        ([tmp_path / "run", "--data", tmp_path / "none"], "does not exist"),
        (["--encoder", "none"], "choose one of"),
    ):
        code, _, err = in_process(capsys, monkeypatch, "audit", *arguments)
        assert code == 2 and message in err and err.count("\n") == 1


def test_an_audit_stops_between_two_steps():
    settings = small.config()
    stage = small.stage(small.digits(), settings)
    subject = audit.stage_2(stage, encoder.pretrain(stage), canaries=1)
    subject.take_step(subject.ordinary)
    stage.stop._note(2, None)
    with pytest.raises(Stopped):
        subject.take_step(subject.ordinary)
