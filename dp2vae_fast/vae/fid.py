"""The Fréchet distance between samples and real images, by a feature network that the user names."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from .classifiers import CHUNK, FEATURES, EvaluationError, check_images, fit_cnn
from .data import ImageData

KINDS = 'use "cnn", a TorchScript file, or "inception:FILE" with weights of torch-fidelity\'s InceptionV3'


class _ToColour(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.expand(-1, 3, -1, -1).contiguous()


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
    found = require_feature_network(wanted)
    if found is None:
        return _fit_feature_cnn(train, seed)
    name, network = found
    module = nn.Sequential(_ToColour(), network).eval()
    return FeatureNetwork(name, module, _feature_dimension(module, name, train.image_shape))


def require_feature_network(wanted: str) -> tuple[str, nn.Module] | None:
    """Name and network of a file, read as far as no data are needed, or None for "cnn".

    Raises :class:`EvaluationError` where it cannot be read: before hours of training, if asked early.
    """
    if wanted == "cnn":
        return None
    kind, _, file = wanted.partition(":")
    path = Path(os.path.expanduser(file if kind == "inception" else wanted))
    if not path.is_file():
        raise EvaluationError(f'there is no file for the feature network "{wanted}": {KINDS}')
    if kind == "inception":
        return f"inception v3 {path.name}", _load_inception(path)
    return f"torchscript {path.name}", _load_torchscript(path)


def _fit_feature_cnn(train: ImageData, seed: int) -> FeatureNetwork:
    name = "cnn fitted on the real training data"
    images, labels, classes = train.images, train.labels, train.num_classes
    if labels is None:
        name += " to recognize flips"
        images = torch.cat([images, images.flip(-1), images.flip(-2), images.flip(-1, -2)])
        labels, classes = torch.arange(4).repeat_interleave(len(train)), 4
    return FeatureNetwork(name, fit_cnn(images, labels, classes, seed).features, FEATURES)


def _load_torchscript(path: Path) -> nn.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # what torch would rather have says nothing of the file
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
        check_images(images, name)
        if len(images) < 2:
            raise EvaluationError(f"{len(images)} {name} image: a Fréchet distance needs at least two")
    if real.shape[1:] != synthetic.shape[1:]:
        raise EvaluationError(
            f"real images are {list(real.shape[1:])} but synthetic ones {list(synthetic.shape[1:])}: give equal sizes"
        )
    metric = FrechetInceptionDistance(feature=_FiniteFeatures(network))
    for images, is_real in ((real, True), (synthetic, False)):
        for chunk in images.split(CHUNK):
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
