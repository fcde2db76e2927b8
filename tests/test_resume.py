"""A run may be stopped at any moment: what was drawn is counted, nothing is drawn twice, and it goes on."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import small
import torch

from dp2vae_fast.runs.checkpoint import RunError, load_checkpoint
from dp2vae_fast.runs.environment import circumstances
from dp2vae_fast.runs.keys import RunKeys
from dp2vae_fast.runs.ledger import Ledger
from dp2vae_fast.trainer import Trainer
from dp2vae_fast.vae.data import load_images

KILLS = 10
DRAWS = Path(__file__).with_name("draws.py")
# As long as the demo, with narrow layers; the learning signal does not matter here.
SETTINGS = ("accountant=rdp", "width=16", "checkpoint_every=20")
DEMO = ["--recipe", "digits", "--no-evaluate", *(f"--set={setting}" for setting in SETTINGS)]


def start(out, log, *arguments):
    command = [sys.executable, str(DRAWS), str(log), "train", "--out", str(out), *DEMO, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def lines(log):
    return [tuple(line.split()) for line in log.read_text().splitlines()] if log.exists() else []


def wait_until(process, condition):
    while process.poll() is None and not condition():
        time.sleep(0.002)
    return process.poll() is None


def assert_whole(out):
    """Every file is readable; leftovers of a write carry a temporary name."""
    for file in out.rglob("*"):
        if file.name.startswith(".") and file.suffix == ".tmp":
            continue
        if file.suffix == ".json":
            json.loads(file.read_text())
        elif file.suffix == ".pt":
            load_checkpoint(file)


def test_ten_kills_at_random_moments_leave_every_draw_counted_and_none_repeated(tmp_path):
    out, log = tmp_path / "run", tmp_path / "draws"
    moments = random.Random(20261124)
    killed = 0
    while killed < KILLS:
        process = start(out, log, "--resume")
        # A few kills in stage 1 and the warm start, the others spread over the draws of DP-SGD.
        early = killed < 3
        enough = len(lines(log)) + (0 if early else moments.randrange(4, 90))
        ledger = out / "curator" / "ledger"
        assert wait_until(process, lambda n=enough, file=ledger: file.exists() and len(lines(log)) >= n), (
            process.communicate()
        )
        time.sleep(moments.uniform(0, 0.8 if early else 0.02))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += 1
        assert_whole(out)
    process = start(out, log, "--resume")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors

    uses = [
        (key, mechanism, domain, step, index)
        for _, key, mechanism, domain, step, indices in lines(log)
        for index in indices.split(",")
    ]
    assert len(uses) == len(set(uses)) > 0
    report = json.loads((out / "privacy.json").read_text())
    counted = {m["name"]: m["steps"] for m in report["mechanisms"]}
    drawn = [line for line in lines(log) if line[0] in ("noise_adam_", "noise_sgd_")]
    assert len(drawn) <= counted.pop("DP-SGD") == 400
    assert sum(line[0] == "add_noise_" for line in lines(log)) <= sum(counted.values())
    assert report["noise_keys"] > KILLS / 2 and report["epsilon"] <= 10
    assert len({line[1] for line in drawn}) > 1  # several keys were really in use
    assert not [p for p in out.rglob("*.tmp")]
    assert_whole(out)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_between_two_steps_with_the_exact_count(tmp_path, number):
    out, log = tmp_path / "run", tmp_path / "draws"
    process = start(out, log)

    def stepping():
        return sum(line[0] == "noise_adam_" for line in lines(log)) >= 30

    assert wait_until(process, stepping), process.communicate()
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "--resume" in errors
    assert errors.index("stopping after the present step") < errors.index("stopped; to go on")
    drawn = sum(line[0] == "noise_adam_" for line in lines(log))
    with_ledger = Ledger(out / "curator" / "ledger")
    assert with_ledger.steps("DP-SGD") == drawn >= 30
    with_ledger.close()
    checkpoint = load_checkpoint(out / "curator" / "DP-SGD.pt")
    assert checkpoint is not None and checkpoint["step"] == drawn


class Crash(Exception):
    pass


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
@pytest.mark.parametrize("crash_at", [("warm start", 3), ("DP-SGD", 1), ("DP-SGD", 4), ("DP-SGD", 5)])
def test_a_seeded_run_that_is_resumed_ends_as_if_it_had_not_been_stopped(tmp_path, crash_at, ema_decay):
    settings = small.SETTINGS | {"recipe": "digits", "ema_decay": ema_decay, "test_fraction": 0}

    def crash(progress):
        if (progress.stage, progress.step) == crash_at:
            raise Crash

    whole = Trainer(small.digits(), out=tmp_path / "whole", **settings).fit()
    with pytest.raises(Crash):
        Trainer(small.digits(), out=tmp_path / "run", observer=crash, **settings).fit()
    resumed = Trainer(small.digits(), out=tmp_path / "run", resume=True, **settings).fit()
    for mine, other in zip(resumed.decoder.parameters(), whole.decoder.parameters(), strict=True):
        assert torch.equal(mine, other)
    assert resumed.report["mechanisms"] == whole.report["mechanisms"]
    assert [r["step"] for r in resumed.history] == [r["step"] for r in whole.history]


def test_a_seeded_run_resumed_under_other_circumstances_draws_afresh_and_counts_it(tmp_path):
    settings = small.SETTINGS | {"recipe": "digits", "test_fraction": 0}

    def crash(progress):
        if (progress.stage, progress.step) == ("DP-SGD", 3):
            raise Crash

    with pytest.raises(Crash):
        Trainer(small.digits(), out=tmp_path / "run", observer=crash, **settings).fit()
    resumed = Trainer(small.digits(), out=tmp_path / "run", resume=True, **settings | {"physical_batch_size": 8}).fit()
    assert resumed.report["noise_keys"] == 2
    assert resumed.report["mechanisms"][-1]["steps"] == 6


def test_a_finished_run_can_be_resumed_and_spends_nothing_more(tmp_path):
    settings = small.SETTINGS | {"recipe": "digits", "test_fraction": 0, "out": tmp_path / "run", "seed": None}
    first = Trainer(small.digits(), **settings).fit()
    again = Trainer(small.digits(), resume=True, **settings).fit()
    assert again.report["mechanisms"] == first.report["mechanisms"]
    for mine, other in zip(again.decoder.parameters(), first.decoder.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_a_stage_1_that_drew_twice_and_leaves_no_budget_says_what_to_do(tmp_path, monkeypatch):
    """Another target would be another configuration, which the folder refuses: there is no going on with it."""
    settings = {"config": small.config(target_epsilon=10, test_fraction=0, seed=None), "out": tmp_path / "run"}

    def killed(*_, **__):
        raise Crash

    monkeypatch.setattr("dp2vae_fast.vae.encoder.covariance", killed)
    with pytest.raises(Crash):
        Trainer(small.digits(), **settings).fit()
    monkeypatch.undo()
    with pytest.raises(RunError, match="delete that folder and train anew"):
        Trainer(small.digits(), resume=True, **settings).fit()
    shutil.rmtree(tmp_path / "run")
    assert Trainer(small.digits(), **settings).fit().report["epsilon"] <= 10


def test_steps_that_a_process_took_with_it_are_said_to_be_lost(tmp_path):
    """They are counted all the same: without a word, a run without its last checkpoint would be released untrained."""
    settings = {"config": small.config(test_fraction=0, seed=None), "out": tmp_path / "run"}
    Trainer(small.digits(), **settings).fit()
    (tmp_path / "run" / "curator" / "DP-SGD.pt").unlink()
    with pytest.warns(UserWarning, match="6 steps of DP-SGD count as spent and are lost .* 0 of 6 are left"):
        Trainer(small.digits(), resume=True, **settings).fit()


def test_other_data_are_refused(tmp_path):
    settings = small.SETTINGS | {"recipe": "digits", "test_fraction": 0, "out": tmp_path / "run"}
    Trainer(small.digits(), **settings).fit()
    with pytest.raises(ValueError, match="run on other data"):
        Trainer(small.digits(150), resume=True, **settings).fit()


@pytest.mark.filterwarnings("ignore:encoder = private:UserWarning")
@pytest.mark.parametrize("mode", ["private", "public"])
@pytest.mark.parametrize("stage", ["pre-training", "DP-SGD"])
def test_what_training_without_noise_left_enters_no_other_run(tmp_path, mode, stage, monkeypatch):
    """A noise-free encoder in a folder must not pass into a run that claims an end-to-end guarantee."""
    from dp2vae_fast.vae import latents

    public = tmp_path / "public.npz"
    others = load_images("digits").subset(torch.arange(400, 500))
    np.savez(public, images=others.images.numpy(), labels=others.labels.numpy(), num_classes=10)
    extra = {"public_encoder": str(public)} if mode == "public" else {}
    out = tmp_path / "run"

    def crash(progress):
        if (progress.stage, progress.step) == (stage, 15):
            raise KeyboardInterrupt

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken, pytest.raises((KeyboardInterrupt, OSError)):
        if stage == "DP-SGD":  # between stage 1 and the first noise of stage 2
            broken.setattr(latents.LatentCache, "open", full)
        settings = small.config(encoder=mode, test_fraction=0, checkpoint_every=1, pretrain_steps=30, **extra)
        Trainer(small.digits(), config=settings, out=out, observer=crash).fit()
    for other in ("dp", "linear"):
        for resume in (False, True):
            with pytest.raises(RunError):
                Trainer(
                    small.digits(), config=small.config(encoder=other, test_fraction=0), out=out, resume=resume
                ).fit()


@pytest.mark.parametrize("lost", ["ledger", "run.json"])
def test_checkpoints_without_their_ledger_or_identity_are_refused(tmp_path, lost):
    settings = small.config(test_fraction=0, seed=None)
    Trainer(small.digits(), config=settings, out=tmp_path / "run").fit()
    (tmp_path / "run" / "curator" / lost).unlink()
    with pytest.raises(RunError, match="train into a new folder"):
        Trainer(small.digits(), config=settings, out=tmp_path / "run", resume=True).fit()


@pytest.mark.filterwarnings("ignore:noise_multiplier = 0:UserWarning")
@pytest.mark.parametrize("file", ["stage1.pt", "class-means.pt", "DP-SGD.pt"])
def test_a_checkpoint_of_another_run_is_refused(tmp_path, file):
    """Else a run without noise would be released under the epsilon of the ledger beside it."""
    settings = small.config(test_fraction=0, seed=None)
    for name, changes in (("run", {}), ("noiseless", {"noise_multiplier": 0})):
        changed = small.config(test_fraction=0, seed=None, **changes)
        Trainer(small.digits(), config=changed, out=tmp_path / name).fit()
    curator = tmp_path / "run" / "curator"
    for later in ("DP-SGD.pt", "stage1.pt"):  # what would be read before it
        (curator / later).unlink()
    shutil.copy(tmp_path / "noiseless" / "curator" / file, curator / file)
    with pytest.raises(RunError, match=f"{file} belongs to another run"):
        Trainer(small.digits(), config=settings, out=tmp_path / "run", resume=True).fit()


def test_a_run_without_an_id_is_refused(tmp_path):
    settings = small.config(test_fraction=0, seed=None)
    Trainer(small.digits(), config=settings, out=tmp_path / "run").fit()
    curator = tmp_path / "run" / "curator"
    known = json.loads((curator / "run.json").read_text())
    (curator / "run.json").write_text(json.dumps({key: known[key] for key in known if key != "id"}))
    with pytest.raises(RunError, match="does not say what the run is made of"):
        Trainer(small.digits(), config=settings, out=tmp_path / "run", resume=True).fit()


@pytest.mark.parametrize("sign", ["decoder.safetensors", "privacy.json"])
def test_a_release_whose_run_is_gone_is_not_trained_over(tmp_path, sign):
    """A second run there would take the release's place and spend the whole budget on the same records again."""
    (tmp_path / sign).write_text("released")
    with pytest.raises(RunError, match=f"holds {sign} of an unknown run: train into a new folder"):
        Trainer(small.digits(), config=small.config(test_fraction=0), out=tmp_path, resume=True).fit()
    assert [p.name for p in tmp_path.iterdir()] == [sign]


@pytest.mark.parametrize(
    ("records", "changes"),
    [(199, {}), (200, {"engine": "opacus"}), (200, {"physical_batch_size": 8}), (200, {"threads": 2})],
    ids=str,
)
def test_one_seed_gives_other_noise_where_sums_are_others(records, changes):
    """One noise on two sums (records, or the latents that they get) cancels in the difference of two releases; in two
    sizes on one sum (the engines) it is the difference."""
    runs = [small.stage(small.digits(), small.config()), small.stage(small.digits(records), small.config(**changes))]
    keys = [run.keys.keystream("DP-SGD").key_tensor() for run in runs]
    assert not torch.equal(*keys)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("part", ["processor", "instruction_set"])
def test_another_processor_is_another_machine(monkeypatch, device, part):
    """A seeded run repeats its keys only where it repeats its bits."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    here = circumstances(torch.device(device))
    monkeypatch.setattr(f"dp2vae_fast.ops.{part}", lambda: "another")
    assert circumstances(torch.device(device)) != here


def test_a_run_may_repeat_its_own_keys_in_silence(recwarn):
    for _ in range(2):
        RunKeys(1, 0).keystream("class means").stream("class means")
    assert not recwarn


# Generators of latents ------------------------------------------------------------------------------------------------


def test_generators_are_secret_beyond_the_32_bits_that_a_seed_is_worth(monkeypatch):
    """Of a seed, PyTorch's generator takes the low 32 bits."""
    plain = [torch.randn(4, generator=torch.Generator().manual_seed(seed)) for seed in (12345, 12345 + 2**40)]
    assert torch.equal(*plain)
    monkeypatch.setattr("dp2vae_fast.runs.keys.secrets.randbits", lambda bits: 12345)
    secret = [RunKeys(None, 0).generator("latents") for _ in range(2)]
    monkeypatch.setattr(RunKeys, "_derive", lambda self, purpose: 12345 + 2**40 * self.number)
    seeded = [RunKeys(1, number).generator("latents") for number in range(2)]
    draws = [torch.randn(1000, generator=generator) for generator in (*secret, *seeded)] + [plain[0]]
    assert not any((draws[i][:4] == draws[j][:4]).any() for i in range(len(draws)) for j in range(i))
    states = [generator.get_state().view(torch.int64)[3 : 3 + 624] for generator in (*secret, *seeded)]
    assert all(len(set(state.tolist())) > 600 for state in states)
    assert torch.equal(RunKeys(1, 1).generator("latents").get_state(), RunKeys(1, 1).generator("latents").get_state())


def test_the_state_lies_where_it_is_filled():
    """The first word of MT19937 is the seed itself; nothing beside the words is changed."""
    state = torch.Generator().manual_seed(12345 + 2**40).get_state().view(torch.int64)
    assert state[3] == 12345 and 0 <= int(state[3:627].min()) and 2**31 < int(state[3:627].max()) < 2**32
    filled = RunKeys(1, 0).generator("latents")
    fresh = torch.Generator().manual_seed(filled.initial_seed()).get_state().view(torch.int64)
    changed = (filled.get_state().view(torch.int64) != fresh).nonzero().flatten()
    assert int(changed.min()) >= 3 and int(changed.max()) < 627 and len(changed) >= 623


def test_what_filled_generators_draw_is_random_and_goes_on():
    generator = RunKeys(None, 0).generator("latents")
    uniform, normal = torch.rand(200_000, generator=generator), torch.randn(200_000, generator=generator)
    counts = torch.histc(uniform, 100, 0, 1)
    assert float((counts - 2000).square().sum() / 2000) < 99 + 6 * (2 * 99) ** 0.5
    assert abs(float(normal.mean())) < 6 / 200_000**0.5 and abs(float(normal.var()) - 1) < 6 * (2 / 200_000) ** 0.5
    again = torch.Generator()
    again.set_state(generator.get_state())
    assert torch.equal(torch.randn(1001, generator=again), torch.randn(1001, generator=generator))
