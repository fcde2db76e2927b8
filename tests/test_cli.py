"""The command line as a user meets it: every mistake is one line and exit code 2, and leaves nothing behind."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import small
import torch
import typer
from PIL import Image

from dp2vae_fast import Trainer, backends_table, load_decoder, trainer
from dp2vae_fast.config import ConfigError
from dp2vae_fast.engine.audit import Check
from dp2vae_fast.runs import folder as run_folder
from dp2vae_fast.runs.interrupt import Stopped
from dp2vae_fast.runs.ledger import Ledger
from dp2vae_fast.vae.classifiers import EvaluationError
from dp2vae_fast.vae.models import Decoder

TIMEOUT = 300


def dp2vae(*arguments, cwd=None):
    command = [sys.executable, "-c", "from dp2vae_fast.cli import main; main()", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "NO_COLOR": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=TIMEOUT)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run on the digits."""
    out = tmp_path_factory.mktemp("cli") / "run"
    done = dp2vae("train", "--out", out, "--epsilon", 5, *small.FLAGS)
    assert done.returncode == 0, done.stderr
    return out, done


# Mistakes --------------------------------------------------------------------------------------------------------


def grey(folder, name, size=(16, 16), level=100):
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(size[::-1], level, np.uint8)).save(folder / name)


def a_folder(tmp, *, damage=None, classes=("cat", "dog"), each=15):
    folder = tmp / "images"
    for k, name in enumerate(classes):
        for i in range(each):
            grey(folder / name, f"{i:02}.png", level=40 * k + i)
    if damage is not None:
        damage(folder)
    return folder


def an_array(tmp, images, labels=None):
    np.savez(tmp / "a.npz", images=images, **({} if labels is None else {"labels": labels}))
    return tmp / "a.npz"


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


FLOATS = np.random.default_rng(0).random((40, 8, 8)).astype(np.float32)
NAN = np.where(np.arange(40)[:, None, None] == 7, np.nan, FLOATS)
LABELS = np.arange(40) % 2

MISTAKES = {
    "missing folder": (lambda t: ["--data", t / "nowhere"], "does not exist"),
    "empty folder": (lambda t: ["--data", (t / "empty").mkdir() or t / "empty"], "is empty"),
    "text among images": (
        lambda t: ["--data", a_folder(t, damage=lambda f: (f / "cat" / "notes.png").write_text("hello"))],
        "is not an image",
    ),
    "truncated png": (lambda t: ["--data", a_folder(t, damage=lambda f: truncate(f / "dog" / "03.png"))], "03.png"),
    "mixed sizes": (
        lambda t: ["--data", a_folder(t, damage=lambda f: grey(f / "cat", "big.png", (20, 16)))],
        "--image-size",
    ),
    "NaN pixels": (lambda t: ["--data", an_array(t, NAN, LABELS)], "image 7 has NaN"),
    "labels out of range": (lambda t: ["--data", an_array(t, FLOATS, LABELS - 1)], "label -1 is out of range"),
    "one class only": (lambda t: ["--data", an_array(t, FLOATS, 0 * LABELS)], "one class only"),
    "no labels": (lambda t: ["--data", an_array(t, FLOATS)], "has no labels"),
    "fewer images than a batch": (
        lambda t: ["--data", an_array(t, FLOATS, LABELS), "--expected-batch-size", 64],
        "fewer than the expected batch size",
    ),
    "epsilon zero": (lambda t: ["--epsilon", 0], "target_epsilon = 0"),
    "epsilon below what any noise gives": (lambda t: ["--epsilon", 1e-9], "cannot be reached by any noise"),
    "impossible epsilon": (lambda t: ["--epsilon", 1e-6, "--steps", 1000000], "cannot be reached"),
    "unknown recipe": (lambda t: ["--recipe", "digit"], "did you mean digits"),
    "unknown setting": (lambda t: ["--set", "epsilon=3"], "unknown setting epsilon"),
    "unknown setting unlike any": (
        lambda t: ["--set", "xyzzy=3"],
        "unknown setting xyzzy; known are data, image_size,",
    ),
    "no value": (lambda t: ["--set", "steps"], "expected NAME=VALUE"),
    "missing configuration": (lambda t: ["--config", t / "no.toml"], "cannot read"),
    "sides that the preset cannot have": (
        lambda t: ["--data", an_array(t, FLOATS[:, :6, :6], LABELS), "--preset", "conv28"],
        "multiples of 4",
    ),
    "unknown preset": (lambda t: ["--preset", "unet"], 'preset "unet"'),
    "unknown device": (lambda t: ["--device", "abacus"], 'device = "abacus"'),
    "device without memory": (lambda t: ["--device", "meta"], 'device = "meta" cannot be used'),
    "missing feature network": (lambda t: ["--features", t / "none.pt"], "no file for the feature network"),
    "damaged feature network": (
        lambda t: ["--features", (t / "net.pt").write_text("x") and t / "net.pt"],
        "net.pt is not a TorchScript file",
    ),
    "output of too long a name": (lambda t: ["--out", t / (300 * "a")], "File name too long"),
    "home of nobody": (lambda t: ["--data", "~nobody-at-all/photos"], "does not exist"),
    "output below a file": (lambda t: ["--out", (t / "file").write_text("x") and t / "file" / "run"], "cannot write"),
    "public encoder missing": (lambda t: ["--encoder", "public"], "needs public_encoder"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(kind, tmp_path, capsys, monkeypatch):
    make, message = MISTAKES[kind]
    arguments = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    out = [] if "--out" in arguments else ["--out", tmp_path / "run"]
    code, _, err = in_process(capsys, monkeypatch, "train", *out, *small.FLAGS, *arguments)
    assert code == 2, err
    if err.startswith("calibrating noise for epsilon"):
        err = err.split("\n", 1)[1]
    assert message in err and err.startswith("dp2vae: error: ") and err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def in_process(capsys, monkeypatch, *arguments):
    """Exit code, standard output and error of ``dp2vae`` without the cost of a new interpreter."""
    from dp2vae_fast import cli

    monkeypatch.setattr(sys, "argv", ["dp2vae", *map(str, arguments)])
    monkeypatch.setattr(cli, "_err", cli.Console(stderr=True, width=200))
    monkeypatch.setattr(cli, "_out", cli.Console(width=200))
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_folder_that_holds_a_run_is_refused_and_stays_as_it_is(finished, capsys, monkeypatch):
    out, _ = finished
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    for extra, message in (
        ([], "already holds a run"),
        (["--resume", "--steps", 9], "another configuration (steps was 6 and is now 9)"),
        (["--resume", "--data", out.parent / "none"], "does not exist"),
    ):
        code, _, err = in_process(capsys, monkeypatch, "train", "--out", out, "--epsilon", 5, *small.FLAGS, *extra)
        assert code == 2 and message in err and err.count("\n") == 1
        assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("images", "holds, or lies in, the data"),
        ("images/cat/run", "holds, or lies in, the data"),
        ("link/run", "holds, or lies in, the data"),
        (".", "holds, or lies in, the data"),
        ("notes", "holds todo.txt and no run: choose a new folder, or an empty one"),
    ],
)
@pytest.mark.parametrize("resume", [False, True])
def test_a_run_is_kept_apart_from_its_data_and_from_other_files(out, message, resume, tmp_path, capsys, monkeypatch):
    images = a_folder(tmp_path)
    (tmp_path / "link").symlink_to(images)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    extra = ["--resume"] if resume else []
    arguments = ["--data", images, "--out", tmp_path / out, "--preset", "conv28", *small.FLAGS, *extra]
    code, _, err = in_process(capsys, monkeypatch, "train", *arguments)
    assert code == 2 and message in err and err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_an_unwritable_folder_is_refused(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    if os.access(locked, os.W_OK):  # root writes anywhere: a folder that is a file then stands for it
        locked = tmp_path / "file"
        locked.write_text("x")
    done = dp2vae("train", "--out", locked / "run", *small.FLAGS)
    assert done.returncode == 2 and "cannot write" in done.stderr and done.stderr.count("\n") == 1


def test_resume_without_a_run_says_that_one_is_started(tmp_path, capsys, monkeypatch):
    out, saying = tmp_path / "typo", []
    arguments = ["--out", out, "--epsilon", 5, *small.FLAGS, "--set=accountant=rdp", "--no-evaluate"]
    for _ in range(2):
        code, _, err = in_process(capsys, monkeypatch, "train", *arguments, "--resume")
        assert code == 0 and err.count("calibrating noise for epsilon 5\n") == 1
        saying.append(f"warning: {out} holds no run to go on with: starting one\n" in err)
    assert saying == [True, False]


def test_a_run_goes_on_with_its_own_settings(finished, tmp_path, capsys, monkeypatch):
    shutil.copytree(finished[0], tmp_path / "run")
    goes_on = ("train", "--resume", "--no-evaluate", "--out", tmp_path / "run")
    code, out, err = in_process(capsys, monkeypatch, *goes_on)
    assert code == 0 and "differentially private for every training record" in out, err
    mechanisms = [json.loads((f / "privacy.json").read_text())["mechanisms"] for f in (finished[0], tmp_path / "run")]
    assert mechanisms[0] == mechanisms[1]
    code, _, err = in_process(capsys, monkeypatch, *goes_on, "--steps", 9)
    assert code == 2 and "another configuration (steps was 6 and is now 9)" in err


def test_what_stands_against_a_folder_is_said_before_noise_is_calibrated(finished, tmp_path, capsys, monkeypatch):
    def slow(*_):
        raise AssertionError("calibrated first")

    monkeypatch.setattr(trainer, "plan_budget", slow)
    (tmp_path / "curator").write_text("in the way")
    out = finished[0]

    def refused(*arguments):
        code, _, err = in_process(capsys, monkeypatch, "train", "--epsilon", 5, *small.FLAGS, "--out", *arguments)
        assert code == 2
        return err

    assert "another configuration (steps was 6 and is now 9)" in refused(out, "--resume", "--steps", 9)
    assert "cannot write" in refused(tmp_path)
    lock = Ledger(out / "curator" / "ledger")
    assert "another process is training" in refused(out, "--resume")
    lock.close()


@pytest.mark.parametrize("empty", [[], ["run"], ["run/curator"]])
def test_a_folder_stays_empty_where_calibration_fails(empty, tmp_path):
    for folder in empty:
        (tmp_path / folder).mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="cannot be reached"):
        Trainer(small.digits(), config=small.config(target_epsilon=1e-9), out=tmp_path / "run").fit()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_large_delta_is_a_warning_and_the_run_goes_on(tmp_path):
    done = dp2vae("train", "--out", tmp_path / "run", "--delta", 0.1, "--no-evaluate", *small.FLAGS)
    assert done.returncode == 0 and "warning: delta = 0.1 is not below" in done.stderr
    report = json.loads((tmp_path / "run" / "privacy.json").read_text())
    assert any("delta = 0.1" in warning for warning in report["warnings"])


# What a run writes -----------------------------------------------------------------------------------------------


def test_a_run_writes_the_release_and_keeps_the_rest_apart(finished):
    out, done = finished
    released = {"decoder.json", "decoder.safetensors", "privacy.json", "privacy.md", "samples.png", "metrics.json"}
    assert {p.name for p in out.iterdir()} == released | {"curator"}
    kept = {p.name for p in (out / "curator").iterdir()}
    assert {"real.png", "history.csv", "curves.png", "ledger", "run.json"} <= kept
    assert [name for name in released | kept if name not in str(run_folder.__doc__)] == []
    report = json.loads((out / "privacy.json").read_text())
    assert 4.8 < report["epsilon"] <= 5 and report["delta"] == 1e-5 and report["noise_source"] == "secret"
    assert set(report["released"]) == released - {"metrics.json"}
    metrics = json.loads((out / "metrics.json").read_text())
    assert not any(metrics["private"].values()) and 0 <= metrics["cnn_accuracy_synthetic"] <= 1
    assert "differentially private for every training record" in done.stdout and "not private" in done.stdout


def test_sample_draws_pictures_and_arrays(finished, tmp_path, capsys, monkeypatch):
    out, _ = finished
    for name in ("grid.png", "again.png"):
        assert in_process(capsys, monkeypatch, "sample", out, "--out", tmp_path / name, "-n", 9, "--seed", 4)[0] == 0
    assert (tmp_path / "grid.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    assert in_process(capsys, monkeypatch, "sample", out, "--out", tmp_path / "a.npz", "-n", 5, "--label", 7)[0] == 0
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["images"].shape == (5, 1, 8, 8) and arrays["images"].dtype == np.uint8
        assert arrays["labels"].tolist() == [7] * 5
    for arguments, message in (
        ([out, "--label", 12], "no class 12: labels are 0 to 9"),
        ([tmp_path], "holds no decoder"),
        ([out, "--out", tmp_path / "a.gif"], "ends in .png or .npz"),
    ):
        code, _, err = in_process(capsys, monkeypatch, "sample", *arguments)
        assert code == 2 and message in err and err.count("\n") == 1
    for command, option in (("sample", "--seed"), ("sample", "--label"), ("evaluate", "--seed")):
        code, _, err = in_process(capsys, monkeypatch, command, out, option, 10**23)
        assert code == 2 and f"Invalid value for '{option}'" in err


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"config": {}, "data_sha256": "x"}'])
def test_a_run_without_its_settings_is_one_line(content, finished, tmp_path, capsys, monkeypatch):
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / "curator" / "run.json").write_text(content)
    for command in (["evaluate", tmp_path / "run"], ["train", *small.FLAGS, "--resume", "--out", tmp_path / "run"]):
        code, _, err = in_process(capsys, monkeypatch, *command)
        assert code == 2 and "run.json" in err and err.count("\n") == 1, err


def test_evaluate_measures_again(finished, capsys, monkeypatch):
    out, _ = finished
    code, printed, _ = in_process(capsys, monkeypatch, "evaluate", out, "--samples", 300)
    assert code == 0 and "cnn accuracy" in printed
    assert json.loads((out / "metrics.json").read_text())["samples"] == 300
    code, _, err = in_process(capsys, monkeypatch, "evaluate", out.parent)
    assert code == 2 and "holds no decoder" in err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [(KeyboardInterrupt(), 130, "dp2vae evaluate"), (EvaluationError("not measured"), 2, "not measured")],
    ids=lambda value: type(value).__name__,
)
def test_the_release_is_written_before_it_is_measured(error, code, message, tmp_path, capsys, monkeypatch):
    def broken(*_, **__):
        raise error

    monkeypatch.setattr(trainer, "evaluate", broken)
    out = tmp_path / "run"
    arguments = ["--out", out, *small.FLAGS, "--set=accountant=rdp"]
    got, printed, err = in_process(capsys, monkeypatch, "train", *arguments)
    assert got == code and message in err and "Traceback" not in err
    assert "differentially private" in printed and not (out / "metrics.json").exists()
    load_decoder(out)
    if code == 130:
        assert f"the release is in {out}" in err.splitlines()[-1]


def test_a_full_disk_is_one_line_and_the_run_goes_on(tmp_path, capsys, monkeypatch):
    save = run_folder.save_checkpoint

    def full(path, state):
        if path.name == "DP-SGD.pt":
            raise OSError(28, "No space left on device")
        save(path, state)

    arguments = ["train", "--out", tmp_path / "run", *small.FLAGS, "--epsilon", 5, "--no-evaluate"]
    with monkeypatch.context() as broken:
        broken.setattr(run_folder, "save_checkpoint", full)
        code, _, err = in_process(capsys, broken, *arguments)
    assert code == 2 and "No space left on device; once that is mended" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert in_process(capsys, monkeypatch, *arguments, "--resume")[0] == 0


def test_what_was_measured_is_shown_where_it_cannot_be_written(finished, capsys, monkeypatch):
    def refused(*_):
        raise OSError(30, "Read-only file system", "metrics.json")

    monkeypatch.setattr("dp2vae_fast.cli.write_json", refused)
    monkeypatch.setattr("dp2vae_fast.cli.write_audit", refused)
    monkeypatch.setattr(Trainer, "audit", lambda self, canaries: [Check("divisor", 0.0, 1.0, "fine")])
    for command, shown in (("evaluate", "cnn accuracy"), ("audit", "divisor")):
        code, printed, err = in_process(capsys, monkeypatch, command, finished[0])
        assert code == 2 and shown in printed
        assert err.endswith("dp2vae: error: metrics.json: Read-only file system\n")


def test_too_little_memory_is_one_line_other_errors_of_pytorch_are_not(finished, capsys, monkeypatch):
    def failing(message):
        def sample(*_, **__):
            raise RuntimeError(message)

        monkeypatch.setattr(Decoder, "sample", sample)
        return in_process(capsys, monkeypatch, "sample", finished[0])

    code, _, err = failing("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
    assert code == 2 and err.count("\n") == 1
    assert err.startswith("dp2vae: error: memory is too short: take fewer images")
    with pytest.raises(RuntimeError, match="a bug"):
        failing("a bug")


def test_an_audit_that_is_stopped_has_not_failed(capsys, monkeypatch):
    def stopped(*_):
        raise Stopped(15)

    monkeypatch.setattr(Trainer, "audit", stopped)
    code, _, err = in_process(capsys, monkeypatch, "audit")
    assert code == 143 and err == "stopped: nothing has been audited\n"


def test_evaluate_refuses_other_records_than_the_runs(finished, capsys, monkeypatch, tmp_path):
    code, _, err = in_process(
        capsys, monkeypatch, "evaluate", finished[0], "--data", an_array(tmp_path, FLOATS, LABELS)
    )
    assert code == 2 and "does not hold the records" in err and err.count("\n") == 1


def test_info_names_every_op_and_the_reason_for_each_gap(capsys, monkeypatch):
    code, printed, _ = in_process(capsys, monkeypatch, "info")
    assert code == 0 and "torch:" in printed and "devices:" in printed
    for row in backends_table():
        assert row.op in printed and row.reason in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_info_marks_kernels_that_lack_a_gpu(capsys, monkeypatch):
    common = pytest.importorskip("dp2vae_fast.kernels._common")
    marks = []
    for interpreted in (True, False):
        monkeypatch.setattr(common, "INTERPRETED", interpreted)
        marks.append("no GPU to run them on" in in_process(capsys, monkeypatch, "info")[1])
    assert marks[1] and marks[0] == backends_are_there("cuda")


def backends_are_there(name):
    return any(row.available for row in backends_table() if row.backend == name)


def test_every_option_says_what_it_is():
    from dp2vae_fast.cli import app

    commands = typer.main.get_command(app).commands
    silent = [f"{name} --{o.name}" for name, c in commands.items() for o in c.params if not getattr(o, "help", "")]
    assert set(commands) == {"train", "sample", "evaluate", "audit", "plan", "info"} and silent == []


def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "dp2vae_fast", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0 and "evaluate" in done.stdout, done.stderr


def test_colour_images_of_64_pixels_train_both_convolutional_presets(tmp_path, capsys, monkeypatch):
    """Crops of scikit-learn's two photographs, as a folder of images with a class each."""
    from sklearn.datasets import load_sample_images

    for name, photo in zip(("china", "flower"), load_sample_images().images, strict=True):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(20):
            top, left = 17 * i, 29 * i
            Image.fromarray(photo[top : top + 80, left : left + 80]).save(tmp_path / "photos" / name / f"{i}.png")
    for preset, width in (("resnet64", 32), ("conv64", 32)):
        out = tmp_path / preset
        code, _, err = in_process(
            capsys, monkeypatch, "train", "--recipe", "images64", "--data", tmp_path / "photos", "--out", out,
            "--preset", preset, "--set", f"width={width}", "--steps", 2, "--expected-batch-size", 8,
            "--physical-batch-size", 8, "--set", "warm_start_steps=3", "--set", "accountant=rdp", "--no-evaluate",
        )  # fmt: skip
        assert code == 0, err
        assert json.loads((out / "decoder.json").read_text())["image_shape"] == [3, 64, 64]
        assert Image.open(out / "samples.png").mode == "RGB"
