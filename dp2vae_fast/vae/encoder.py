"""Stage 1: the encoder modes, what each of them spends, and what may be claimed for a decoder trained on it.

A mode returns a frozen encoder and the decoder that stage 2 starts from. What it spends goes into the ledger as it is
spent. An encoder that was fitted to the records without noise voids the guarantee of everything trained on its
latents, however secret it stays: the gradient of every record then depends on all of them. So ``stage1.pt`` says, as
its ``lineage``, which records an encoder may know: those of its run, and all that a public source was derived from.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..engine.keystream import Stream
from ..runs.checkpoint import RunError, load_checkpoint
from .data import ImageData, load_images, record_digests, to_unit
from .loop import RecordLosses, make_optimizer
from .losses import negative_elbo, reconstruction
from .models import VAE, Decoder, Encoder, ModelSpec, build_decoder, build_encoder
from .moments import ClassMeans, LinearModel, class_means, covariance, enlarge, thumbnail_shape
from .stage import GeneratorState, Stage

_WARM_START_BATCH = 128

M = TypeVar("M", Encoder, Decoder)

Draw = Callable[[int, torch.Generator], tuple[Tensor, Tensor | None, Tensor]]
"""``(n, generator) -> (latents, labels, images)``: free training pairs for a decoder, made from released quantities."""


@dataclass(frozen=True)
class Pretrained:
    """What stage 1 hands over: a frozen encoder ``(images, labels) -> (mean, log_variance)``, and a first decoder.

    ``lineage``: digests of the records that a public source was derived from; they end in ``stage1.pt``.
    """

    encoder: nn.Module
    decoder: Decoder
    lineage: frozenset[str] = frozenset()


@dataclass(frozen=True)
class EncoderMode:
    """One value of ``encoder=``. ``statement`` is the sentence that the report must print."""

    fit: Callable[[Stage], Pretrained]
    end_to_end: bool
    statement: str


def pretrain(stage: Stage) -> Pretrained:
    """Run stage 1 as the configuration says, or take it from the run folder where it is finished."""
    saved = stage.run.load("stage1.pt")
    if saved is not None:
        for mechanism in stage.budget.stage1.values():
            stage.require_spent("stage1.pt", mechanism.name, mechanism.steps)
        decoder = build_decoder(stage.spec)
        encoder = _new_linear(stage) if stage.config.privacy.encoder == "linear" else build_encoder(stage.spec)
        decoder.load_state_dict(saved["decoder"])
        encoder.load_state_dict(saved["encoder"])
        stage.history[:] = saved["history"]
        return _frozen(stage, encoder, decoder)
    pretrained = MODES[stage.config.privacy.encoder].fit(stage)
    stage.run.save(
        "stage1.pt",
        {
            "key": stage.keys.number,
            "spec": str(stage.spec),
            "lineage": sorted(pretrained.lineage | record_digests(stage.train)),
            "encoder": pretrained.encoder.state_dict(),
            "decoder": pretrained.decoder.state_dict(),
            "history": stage.history,
        },
    )
    return _frozen(stage, pretrained.encoder, pretrained.decoder)


# The modes -------------------------------------------------------------------------------------------------------


def _fit_linear(stage: Stage) -> Pretrained:
    """DP class means and DP covariance; the encoder is probabilistic PCA, the decoder learns its inverse for free."""
    means = _class_means(stage)
    mechanism = stage.budget.stage1["covariance"]

    def compute(stream: Stream) -> dict[str, Tensor]:
        radius = _radius(stage, stage.config.privacy.residual_clip)
        noise = mechanism.noise_multiplier
        train, labels = stage.train, stage.labels
        matrix = covariance(train.images, labels, means, radius=radius, noise_multiplier=noise, stream=stream)
        return {"covariance": matrix}

    model = _new_linear(stage).set_moments(means, stage.release(mechanism, compute)["covariance"])
    return Pretrained(model, _warm_started(stage, means, model.draw))


def _fit_dp(stage: Stage) -> Pretrained:
    """Encoder and decoder trained together by DP-SGD, from a decoder that knows the DP class means."""
    vae = VAE(_fresh(stage, build_encoder), _started_at_means(stage))
    mechanism, optimization = stage.budget.stage1["encoder"], stage.config.optimization
    optimizer = make_optimizer("adam", vae, optimization.pretrain_learning_rate)
    noise = stage.keys.generator(f"{mechanism.name}/latents")

    losses = _elbo(stage, stage.train, noise)
    stage.run_dp_sgd(mechanism, vae, optimizer, losses, parts={"latents": GeneratorState(noise)})
    return Pretrained(vae.encoder, vae.decoder)


def _fit_public(stage: Stage) -> Pretrained:
    """An encoder from a checkpoint or a public data set that the user names; the decoder starts at the DP means."""
    source = os.path.expanduser(stage.config.privacy.public_encoder or "")
    if source.endswith(".pt"):
        encoder, lineage = _read_encoder(stage, Path(source))
    else:
        _refuse_run_folder(Path(source).resolve())
        data = load_images(source, image_size=stage.config.data.image_size, channels=stage.spec.image_shape[0])
        lineage = frozenset(record_digests(data))
        _require_public(stage, lineage, source)
        if data.image_shape != stage.spec.image_shape or (
            stage.spec.num_classes and data.num_classes != stage.spec.num_classes
        ):
            raise RunError(
                f"public_encoder {source} has images {list(data.image_shape)} and {data.num_classes} classes, the "
                f"model needs {list(stage.spec.image_shape)} and {stage.spec.num_classes}: set image_size and "
                "channels, or train with conditional = false"
            )
        encoder = _fit_without_noise(stage, data)
    return Pretrained(encoder, _started_at_means(stage), lineage)


def _fit_private(stage: Stage) -> Pretrained:
    """Noise-free pre-training on the private records. The decoder of stage 2 starts from scratch."""
    return Pretrained(_fit_without_noise(stage, stage.train), _fresh(stage, build_decoder))


_ALL_COMPOSED = (
    "all mechanisms of both stages are composed, so the guarantee holds end to end for every training record"
)

MODES: dict[str, EncoderMode] = {
    "linear": EncoderMode(
        _fit_linear,
        True,
        f"the encoder is a fixed linear map made from differentially private class means and covariance; "
        f"{_ALL_COMPOSED}",
    ),
    "dp": EncoderMode(_fit_dp, True, f"the encoder was trained by DP-SGD with a slice of the budget; {_ALL_COMPOSED}"),
    "public": EncoderMode(
        _fit_public,
        True,
        f"the encoder comes from data that the user declared public, and nothing is guaranteed for those; "
        f"{_ALL_COMPOSED}",
    ),
    "private": EncoderMode(
        _fit_private,
        False,
        "decoder updates are (ε,δ)-DP given a fixed encoder; the encoder was fitted without noise on the same "
        "records, so no record-level guarantee holds end to end",
    ),
}


# What the modes share --------------------------------------------------------------------------------------------


def _class_means(stage: Stage) -> ClassMeans:
    privacy, mechanism = stage.config.privacy, stage.budget.stage1["means"]

    def compute(stream: Stream) -> dict[str, Tensor]:
        means = class_means(
            stage.train.images,
            stage.labels,
            stage.spec.num_classes,
            center=privacy.pixel_center,
            radius=_radius(stage, privacy.mean_clip),
            noise_multiplier=mechanism.noise_multiplier,
            stream=stream,
        )
        return {"means": means.means, "counts": means.counts}

    return ClassMeans(**stage.release(mechanism, compute))


def _radius(stage: Stage, clip: float) -> float:
    """A root mean square over the pixels of a thumbnail as a Euclidean norm."""
    return clip * math.sqrt(math.prod(thumbnail_shape(stage.spec.image_shape)))


def _new_linear(stage: Stage) -> LinearModel:
    return LinearModel(stage.spec.image_shape, stage.spec.latent_dim, stage.spec.num_classes)


def _started_at_means(stage: Stage) -> Decoder:
    """A decoder that gives the DP class means whatever the latent."""
    means, shape = _class_means(stage), stage.spec.image_shape
    pictures = enlarge(means.means, thumbnail_shape(shape), shape)

    def draw(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None, Tensor]:
        z = torch.randn(n, stage.spec.latent_dim, generator=generator)
        classes = torch.multinomial(means.label_weights, n, replacement=True, generator=generator)
        return z, classes if stage.spec.num_classes else None, pictures[classes]

    return _warm_started(stage, means, draw)


def _warm_started(stage: Stage, means: ClassMeans, draw: Draw) -> Decoder:
    """A decoder fitted to free draws: post-processing of what was released already."""
    decoder = _fresh(stage, build_decoder)
    decoder.label_weights.copy_(means.label_weights)
    generator = stage.keys.generator("warm start")
    optimizer = make_optimizer("adam", decoder, stage.config.optimization.pretrain_learning_rate)

    def loss() -> Tensor:
        z, labels, images = draw(_WARM_START_BATCH, generator)
        output = decoder(z.to(stage.device), None if labels is None else labels.to(stage.device))
        return reconstruction(output, images.to(stage.device), stage.spec.likelihood).mean()

    parts = {"decoder": decoder, "draws": GeneratorState(generator)}
    stage.run_ordinary("warm start", stage.config.optimization.warm_start_steps, optimizer, loss, parts=parts)
    return decoder


def _fit_without_noise(stage: Stage, data: ImageData) -> Encoder:
    """The encoder of a VAE trained in the ordinary way: as private as ``data`` themselves, which is not at all."""
    vae = VAE(_fresh(stage, build_encoder), _fresh(stage, build_decoder))
    optimizer = make_optimizer("adam", vae, stage.config.optimization.pretrain_learning_rate)
    noise = stage.keys.generator("pre-training")
    size = min(stage.config.privacy.expected_batch_size, len(data))

    losses = _elbo(stage, data, noise)

    def loss() -> Tensor:
        fetched = losses.fetch(torch.randint(len(data), (size,), generator=noise))
        return losses.compute(vae, *(x.to(stage.device) for x in fetched)).mean()

    parts = {"vae": vae, "draws": GeneratorState(noise), "data": _Unchanged(data)}
    stage.run_ordinary("pre-training", stage.config.privacy.pretrain_steps, optimizer, loss, parts=parts)
    return vae.encoder


class _Unchanged:
    """A part of checkpoints by which training goes on with the data that it began with, and with no others.

    Else an encoder would know records that its lineage does not name.
    """

    def __init__(self, data: ImageData) -> None:
        self.data = data

    def state_dict(self) -> dict[str, str]:
        return {"sha256": self.data.sha256}

    def load_state_dict(self, state: dict[str, str], /) -> None:
        if state["sha256"] != self.data.sha256:
            raise RunError(
                f"{self.data.name} does not hold the images that pre-training began with: put them back, or train "
                "into a new folder"
            )


def _elbo(stage: Stage, data: ImageData, noise: torch.Generator) -> RecordLosses:
    """Negative ELBO of each record of ``data``."""
    model = stage.config.model

    def fetch(indices: Tensor) -> tuple[Tensor, ...]:
        images, labels = data.rows(indices)
        eps = torch.randn(len(indices), stage.spec.latent_dim, generator=noise)
        return images, eps, *(() if labels is None or not stage.spec.num_classes else (labels,))

    def compute(vae: nn.Module, images: Tensor, eps: Tensor, labels: Tensor | None = None) -> Tensor:
        images = to_unit(images)
        output, mean, log_variance = vae(images, labels, eps)
        return negative_elbo(output, images, mean, log_variance, likelihood=model.likelihood, beta=model.beta)

    return RecordLosses(fetch, compute)


def _fresh(stage: Stage, build: Callable[[ModelSpec], M]) -> M:
    """A new model on the stage's device, initialised from the run's own randomness."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stage.keys.generator(f"initial {build.__name__}").initial_seed())
        return build(stage.spec).to(stage.device)


def _read_encoder(stage: Stage, path: Path) -> tuple[Encoder, frozenset[str]]:
    """The encoder in a ``stage1.pt`` of another run, and its lineage."""
    saved = load_checkpoint(path)
    if saved is None or not {"spec", "encoder"} <= set(saved):
        raise RunError(f"public_encoder {path} is no stage1.pt of a run's curator folder: name one, or a data set")
    if not saved.get("lineage"):
        raise RunError(
            f"public_encoder {path} does not say which records it was derived from, as an older version wrote it: "
            "fit it anew, or name a data set"
        )
    lineage = frozenset(saved["lineage"])
    _require_public(stage, lineage, str(path))
    encoder = build_encoder(stage.spec)
    try:
        encoder.load_state_dict(saved["encoder"])
    except RuntimeError:
        raise RunError(f"public_encoder {path} was made for {saved['spec']}: use the same model settings") from None
    return encoder, lineage


def _require_public(stage: Stage, lineage: frozenset[str], source: str) -> None:
    """Refuse a source that holds, or was derived from, an image of the training records, whichever part it is."""
    if lineage & record_digests(stage.train):
        raise RunError(
            f"public_encoder {source} holds training records themselves, or was derived from them, which are not "
            'public: use encoder = "dp", or private without an end-to-end guarantee'
        )


def _refuse_run_folder(source: Path) -> None:
    """Refuse the pictures in the folder of a run, whose lineage is unknown; that of ``curator/stage1.pt`` is not."""
    for folder in (source, *source.parents):
        if (folder / "curator" / "run.json").exists():
            raise RunError(
                f"public_encoder {source} lies in {folder}, which holds a run: name its curator/stage1.pt, or a data "
                "set elsewhere"
            )


def _frozen(stage: Stage, encoder: nn.Module, decoder: Decoder) -> Pretrained:
    return Pretrained(encoder.to(stage.device).eval().requires_grad_(False), decoder.to(stage.device))
