"""The audit of a whole run: what stage 1 lets a record do, and DP-SGD of stage 2 on the encoder it has made.

``encoder shift``: everything that is not an accounted mechanism is fitted twice, with and without a canary among the
records, while the outputs of accounted mechanisms are held fixed; the clipped sum of a batch without the canary must
then be the same to the bit. ``stage 1 noise`` and ``stage 1 contribution``: the mechanisms that stage 1 draws in one
piece use the noise that was planned, and the canary moves them by no more than that covers. The other checks are those
of :mod:`dp2vae_fast.engine.audit`, on the loss, the latents and the step that training uses.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..config import ConfigError
from ..engine.audit import Check, audit_subject
from ..engine.audit.released import Released, Subject
from ..engine.sampling import PoissonBatches
from ..runs.checkpoint import RunError, write_json
from .data import ImageData, make_image_data
from .encoder import Pretrained, pretrain
from .held import Held
from .latents import LatentCache, decoder_losses
from .loop import privatize, step_on
from .moments import thumbnail_shape
from .report import write_report
from .stage import Stage, plan_of

CANARIES, LEAST_CANARIES = 300, 8
_ORDINARY = 24
_BATCH = 64  # records of the batch whose clipped sum must not shift
_HOSTILE_LATENTS = (0.0, 1e-30, 1e4, -1e4, 1e30, float("inf"), float("nan"))


def audit_run(stage: Stage, make_stage: Callable[[ImageData], Stage], *, canaries: int = CANARIES) -> list[Check]:
    """All checks of a run's configuration, on its records. Nothing is written.

    Args:
        stage: the circumstances of an in-memory run with a seed, so that coins can be held fixed.
        make_stage: the same for other records, under the same seed and settings.
        canaries: coins of the one-run bound, at least :data:`LEAST_CANARIES`.

    Mechanisms of stage 1 are drawn once, and none of it is counted anywhere: whatever an audit prints or returns comes
    from records without a guarantee and stays with the curator.
    """
    if canaries < LEAST_CANARIES:
        raise ConfigError(f"canaries = {canaries}: expected at least {LEAST_CANARIES}")
    held = Held()
    one = held.stage(stage)
    pretrained = pretrain(one)
    other = held.stage(replace(make_stage(with_canary(stage.train)), budget=stage.budget))
    checks = [encoder_shift(one, pretrained, pretrain(other))]
    return [
        *checks,
        *held.checks(),
        *audit_subject(stage_2(one, pretrained, canaries=canaries), seed=stage.config.privacy.seed or 0),
    ]


# Stage 1 -----------------------------------------------------------------------------------------------------------


def with_canary(data: ImageData) -> ImageData:
    """``data`` and one more record, a chequerboard of the first record's class.

    A square is a pixel of the thumbnails that moments are taken of: smaller ones would be grey there.
    """
    height, width = data.image_shape[1:]
    rows, columns = thumbnail_shape(data.image_shape)[1:]
    squares = (torch.arange(height)[:, None] * rows // height + torch.arange(width) * columns // width) % 2 * 255
    canary = squares.to(torch.uint8).expand(1, *data.image_shape)
    labels = None if data.labels is None else torch.cat((data.labels, data.labels[:1]))
    return _as_data(data, torch.cat((data.images, canary)), labels)


def encoder_shift(stage: Stage, one: Pretrained, other: Pretrained) -> Check:
    """``encoder shift``: does a canary move the clipped sum of a batch that it is not in?

    Args:
        one, other: stage 1 without and with the canary among its records, accounted outputs the same.
    """
    batch = torch.arange(min(_BATCH, len(stage.train)))
    sums = []
    for pretrained, beside in ((one, None), (other, with_canary(stage.train).images[-1:])):
        released = Released(stage_2(stage, pretrained, canaries=1, beside=beside))
        sums.append(released(batch) / released.sensitivity())
    shift = float((sums[0] - sums[1]).norm())
    weights = zip(one.decoder.state_dict().values(), other.decoder.state_dict().values(), strict=True)
    moved = "" if all(torch.equal(a, b) for a, b in weights) else "; the first decoder shifts too"
    return Check(
        "encoder shift",
        shift if not moved else max(shift, torch.finfo(torch.float32).tiny),
        0.0,
        f"change of the clipped sum of {len(batch)} records, in sensitivities, as a canary that is not among them is "
        f"added to the training records{moved}",
    )


# Stage 2 -----------------------------------------------------------------------------------------------------------


def stage_2(stage: Stage, pretrained: Pretrained, *, canaries: int, beside: Tensor | None = None) -> Subject:
    """DP-SGD of stage 2 as an audit's subject: the decoder, loss, step and sampler of training.

    The pool of records: training records, images and latents that are extreme, and canaries of random black and white
    pixels. Posteriors have next to no variance, so that a record is the same wherever it stands in a batch.
    ``beside``, an image ``[1, C, H, W]``, stands for the duplicate of the first record among them where it is given.
    """
    config, privacy, train = stage.config, stage.config.privacy, stage.train
    ordinary = min(max(_ORDINARY, _BATCH), len(train))
    images, labels = train.images[:ordinary], None if train.labels is None else train.labels[:ordinary]
    generator = torch.Generator().manual_seed(privacy.seed or 0)
    crafted = [torch.full_like(images[:1], 0), torch.full_like(images[:1], 255), _dot(images[:1])]
    crafted += [images[:1] if beside is None else beside]
    crafted += [images[:1]] * len(_HOSTILE_LATENTS)  # their latents are made up
    black_and_white = 255 * torch.randint(2, (canaries, *train.image_shape), generator=generator, dtype=torch.uint8)
    if labels is not None:
        classes = labels[torch.randint(len(labels), (canaries,), generator=generator)]
        labels = torch.cat((labels, labels[:1].expand(len(crafted)), classes))
    pool = _as_data(train, torch.cat((images, *crafted, black_and_white)), labels)
    latents = LatentCache.build(pretrained.encoder, pool, stage.device)
    first_latents = ordinary + len(crafted) - len(_HOSTILE_LATENTS)
    for row, value in enumerate(_HOSTILE_LATENTS, first_latents):
        latents.values[row, 0] = value
    latents.values[:, 1] = -200.0 if config.model.iwae_samples == 1 else -20.0

    decoder = copy.deepcopy(pretrained.decoder).train()
    step, keystream = stage.budget.step, stage.keys.keystream("audit")
    optimizer, dp = stage.decoder_optimizer(decoder), stage.step_mechanism(step, config.model.iwae_samples)
    engine, plan = config.performance.engine, plan_of(config)
    private_module, private_optimizer = privatize(decoder, optimizer, dp, keystream, engine, plan)
    private_module.train()
    batches = PoissonBatches(
        keystream.stream("audit/coins"),
        dataset_size=len(train),
        sample_rate=dp.sample_rate,
        physical_batch_size=config.performance.physical_batch_size,
    )
    losses = decoder_losses(pool, latents, torch.Generator().manual_seed(0), stage.spec, config.model)
    hostile = torch.arange(ordinary, ordinary + len(crafted))

    def take_step(indices: Tensor) -> None:
        stage.stop.obey()
        step_on(private_module, private_optimizer, losses, batches.split(indices), stage.device)

    return Subject(
        private_optimizer,
        take_step,
        ordinary=torch.arange(min(_ORDINARY, ordinary)),
        hostile=hostile,
        canaries=torch.arange(int(hostile[-1]) + 1, len(pool)),
        draws=_drawn(batches),
        dataset_size=len(train),
        sample_rate=step.sample_rate,
        noise_multiplier=step.noise_multiplier,
        delta=privacy.target_delta,
    )


def _drawn(batches: PoissonBatches) -> Iterator[list[int]]:
    for draw in batches:
        yield list(itertools.chain.from_iterable(part.indices[part.mask].tolist() for part in draw))


def _dot(image: Tensor) -> Tensor:
    """Black but for one white pixel."""
    dot = torch.zeros_like(image)
    dot.view(-1)[0] = 255
    return dot


def _as_data(like: ImageData, images: Tensor, labels: Tensor | None) -> ImageData:
    classes = like.num_classes if labels is not None else None
    return make_image_data(images, labels, name=like.name, num_classes=classes, class_names=like.class_names)


# What is left of it ------------------------------------------------------------------------------------------------


def verdict(checks: Sequence[Check]) -> str:
    """One sentence for the report, without a figure."""
    failed = [check.name for check in checks if not check.passed]
    idle = [check.name for check in checks if not check.can_fail]
    passed = [check.name for check in checks if check.passed and check.can_fail]
    said = f"failed: {', '.join(failed)}" if failed else f"passed: {', '.join(passed)}"
    return said + (f"; could not fail: {', '.join(idle)}" if idle else "")


def write_audit(folder: Path, checks: Sequence[Check]) -> None:
    """Write ``curator/audit.json`` of a run, and into its report, where it has one, that the audit was run."""
    write_json(
        folder / "curator" / "audit.json",
        {
            "passed": all(check.passed for check in checks),
            "verdict": verdict(checks),
            "note": "figures come from real records without noise: they are for the curator",
            "checks": [check.to_dict() for check in checks],
        },
    )
    if (folder / "privacy.json").exists():
        try:
            report = json.loads((folder / "privacy.json").read_text(encoding="utf-8"))
            write_report(report | {"audit": verdict(checks)}, folder)
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{folder / 'privacy.json'} cannot be read as a report: train --resume writes it anew, with the verdict"
            ) from error
