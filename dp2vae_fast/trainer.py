"""Trainer: a private image generator in two stages.

Stage 1 fits an encoder (``encoder=`` says how, and at what price). Stage 2 trains the decoder alone by DP-SGD on the
frozen encoder's latents. The decoder is released with a report of everything that was spent; nothing else is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .config import DEFAULT_RECIPE, Config, ConfigError, load_config, validate
from .engine.accounting import Mechanism
from .engine.audit import Check
from .engine.gradients.plan import Plan
from .engine.gradients.planning import plan_for
from .runs.checkpoint import RunError
from .runs.environment import on_threads
from .runs.folder import RunFolder, check_output, data_sources, holds_run
from .runs.interrupt import StopRequest
from .runs.keys import take_keys
from .vae.audit import CANARIES, audit_run
from .vae.budget import Budget, calibrate_step, plan_budget
from .vae.data import DataError, ImageData, check_trainable, load_images, to_pixels, train_test_split
from .vae.encoder import MODES, Pretrained, pretrain
from .vae.evaluate import evaluate
from .vae.latents import LatentCache, decoder_losses
from .vae.models import Decoder, ModelSpec, build_decoder
from .vae.release import save_for_curator, save_release
from .vae.report import report_on
from .vae.stage import GeneratorState, Progress, Stage, Stateful, plan_of


class Trainer:
    """Trains a DP²-VAE and holds the result.

    ::

        run = Trainer(recipe="digits", target_epsilon=10, encoder="linear").fit()
        run.save("runs/digits")
        images = run.decoder.sample(64)

    Args:
        data: images in memory, or a source that :func:`~dp2vae_fast.vae.data.load_images` reads, instead of the
            recipe's.
        recipe: name of a recipe of the package; "digits" when neither data nor a configuration is given.
        config: a complete :class:`~dp2vae_fast.config.Config`, or the path of a TOML file.
        out: folder of the run: checkpoints, ledger and results. None keeps everything in memory; such a run cannot be
            resumed.
        resume: go on with the run in ``out``; where there is none, one is started, with a warning.
        observer: called with :class:`~dp2vae_fast.vae.stage.Progress`, often.
        settings: any field of the configuration by its name; beats the file, which beats the recipe.

    Raises ``ValueError`` (its subclasses :class:`~dp2vae_fast.config.ConfigError`,
    :class:`~dp2vae_fast.vae.data.DataError`, :class:`~dp2vae_fast.vae.models.ModelError`,
    :class:`~dp2vae_fast.runs.checkpoint.RunError`) with one clear line for settings, data and folders that cannot be
    used.

    Attributes after :meth:`fit`: ``decoder``, ``report`` (the content of ``privacy.json``), ``history`` (one row a step
    of DP-SGD: for the curator only), ``train_data``, ``test_data``; ``metrics`` after :meth:`evaluate`.
    """

    decoder: Decoder
    report: dict[str, Any]
    history: list[dict[str, Any]]
    train_data: ImageData
    test_data: ImageData

    def __init__(
        self,
        data: ImageData | str | Path | None = None,
        *,
        recipe: str | None = None,
        config: Config | str | Path | None = None,
        out: str | Path | None = None,
        resume: bool = False,
        observer: Callable[[Progress], None] | None = None,
        **settings: Any,
    ) -> None:
        if isinstance(data, str | Path):
            settings["data"] = str(data)
        elif data is not None and not isinstance(data, ImageData):
            way_out = "give a path, or what dp2vae_fast.vae.data.make_image_data makes of images and labels"
            raise DataError(f"data of type {type(data).__name__} cannot be trained on: {way_out}")
        if isinstance(config, Config):
            if recipe is not None or settings:
                raise ConfigError("a complete Config leaves no room for a recipe or settings: use dataclasses.replace")
            validate(config)
            self.config = config
        else:
            if recipe is None and config is None:
                if data is not None:
                    raise ConfigError("name a recipe or a configuration file for these data: settings depend on them")
                recipe = DEFAULT_RECIPE
            self.config = load_config(recipe=recipe, file=config, overrides=settings)
        self.out = None if out is None else Path(out)
        self.resume = resume
        self.observer = observer or (lambda progress: None)
        self._images = data if isinstance(data, ImageData) else None
        self.metrics: dict[str, Any] | None = None

    # The two stages --------------------------------------------------------------------------------------------------

    def fit(self) -> Trainer:
        """Run both stages, or what is left of them, and make the report.

        Ctrl-C ends the run after the current step, with a checkpoint, and raises ``KeyboardInterrupt``.
        """
        config = self.config
        if self.out is not None:
            check_output(self.out, resume=self.resume, sources=data_sources(self.config))
        device, train, self.test_data, spec = self._prepared()
        self.train_data = train
        build_decoder(spec)  # what cannot be built is found out before anything is written
        doubts = _doubts(config, len(train))
        news = list(doubts)
        if self.resume and self.out is not None and not holds_run(self.out):
            news.append(f"{self.out} holds no run to go on with: starting one")
        for line in news:
            warnings.warn(line, stacklevel=2)
        folder = RunFolder(self.out, resume=self.resume, config=config, data_sha256=train.sha256)
        with folder as run, on_threads(config.performance.threads):
            budget = self._budget(len(train))  # slow, so only once the folder can be used
            with StopRequest() as stop:
                last = run.load("DP-SGD.pt") or run.load("stage1.pt")
                keys = take_keys(run.ledger, config, train.sha256, device, None if last is None else last["key"])
                stage = Stage(config, spec, train, budget, run, keys, device, stop, self.observer)
                self.decoder = train_decoder(stage, pretrain(stage)).cpu()
                self.history = stage.history
                self.report = report_on(stage, MODES[config.privacy.encoder], doubts)
        return self

    def audit(self, canaries: int = CANARIES) -> list[Check]:
        """Audit this configuration on these records: an in-memory run of its own, of which nothing is kept.

        See :func:`~dp2vae_fast.vae.audit.audit_run`. The checks' figures come from records without noise: they are for
        the curator. Noise is drawn from a seed, so that an audit can be repeated.

        Args:
            canaries: coins of the one-run bound on epsilon, which can certify little more than ln(canaries / 5).
        """
        config = self.config
        seed = 0 if config.privacy.seed is None else config.privacy.seed
        config = replace(config, privacy=replace(config.privacy, seed=seed))
        device, train, _, spec = self._prepared()
        budget = self._budget(len(train))
        with StopRequest() as stop, on_threads(config.performance.threads):

            def stage(records: ImageData) -> Stage:
                run = RunFolder(None, resume=False, config=config, data_sha256=records.sha256)
                keys = take_keys(run.ledger, config, records.sha256, device, None)
                return Stage(config, spec, records, budget, run, keys, device, stop, self.observer)

            return audit_run(stage(train), stage, canaries=canaries)

    def plan(self) -> Plan:
        """How stage 2 will take the decoder's per-sample gradients, layer by layer; nothing is trained or written."""
        config = self.config
        device, _, _, spec = self._prepared(least=1)
        decoder = build_decoder(spec).to(device)
        rows = 2 * config.model.iwae_samples  # made up; the plan does not depend on their number
        labels = torch.zeros(rows, dtype=torch.long, device=device) if spec.num_classes else None
        latents = torch.zeros(rows, spec.latent_dim, device=device)
        with on_threads(config.performance.threads):
            return plan_for(decoder, latents, labels, plan=plan_of(config), rows_per_record=config.model.iwae_samples)

    def evaluate(self, features: Sequence[str] = ("cnn",), samples: int = 5000, seed: int = 0) -> dict[str, Any]:
        """The content of ``metrics.json``, from ``samples`` synthetic images and the held-out real ones.

        See :func:`~dp2vae_fast.vae.evaluate.evaluate`. None of it is covered by the guarantee.
        """
        self._require_fitted()
        draw = sampler(self.decoder, seed)
        with on_threads(self.config.performance.threads):
            metrics = evaluate(draw, self.train_data, self.test_data, samples=samples, features=features, seed=seed)
        self.metrics = metrics
        return metrics

    def save(self, folder: str | Path) -> None:
        """Write what may be released into ``folder``, and beside it, in ``curator/``, what may not."""
        self._require_fitted()
        folder = Path(folder)
        resume = self.out is not None and folder.absolute() == self.out.absolute()
        check_output(folder, resume=resume, sources=data_sources(self.config))
        save_release(folder, self.decoder, self.report, self.metrics)
        save_for_curator(folder / "curator", self.train_data, self.history)

    def _prepared(self, least: int | None = None) -> tuple[torch.device, ImageData, ImageData, ModelSpec]:
        """Device, training and held-out records (:func:`load_split`), and what the decoder is built from."""
        config = self.config
        device = find_device(config.performance.device)
        train, test = load_split(config, self._images, least=least)
        return device, train, test, model_spec(config, train)

    def _budget(self, dataset_size: int) -> Budget:
        """The noise of all mechanisms, which the observer hears about: it can take half a minute."""
        target = self.config.privacy.target_epsilon
        if target is not None:
            self.observer(Progress(f"calibrating noise for epsilon {target:g}"))
        return plan_budget(self.config, dataset_size)

    def _require_fitted(self) -> None:
        if not hasattr(self, "report"):
            raise RunError("nothing has been trained yet: call fit() first")


def train_decoder(stage: Stage, pretrained: Pretrained) -> Decoder:
    """Stage 2: DP-SGD on the decoder alone, from the frozen encoder's latents."""
    decoder, ema_decay = pretrained.decoder, stage.config.optimization.ema_decay
    path = stage.run.curator_file("latents.f32")
    if path is None:
        latents = LatentCache.build(pretrained.encoder, stage.train, stage.device)
    else:
        latents = LatentCache.open(path, pretrained.encoder, stage.train, stage.device)
    mechanism = stage.run.ledger.find(stage.budget.step.name)
    if mechanism is None:  # a stage 1 that had to be repeated has spent more than was planned
        planned, spent = stage.budget.stage1.values(), stage.run.ledger.spent()
        as_planned = set(spent) == set(planned) and len(spent) == len(planned)
        mechanism = stage.budget.step if as_planned else _step_after(stage, spent)
    mechanism = replace(mechanism, steps=stage.config.privacy.steps)
    noise = stage.keys.generator("latents")
    parts: dict[str, Stateful] = {"latents": GeneratorState(noise)}
    average = None
    if ema_decay > 0:
        average = AveragedModel(decoder, multi_avg_fn=get_ema_multi_avg_fn(ema_decay))
        parts["average"] = average
    stage.run_dp_sgd(
        mechanism,
        decoder,
        stage.decoder_optimizer(decoder),
        decoder_losses(stage.train, latents, noise, stage.spec, stage.config.model),
        rows_per_record=stage.config.model.iwae_samples,
        parts=parts,
        on_step=lambda: None if average is None else average.update_parameters(decoder),
    )
    return decoder if average is None else cast(Decoder, average.module)


def _step_after(stage: Stage, spent: Sequence[Mechanism]) -> Mechanism:
    """DP-SGD on what a stage 1 that has drawn again left of the budget."""
    try:
        return calibrate_step(stage.config, len(stage.train), spent)
    except ConfigError:
        target = stage.config.privacy.target_epsilon
        raise RunError(
            f"stage 1 in {stage.run.path} was killed while it drew, and drew again, which leaves nothing of "
            f"target_epsilon = {target:g}: nothing of it has been released, so delete that folder and train anew"
        ) from None


def sampler(decoder: Decoder, seed: int) -> Callable[[int], tuple[Tensor, Tensor | None]]:
    """``n -> (uint8 images, labels)``: samples of the decoder, the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> tuple[Tensor, Tensor | None]:
        labels = decoder.draw_labels(n, generator=generator) if decoder.spec.num_classes else None
        return to_pixels(decoder.sample(n, labels, generator=generator)), labels

    return draw


def load_split(
    config: Config, images: ImageData | None = None, *, least: int | None = None
) -> tuple[ImageData, ImageData]:
    """Training and held-out records of a configuration; raises ``DataError`` for what cannot be trained on, and for
    fewer records than ``least``, the expected batch size unless given."""
    data = config.data
    if images is None:
        whole = load_images(data.data, image_size=data.image_size, channels=data.channels)
    else:
        whole = images
        _check_shape(whole, data.image_size, data.channels)
    train, test = train_test_split(whole, data.test_fraction, data.split_seed)
    least = config.privacy.expected_batch_size if least is None else least
    check_trainable(train, batch_size=least, conditional=data.conditional)
    return train, test


def _check_shape(images: ImageData, image_size: int | None, channels: int | None) -> None:
    """Images in memory are trained on as they are: settings must not say otherwise."""
    there = images.image_shape
    if there != (channels or there[0], image_size or there[1], image_size or there[2]):
        raise DataError(
            f"the images given are {list(there)}, the settings ask for image_size = {image_size or 'any'} and channels "
            f"= {channels or 'any'}: change the images, or set image_size = {there[1]} and channels = {there[0]}"
        )


def model_spec(config: Config, train: ImageData) -> ModelSpec:
    """What the decoder for these records is built from."""
    model = config.model
    classes = train.num_classes if config.data.conditional else 0
    return ModelSpec(model.preset, train.image_shape, model.latent_dim, classes, model.width, model.likelihood)


def find_device(name: str) -> torch.device:
    """``auto`` is the GPU where there is one; raises ``ConfigError`` for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).item()  # what cannot be read back ("meta") cannot be trained on
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f'device = "{name}" cannot be used ({str(error).splitlines()[0]}): try auto or cpu') from None


def _doubts(config: Config, dataset_size: int) -> list[str]:
    """What the user should hear, and readers of the report too."""
    privacy, doubts = config.privacy, []
    if privacy.target_delta >= 1 / dataset_size:
        doubts.append(
            f"delta = {privacy.target_delta:g} is not below one over the number of records ({dataset_size}): such a "
            "guarantee allows a record to be published outright"
        )
    exceeded = privacy.steps * 2.0**-64  # see engine.precision.records_at_most
    if privacy.target_delta < 1000 * exceeded:
        doubts.append(
            f"delta = {privacy.target_delta:g} is hardly above {exceeded:.1g}, the probability that a draw has more "
            "records than its rounding is counted for, which adds to it: choose a larger one"
        )
    if privacy.encoder == "private":
        doubts.append("encoder = private gives no end-to-end guarantee: choose linear, dp or public for one")
    if privacy.noise_multiplier == 0:
        doubts.append("noise_multiplier = 0: nothing about this run is private")
    return doubts
