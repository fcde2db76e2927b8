"""The command line: ``dp2vae train | sample | evaluate | audit | plan | info``.

Every error that a user can cause ends as one line on standard error and exit code 2.
"""

from __future__ import annotations

import importlib
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from .config import DEFAULT_RECIPE, Config, ConfigError, load_config, recipes
from .engine.audit import Check
from .engine.gradients.plan import Plan, memory_overhead
from .ops import backends_table
from .runs.checkpoint import RunError, write_atomic, write_json
from .runs.environment import on_threads, versions
from .runs.folder import read_run
from .runs.interrupt import Stopped
from .trainer import Trainer, load_split, sampler
from .vae.audit import CANARIES, LEAST_CANARIES, write_audit
from .vae.classifiers import EvaluationError
from .vae.data import DataError, ImageData, to_pixels
from .vae.evaluate import evaluate as evaluate_samples
from .vae.fid import require_feature_network
from .vae.figures import image_grid, write_png
from .vae.models import ModelError
from .vae.release import load_decoder
from .vae.report import headline
from .vae.stage import Progress as Heard

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
_out, _err = Console(), Console(stderr=True)
_INT64 = 2**63 - 1

# Options of several commands.
Recipe = Annotated[str | None, typer.Option(help=f"One of {', '.join(recipes())}.")]
ConfigFile = Annotated[Path | None, typer.Option(help="A TOML file of settings; a flag beats it.")]
Encoder = Annotated[str | None, typer.Option(help="linear, dp, public or private.")]
PublicEncoder = Annotated[str | None, typer.Option(help="Its checkpoint, or a public data set.")]
TargetEpsilon = Annotated[
    float | None, typer.Option("--target-epsilon", "--epsilon", help="Of the whole run, both stages together.")
]
TargetDelta = Annotated[
    float | None, typer.Option("--target-delta", "--delta", help="Well below one over the number of records.")
]
NoiseMultiplier = Annotated[float | None, typer.Option(help="Instead of a target; 0: not private.")]
Engine = Annotated[str | None, typer.Option(help="fused, or opacus (the reference path).")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, ...")]
Setting = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any other setting; a flag of its own beats it.")
]


@app.command()
def train(
    recipe: Recipe = None,
    config: ConfigFile = None,
    data: Annotated[
        str | None,
        typer.Option(help="digits; a folder of images; .npy, .npz, idx, .parquet; a Hugging Face data set on disk."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/latest"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, as it was set, or start one there.")
    ] = False,
    image_size: Annotated[int | None, typer.Option(help="Crop and resize images to this side.")] = None,
    channels: Annotated[int | None, typer.Option(help="1 (grey) or 3 (RGB).")] = None,
    conditional: Annotated[bool | None, typer.Option(help="Condition the decoder on labels.")] = None,
    preset: Annotated[str | None, typer.Option(help="mlp, conv28, conv64 or resnet64.")] = None,
    latent_dim: Annotated[int | None, typer.Option(help="Numbers in a latent.")] = None,
    likelihood: Annotated[str | None, typer.Option(help="bernoulli or gaussian.")] = None,
    target_epsilon: TargetEpsilon = None,
    target_delta: TargetDelta = None,
    noise_multiplier: NoiseMultiplier = None,
    encoder: Encoder = None,
    public_encoder: PublicEncoder = None,
    max_grad_norm: Annotated[float | None, typer.Option(help="Bound of the norm of a record's gradient.")] = None,
    expected_batch_size: Annotated[
        int | None, typer.Option(help="Records that a Poisson draw is expected to have.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of DP-SGD.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="sgd, adam or adamw.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of DP-SGD.")] = None,
    seed: Annotated[int | None, typer.Option(help="Reproducible noise: private only while it stays secret.")] = None,
    engine: Engine = None,
    device: Device = None,
    physical_batch_size: Annotated[int | None, typer.Option(help="Rows in memory at a time.")] = None,
    settings: Setting = None,
    features: Annotated[list[str] | None, typer.Option(help="Feature networks of the FID (see evaluate).")] = None,
    evaluate: Annotated[bool, typer.Option(help="Measure the samples at the end.")] = True,
) -> None:
    """Train a private image generator and write the release, and the curator's files beside it, into --out."""
    chosen = _chosen(locals())
    if resume and recipe is None and config is None and (out / "curator" / "run.json").is_file():
        complete = load_config(overrides=_settings_of(read_run(out)) | chosen)
    else:
        complete = _configured(recipe, config, chosen)
    features = features or ["cnn"]
    for wanted in features:
        require_feature_network(wanted)
    way_on = f"dp2vae train --resume --out {out}"
    try:
        with _Bars() as bars:
            run = Trainer(config=complete, out=out, resume=resume, observer=bars.hear).fit()
        run.save(out)
    except KeyboardInterrupt as stop:
        _err.print(f"stopped; to go on: {way_on}", soft_wrap=True)
        raise typer.Exit(_code(stop)) from None
    except OSError as error:
        raise RunError(f"cannot write into {out}: {_reason(error)}; once that is mended: {way_on}") from error
    _print_result(out, run.report)
    if evaluate:
        _measure(out, lambda: run.evaluate(features))


@app.command()
def sample(
    run: Annotated[Path, typer.Argument(help="Folder of a released decoder.")],
    out: Annotated[Path, typer.Option(help="A .png for one grid, or a .npz of images and labels.")] = Path("new.png"),
    number: Annotated[int, typer.Option("--number", "-n", min=1, help="How many images.")] = 64,
    label: Annotated[
        int | None, typer.Option(min=0, max=_INT64, help="Class of all of them; drawn at random unless given.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=_INT64, help="The same images for the same seed.")] = None,
) -> None:
    """Draw new images from a released decoder."""
    decoder = load_decoder(run)
    if out.suffix not in (".png", ".npz"):
        raise ConfigError(f"--out {out}: expected a name that ends in .png or .npz")
    generator = torch.Generator()
    generator.manual_seed(seed) if seed is not None else generator.seed()
    labels = None if label is None else torch.full((number,), label)
    if labels is None and decoder.spec.num_classes:
        labels = decoder.draw_labels(number, generator=generator).sort().values
    images = to_pixels(decoder.sample(number, labels, generator=generator))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == ".png":
            write_png(out, image_grid(images, columns=max(1, round(number**0.5))))
        else:
            arrays = {"images": images.numpy()} | ({} if labels is None else {"labels": labels.numpy()})
            write_atomic(out, lambda file: np.savez_compressed(file, allow_pickle=False, **arrays))
    except OSError as error:
        raise RunError(f"cannot write {out}: {error.strerror}") from error
    _out.print(f"{number} images in {out}")


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    data: Annotated[str | None, typer.Option(help="The run's data, where they have moved.")] = None,
    samples: Annotated[int, typer.Option(min=2, help="How many samples, and training records, are compared.")] = 5000,
    features: Annotated[
        list[str] | None, typer.Option(help='"cnn" (fitted on the real data), a TorchScript file, "inception:FILE".')
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=_INT64, help="Of the samples and of the classifiers.")] = 0,
) -> None:
    """Measure a decoder's samples against the real images, and write metrics.json. Its figures are not private."""
    decoder = load_decoder(run)
    complete, (train_data, test_data) = _of_run(run, {} if data is None else {"data": data})
    draw, wanted = sampler(decoder, seed), features or ["cnn"]

    def measured() -> dict[str, Any]:
        with on_threads(complete.performance.threads):
            return evaluate_samples(draw, train_data, test_data, samples=samples, features=wanted, seed=seed)

    _measure(run, measured)


@app.command()
def audit(
    run: Annotated[Path | None, typer.Argument(help="Folder of a run, whose configuration is audited.")] = None,
    recipe: Recipe = None,
    config: ConfigFile = None,
    data: Annotated[str | None, typer.Option(help="As for train; the run's data, where they have moved.")] = None,
    encoder: Encoder = None,
    public_encoder: PublicEncoder = None,
    target_epsilon: TargetEpsilon = None,
    target_delta: TargetDelta = None,
    noise_multiplier: NoiseMultiplier = None,
    seed: Annotated[int | None, typer.Option(help="Of the audit's own coins; 0 unless given.")] = None,
    canaries: Annotated[int, typer.Option(min=LEAST_CANARIES, help="Coins of the one-run bound.")] = CANARIES,
    engine: Engine = None,
    device: Device = None,
    settings: Setting = None,
) -> None:
    """Run the training of a configuration with canaries and hold it against what is claimed. Exit code 1: it failed.

    Its figures come from real records without noise: they are for the curator.
    """
    chosen = _chosen(locals())
    if run is None:
        complete = _configured(recipe, config, chosen)
    else:
        if recipe or config or set(chosen) - {"data", "seed", "device"}:
            raise ConfigError(f"{run} has its own configuration: only --data, --seed and --device can be changed")
        complete, _ = _of_run(run, chosen)
    try:
        with _Bars() as bars:
            checks = Trainer(config=complete, observer=bars.hear).audit(canaries)
    except KeyboardInterrupt as stop:
        _err.print("stopped: nothing has been audited", soft_wrap=True)
        raise typer.Exit(_code(stop)) from None
    try:
        if run is not None:
            write_audit(run, checks)
    finally:  # what took minutes is shown even where it cannot be written
        _print_checks(checks)
    if not all(check.passed for check in checks):
        raise typer.Exit(1)


@app.command()
def plan(
    recipe: Recipe = None,
    config: ConfigFile = None,
    data: Annotated[
        str | None, typer.Option(help="As of train, in any number; what matters is their shape and classes.")
    ] = None,
    max_memory_overhead: Annotated[float | None, typer.Option(help="Peak memory over an ordinary step's.")] = None,
    measure_plan: Annotated[bool | None, typer.Option("--measure", help="Time the ways, on random numbers.")] = None,
    settings: Setting = None,
) -> None:
    """How every layer's per-sample gradients will be clipped and summed, and what each way costs."""
    trainer = Trainer(config=_configured(recipe, config, _chosen(locals())))
    _print_plan(trainer.plan(), trainer.config.performance.physical_batch_size)


@app.command()
def info() -> None:
    """Versions, devices, and which backend of every op is available here."""
    found = versions() | {"cuda": torch.version.cuda or "not in this build of torch"}
    found["devices"] = ", ".join(["cpu", *(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))])
    found["threads"] = str(torch.get_num_threads())
    try:
        from dp2vae_fast import _C

        found["native module"] = ", ".join(f"{k} {v}" for k, v in _C.build_info().items())
    except ImportError:
        found["native module"] = "not built"
    try:
        found["CUDA module"] = importlib.import_module("dp2vae_fast._cuda").BUILT_FOR
    except ImportError:
        found["CUDA module"] = "not built"
    for name, value in found.items():
        _out.print(f"[bold]{name}[/]: {value}", highlight=False, soft_wrap=True)
    _print_backends()


def main() -> None:
    """Entry point of ``dp2vae``."""
    warnings.showwarning = _show_warning
    try:
        app()
    except (ConfigError, DataError, EvaluationError, ModelError, RunError) as error:
        _fail(str(error))
    except OSError as error:
        _fail(_reason(error))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        _fail("memory is too short: take fewer images, or a smaller width, latent_dim or physical_batch_size")


def _fail(message: str) -> NoReturn:
    _err.print(f"dp2vae: error: {message}", markup=False, highlight=False, soft_wrap=True)
    sys.exit(2)


def _reason(error: OSError) -> str:
    """In one line, with the file where the error names one."""
    return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)


def _code(stop: KeyboardInterrupt) -> int:
    """Exit code of a command that a signal has ended."""
    return 128 + (stop.signal if isinstance(stop, Stopped) else signal.SIGINT)


# -----------------------------------------------------------------------------------------------------------------


class _Bars:
    """Progress of a run on standard error: one bar a stage, with speed and the epsilon spent so far."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<22}"),
            BarColumn(bar_width=30),
            TextColumn("{task.completed:>6}/{task.total}"),
            TextColumn("{task.fields[speed]}"),
            TextColumn("{task.fields[spent]}"),
            TimeRemainingColumn(),
            console=_err,
        )
        self._tasks: dict[str, TaskID] = {}
        self._records: dict[str, int] = {}

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *error: object) -> None:
        if self._tasks:
            self._progress.stop()

    def hear(self, heard: Heard) -> None:
        """Show one step, or a line for what has none. The first step opens the display."""
        if not heard.steps:
            _err.print(heard.stage, markup=False, highlight=False, soft_wrap=True)
            return
        if not self._tasks:
            self._progress.start()
        if heard.stage not in self._tasks:
            self._tasks[heard.stage] = self._progress.add_task(
                heard.stage, total=heard.steps, completed=heard.step - 1, speed="", spent=""
            )
        task = self._tasks[heard.stage]
        self._records[heard.stage] = self._records.get(heard.stage, 0) + heard.records
        fields: dict[str, Any] = {}
        speed = self._progress.tasks[task].speed
        elapsed = self._progress.tasks[task].elapsed
        if speed is not None and elapsed:
            images = self._records[heard.stage] / elapsed
            fields["speed"] = f"{speed:6.1f} step/s" + (f" {images:7.0f} images/s" if images else "")
        if heard.epsilon is not None:
            fields["spent"] = f"ε {heard.epsilon:.2f}"
        self._progress.update(task, completed=heard.step, **fields)


_FIELDS = {name for table in Config().to_dict().values() for name in table}


def _chosen(arguments: dict[str, Any]) -> dict[str, Any]:
    """Fields of the configuration that a command's arguments set, by ``--set`` or a flag of their own."""
    chosen = {}
    for setting in arguments["settings"] or []:
        name, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting}: expected NAME=VALUE")
        chosen[name.strip().replace("-", "_")] = value.strip()
    return chosen | {name: value for name, value in arguments.items() if name in _FIELDS and value is not None}


def _configured(recipe: str | None, file: Path | None, chosen: dict[str, Any]) -> Config:
    """What a command is asked to run: the default recipe where it names neither another nor a file."""
    if recipe is None and file is None:
        recipe = DEFAULT_RECIPE
    return load_config(recipe=recipe, file=file, overrides=chosen)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _err.print(f"warning: {message}", markup=False, highlight=False, soft_wrap=True)


def _print_backends() -> None:
    """Op x backend: yes, or the number of the reason why not."""
    gaps = {(row.op, row.backend): row.reason or _missing_gpu(row.backend) for row in backends_table()}
    backends = list(dict.fromkeys(backend for _, backend in gaps))
    reasons = list(dict.fromkeys(filter(None, gaps.values())))
    table = Table("op", *backends)
    for op in dict.fromkeys(op for op, _ in gaps):
        cells = (gaps[op, backend] for backend in backends)
        table.add_row(op, *(f"({reasons.index(gap) + 1})" if gap else "yes" for gap in cells))
    _out.print(table)
    for number, reason in enumerate(reasons, 1):
        _out.print(f"({number}) {reason}", highlight=False, soft_wrap=True)


def _missing_gpu(backend: str) -> str:
    """Why a backend whose kernels are there cannot run them on this machine; the empty string where it can."""
    if backend not in ("cuda", "triton") or torch.cuda.is_available():
        return ""
    if backend == "triton" and importlib.import_module("dp2vae_fast.kernels._common").INTERPRETED:
        return ""
    return "its kernels are there, but no GPU to run them on"


def _settings_of(known: dict[str, Any]) -> dict[str, Any]:
    """What a run was told, from its identity."""
    return {k: v for table in known["config"].values() for k, v in table.items() if v is not None}


def _of_run(run: Path, changes: dict[str, Any]) -> tuple[Config, tuple[ImageData, ImageData]]:
    """The configuration of a run with ``changes``, and its training and held-out records; raises ``RunError`` where the
    training records are not the run's."""
    known = read_run(run)
    complete = load_config(overrides=_settings_of(known) | changes)
    split = load_split(complete)
    if split[0].sha256 != known["data_sha256"]:
        raise RunError(f"{split[0].name} does not hold the records of {run}: name the run's own data with --data")
    return complete, split


def _print_checks(checks: Sequence[Check]) -> None:
    table = Table("check", "", "measured", "limit", "what was measured")
    for check in checks:
        limit = f"{'≥' if check.at_least else '≤'} {check.limit:.6g}"
        verdict = "[bold red]failed[/]" if not check.passed else "passed" if check.can_fail else "could not fail"
        table.add_row(check.name, verdict, f"{check.measured:.6g}", limit, check.explanation)
    _out.print(table)
    _out.print("These figures are not private: they are for the curator. An audit finds faults; it proves nothing.")


def _print_plan(made: Plan, rows: int) -> None:
    """One line a weight; times of a physical batch of so many rows, and what is held of it."""

    def ms(nanoseconds: float) -> str:
        return f"{nanoseconds * rows / 1e6:.2f}"

    table = Table(
        Column("parameter", overflow="fold"), "T", "D", "P", "way", "predicted", "measured", "next best", "MiB"
    )
    for choice in made.choices.values():
        cost, times = choice.cost, choice.times
        others = sorted((time, way) for way, time in times.items() if way != choice.method)
        table.add_row(
            choice.parameter,
            *map(str, (cost.positions, cost.inputs, cost.outputs)),
            choice.method,
            ms(choice.predicted[choice.method]),
            ms(choice.measured[choice.method]) if choice.measured else "",
            f"{others[0][1]} {ms(others[0][0])}" if others else "",
            f"{choice.held * rows / 2**20:.1f}",
        )
    _out.print(table)
    _out.print(
        "A record's gradient is a sum over T positions of D inputs by P outputs. gram: its norm comes from products of "
        "positions, no gradient is formed; direct: it is formed and forgotten; kept: it is formed once and stored.",
        highlight=False,
        soft_wrap=True,
    )
    overhead = memory_overhead(list(made.choices.values()))
    _out.print(
        f"Milliseconds and MiB held, of {rows} rows. Peak memory over an ordinary step's, as the plan reckons: "
        f"{overhead:.2f}, of at most {made.max_memory_overhead:g}. Biases and scales of norm layers are always kept.",
        highlight=False,
        soft_wrap=True,
    )


def _print_result(out: Path, report: dict[str, Any]) -> None:
    _out.print(
        f"[bold]{out}[/]: decoder.safetensors, decoder.json, privacy.json, privacy.md, samples.png", soft_wrap=True
    )
    _out.print(headline(report), highlight=False, soft_wrap=True)


def _measure(folder: Path, measured: Callable[[], dict[str, Any]]) -> None:
    """Write metrics.json beside a release and print it. Where that fails or is stopped the release stays as it is."""
    try:
        with _err.status("measuring samples"):
            metrics = measured()
    except KeyboardInterrupt as stop:
        _err.print(f"stopped; the release is in {folder}, dp2vae evaluate {folder} measures it", soft_wrap=True)
        raise typer.Exit(_code(stop)) from None
    try:
        write_json(folder / "metrics.json", metrics)
    finally:
        _print_metrics(metrics)


def _print_metrics(metrics: dict[str, Any]) -> None:
    for kind in ("cnn", "logreg"):
        synthetic, real = metrics[f"{kind}_accuracy_synthetic"], metrics[f"{kind}_accuracy_real"]
        if synthetic is not None:
            _out.print(
                f"{kind} accuracy on held-out images: {synthetic:.3f} trained on samples, {real:.3f} on real ones"
            )
    for network, value in metrics["fid"].items():
        _out.print(f"FID ({network}): {value:.2f}")
    for warning in metrics["warnings"]:
        _show_warning(warning)
    _out.print("These figures are not private: they are for the curator.")
