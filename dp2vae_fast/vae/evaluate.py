"""How good are samples? Accuracy of classifiers trained on them, and their Fréchet distance to real images.

Every figure here is computed from records without noise: from held-out ones, which no guarantee speaks of, or
from the training records themselves. None of them is private, and the result says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .classifiers import DIFFERENT, EvaluationError, check_images, cnn_accuracy, logreg_accuracy
from .data import ImageData
from .fid import fid, load_feature_network

Sampler = Callable[[int], tuple[Tensor, Tensor | None]]
"""``sample(n) -> (images, labels)``: uint8 [n, C, H, W], and int64 [n] or None (an unconditional decoder)."""

FIGURES = (
    "cnn_accuracy_synthetic",
    "cnn_accuracy_real",
    "logreg_accuracy_synthetic",
    "logreg_accuracy_real",
    "fid",
    "fid_real",
)
NOT_PRIVATE = (
    "none of these figures is covered by the privacy guarantee: they were computed without noise from training "
    "records or from held-out ones, so they are for the curator unless these records may be disclosed"
)


def evaluate(
    sample: Sampler,
    train: ImageData,
    test: ImageData,
    *,
    samples: int = 5000,
    features: Sequence[str] = ("cnn",),
    seed: int = 0,
) -> dict[str, Any]:
    """The content of ``metrics.json``: how good samples are, and real images measured the same way beside them.

    Both sides are judged by ``samples`` images; where there are fewer training records, by all of these.

    - ``cnn_accuracy_*``, ``logreg_accuracy_*``: accuracy on ``test`` after training on * = synthetic or real;
    - ``fid``: feature network -> distance of the samples from training records; ``fid_real``: of ``test`` from
      the same, which gives the scale (mind the counts);
    - ``samples``, ``train_records``, ``test_records``: how many images were looked at;
    - ``missing``: figure -> why it is null; ``warnings``: distances from too few images;
    - ``private``: figure -> whether the guarantee covers it, false for all of them; ``note`` says why.

    Args:
        sample: see :data:`Sampler`; called once.
        train: the records that the decoder was trained on; ``test``: those held out, possibly none.
        features: feature networks, see :func:`load_feature_network`.

    Raises :class:`EvaluationError`, before anything is sampled where possible.
    """
    if samples < 2 or len(train) < 2:
        raise EvaluationError(f"samples = {samples}, {len(train)} training records: expected at least 2 of each")
    if test.image_shape != train.image_shape:
        raise EvaluationError(f"{test.name}: {DIFFERENT.format(list(test.image_shape), list(train.image_shape))}")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    real = train.subset(order[:samples].sort().values)
    networks = [load_feature_network(wanted, real, seed=seed) for wanted in features]
    if len({network.name for network in networks}) < len(networks):
        raise EvaluationError(f"two of the feature networks {list(features)} have one name: give each once")
    images, labels = _draw(sample, samples, train)

    figures: dict[str, Any] = dict.fromkeys(FIGURES)
    missing: dict[str, str] = {}
    for side, pixels, classes in (("synthetic", images, labels), ("real", real.images, real.labels)):
        cnn, logreg = f"cnn_accuracy_{side}", f"logreg_accuracy_{side}"
        if classes is None or test.labels is None or len(test) == 0:
            missing[cnn] = missing[logreg] = _why_no_accuracy(train, test)
            continue
        figures[cnn] = cnn_accuracy(pixels, classes, test, num_classes=train.num_classes, seed=seed)
        figures[logreg] = logreg_accuracy(pixels, classes, test, num_classes=train.num_classes)
    figures["fid"] = {network.name: fid(real.images, images, network) for network in networks}
    if len(test) >= 2:
        figures["fid_real"] = {network.name: fid(real.images, test.images, network) for network in networks}
    else:
        missing["fid_real"] = "fewer than two records were held out"
    return {
        **figures,
        "samples": samples,
        "train_records": len(real),
        "test_records": len(test),
        "missing": missing,
        "warnings": [
            f"{figure}: {count} images are too few for the {network.features} features of {network.name}"
            for figure, count in (("fid", min(samples, len(real))), ("fid_real", min(len(test), len(real))))
            for network in networks
            if figures[figure] is not None and count <= network.features
        ],
        "private": dict.fromkeys(FIGURES, False),
        "note": NOT_PRIVATE,
    }


def _why_no_accuracy(train: ImageData, test: ImageData) -> str:
    if train.labels is None or test.labels is None:
        return "the data have no labels"
    return "the samples have no labels" if len(test) else "no records were held out to test on"


def _draw(sample: Sampler, samples: int, train: ImageData) -> tuple[Tensor, Tensor | None]:
    images, labels = sample(samples)
    if images.shape != (samples, *train.image_shape):
        expected = [samples, *train.image_shape]
        raise EvaluationError(f"samples of shape {list(images.shape)}: expected {expected}, as {train.name} has")
    check_images(images, "synthetic")
    return images.cpu(), None if labels is None else labels.cpu()
