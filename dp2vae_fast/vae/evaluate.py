"""How good are samples? Accuracy of classifiers trained on them, and their Fréchet distance to real images.

Every figure here is computed from records without noise: from held-out ones, which no guarantee speaks of, or
from the training records themselves. None of them is private, and the result says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.image.fid import FrechetInceptionDistance

from .data import ImageData, to_unit

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
KINDS = 'use "cnn", a TorchScript file, or "inception:FILE" with weights of torch-fidelity\'s InceptionV3'

_DIFFERENT = "test images {} but training images {}: read both with the same image_size and channels"
_FEATURES = 64
_STEPS, _BATCH = 600, 64
_LEARNING_RATE, _WEIGHT_DECAY = 3e-3, 1e-2
_LOGREG_ITERATIONS = 200
_CHUNK = 64


class EvaluationError(ValueError):
    """An evaluation that cannot be made; the message is one line that names the thing and the way out."""


class SmallCNN(nn.Module):
    """Three convolutions for images of any size: uint8 [N, C, H, W] -> logits [N, num_classes].

    ``features`` is everything but the last layer: uint8 [N, C, H, W] -> float32 [N, 64]. Images of 64 pixels a
    side and more enter through a stride that leaves 32 to 63.
    """

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = image_shape
        stride = max(1, min(height, width) // 32)
        self.features = nn.Sequential(
            _ToUnit(),
            nn.Conv2d(channels, 32, 2 * stride + 1, stride=stride, padding=stride),
            nn.ReLU(),
            nn.MaxPool2d(2, ceil_mode=True),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2, ceil_mode=True),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * 64, _FEATURES),
            nn.ReLU(),
        )
        self.head = nn.Linear(_FEATURES, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


class _ToUnit(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return to_unit(images)


class _ToColour(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.expand(-1, 3, -1, -1).contiguous()


def cnn_accuracy(
    train_images: Tensor, train_labels: Tensor, test: ImageData, *, num_classes: int, seed: int = 0
) -> float:
    """Share of ``test`` that a :class:`SmallCNN` classifies correctly, trained on the given images.

    Whatever it is trained on, it takes the same number of steps on batches of the same size (600 of 64, drawn
    with replacement), without augmentation, so that real and synthetic images are compared on equal terms. The
    same seed gives the same value on the same machine and number of threads; the global random state is untouched.

    Args:
        train_images: uint8 [N, C, H, W], real or synthetic.
        train_labels: int64 [N] in 0 .. num_classes - 1.
        test: labelled real images of the same size, held out from all training.

    Raises :class:`EvaluationError`: wrong dtype or shape, labels out of range, nothing to train or to test on.
    """
    truth = _check_labelled(train_images, train_labels, test, num_classes)
    cnn = _fit_cnn(train_images, train_labels, num_classes, seed)
    with torch.inference_mode():
        predicted = torch.cat([cnn(chunk).argmax(dim=1) for chunk in test.images.split(_CHUNK)])
    return float((predicted == truth).double().mean())


def logreg_accuracy(train_images: Tensor, train_labels: Tensor, test: ImageData, *, num_classes: int) -> float:
    """Share of ``test`` that multinomial logistic regression on the pixels classifies correctly.

    scikit-learn's ``LogisticRegression`` with at most 200 iterations. Arguments and errors as for
    :func:`cnn_accuracy`; nothing is random.

    Edge case: training labels of one class only; then that class is always predicted.
    """
    truth = _check_labelled(train_images, train_labels, test, num_classes)
    if bool((train_labels == train_labels[0]).all()):
        return float((truth == train_labels[0]).double().mean())
    model = LogisticRegression(max_iter=_LOGREG_ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(to_unit(train_images).flatten(1).numpy(), train_labels.numpy())
    return float(model.score(to_unit(test.images).flatten(1).numpy(), truth.numpy()))


def _fit_cnn(images: Tensor, labels: Tensor, num_classes: int, seed: int) -> SmallCNN:
    channels, height, width = images.shape[1:]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        cnn = SmallCNN((channels, height, width), num_classes)
    batches = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(cnn.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=_STEPS)
    for _ in range(_STEPS):
        batch = torch.randint(len(images), (_BATCH,), generator=batches)
        optimizer.zero_grad()
        cross_entropy(cnn(images[batch]), labels[batch]).backward()
        optimizer.step()
        schedule.step()
    return cnn.eval().requires_grad_(False)


@dataclass(frozen=True)
class FeatureNetwork:
    """What a Fréchet distance is measured with.

    Args:
        name: how the figure is labelled. Distances under different names cannot be compared.
        module: uint8 [N, C, H, W], of the size of the data -> floats [N, features].
        features: dimension of the feature space.
    """

    name: str
    module: nn.Module
    features: int


def load_feature_network(wanted: str, train: ImageData, *, seed: int = 0) -> FeatureNetwork:
    """The feature network that the user names; nothing is ever downloaded.

    ``"cnn"``: a :class:`SmallCNN` fitted to the labels of ``train`` or, where there are none, to tell which of
        the four flips an image has undergone. Its name says so, lest its distances be taken for Inception's.
    A path: a TorchScript file whose ``forward`` takes uint8 [N, 3, H, W] in 0 .. 255, of the size of the data
        (resizing and normalising are its own business), and returns [N, F]. Load only files that you trust.
    ``"inception:FILE"``: torch-fidelity's InceptionV3 as torchmetrics runs it (299x299, F = 2048), with the weights
        in FILE.

    The last two see grey images as RGB. Raises :class:`EvaluationError`: unknown name, missing or damaged
    file, missing package, a network that does not return [N, F].
    """
    if wanted == "cnn":
        return _fit_feature_cnn(train, seed)
    kind, _, file = wanted.partition(":")
    path = Path(file if kind == "inception" else wanted).expanduser()
    if not path.is_file():
        raise EvaluationError(f'there is no file for the feature network "{wanted}": {KINDS}')
    if kind == "inception":
        name, network = f"inception v3 {path.name}", _load_inception(path)
    else:
        name, network = f"torchscript {path.name}", _load_torchscript(path)
    module = nn.Sequential(_ToColour(), network).eval()
    return FeatureNetwork(name, module, _feature_dimension(module, name, train.image_shape))


def require_feature_network(wanted: str) -> tuple[str, Path] | None:
    """("inception" or "torchscript", its file), or None for "cnn".

    Raises :class:`EvaluationError` where there is no such network or file: before hours of training, if asked early.
    """
    if wanted == "cnn":
        return None
    kind, _, file = wanted.partition(":")
    path = Path(file if kind == "inception" else wanted).expanduser()
    if not path.is_file():
        what = "no file with Inception weights" if kind == "inception" else "no feature network or file"
        raise EvaluationError(f'{what} called "{path}": {KINDS}')
    return ("inception" if kind == "inception" else "torchscript"), path


def _fit_feature_cnn(train: ImageData, seed: int) -> FeatureNetwork:
    name = "cnn fitted on the real training data"
    images, labels, classes = train.images, train.labels, train.num_classes
    if labels is None:
        name += " to recognize flips"
        images = torch.cat([images, images.flip(-1), images.flip(-2), images.flip(-1, -2)])
        labels, classes = torch.arange(4).repeat_interleave(len(train)), 4
    return FeatureNetwork(name, _fit_cnn(images, labels, classes, seed).features, _FEATURES)


def _load_torchscript(path: Path) -> nn.Module:
    try:
        return torch.jit.load(str(path), map_location="cpu")
    except Exception as error:  # a damaged archive makes the reader raise almost anything
        raise EvaluationError(f"{path} is not a TorchScript file: write the network with torch.jit.save") from error


def _load_inception(path: Path) -> nn.Module:
    try:
        with torch.random.fork_rng(devices=[]):
            return FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=str(path)).inception
    except ModuleNotFoundError as error:
        raise EvaluationError('"inception:FILE" needs torch-fidelity: pip install torch-fidelity') from error
    except Exception as error:  # whatever a file that holds something else leads to
        raise EvaluationError(f"{path} does not hold weights of torch-fidelity's InceptionV3: {KINDS}") from error


def _feature_dimension(module: nn.Module, name: str, image_shape: tuple[int, int, int]) -> int:
    """F, from a trial on two black images."""
    contract = "expected uint8 [N, 3, H, W] to give floats [N, F]"
    try:
        with torch.inference_mode():
            features = module(torch.zeros(2, *image_shape, dtype=torch.uint8))
    except Exception as error:  # anything may happen inside
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise EvaluationError(f"feature network {name} fails ({reason}): {contract}") from error
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != 2 or not features.is_floating_point():
        got = f"{features.dtype} {list(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
        raise EvaluationError(f"feature network {name} makes {got} of two images: {contract}")
    return features.shape[1]


def fid(real: Tensor, synthetic: Tensor, network: FeatureNetwork) -> float:
    """Fréchet distance between Gaussians fitted to the features of two sets of images (lower is better)::

        |m_r - m_s|² + tr(S_r + S_s - 2 (S_r S_s)^(1/2))

    computed by torchmetrics' ``FrechetInceptionDistance``, accumulated in float64.

    The estimate is biased upwards, the more the fewer images there are; compare only values with equal counts.
    With ``network.features`` images or fewer, covariances have deficient rank and the value means little.

    Args:
        real, synthetic: uint8 [N, C, H, W] and [M, C, H, W], with N and M at least 2.

    Raises :class:`EvaluationError`: wrong dtype or shape, too few images, features that are not finite.
    """
    for images, name in ((real, "real"), (synthetic, "synthetic")):
        _check_images(images, name)
        if len(images) < 2:
            raise EvaluationError(f"{len(images)} {name} image: a Fréchet distance needs at least two")
    if real.shape[1:] != synthetic.shape[1:]:
        raise EvaluationError(
            f"real images are {list(real.shape[1:])} but synthetic ones {list(synthetic.shape[1:])}: give equal sizes"
        )
    metric = FrechetInceptionDistance(feature=_FiniteFeatures(network))
    for images, is_real in ((real, True), (synthetic, False)):
        for chunk in images.split(_CHUNK):
            metric.update(chunk, real=is_real)
    return float(metric.compute())


class _FiniteFeatures(nn.Module):
    """A feature network as torchmetrics takes it."""

    def __init__(self, network: FeatureNetwork) -> None:
        super().__init__()
        self.name, self.module, self.num_features = network.name, network.module, network.features

    def forward(self, images: Tensor) -> Tensor:
        features = self.module(images)
        if not bool(features.isfinite().all()):
            raise EvaluationError(f"feature network {self.name} gives NaN or infinite features: use another one")
        return features


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
        raise EvaluationError(f"{test.name}: {_DIFFERENT.format(list(test.image_shape), list(train.image_shape))}")
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
    _check_images(images, "synthetic")
    return images.cpu(), None if labels is None else labels.cpu()


def _check_images(images: Tensor, name: str) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        got = f"{images.dtype} {list(images.shape)}"
        raise EvaluationError(f"{name} images: expected uint8 [N, C, H, W] with C = 1 or 3 and N > 0, but got {got}")


def _check_labelled(images: Tensor, labels: Tensor, test: ImageData, num_classes: int) -> Tensor:
    """The labels of ``test``, once everything fits together."""
    _check_images(images, "training")
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        got = f"{labels.dtype} {list(labels.shape)}"
        raise EvaluationError(f"training labels: expected int64 [{len(images)}], one an image, but got {got}")
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= num_classes:
        raise EvaluationError(f"training labels from {lowest} to {highest}: expected 0 to {num_classes - 1}")
    if test.labels is None or len(test) == 0:
        raise EvaluationError(f"{test.name}: accuracy is tested on labelled images: hold some out")
    if test.image_shape != images.shape[1:]:
        raise EvaluationError(f"{test.name}: {_DIFFERENT.format(list(test.image_shape), list(images.shape[1:]))}")
    return test.labels
