"""How good are samples: the figures against what they ought to be, and the one line when there are none."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor, nn

from dp2vae_fast.vae.classifiers import EvaluationError, SmallCNN, cnn_accuracy, logreg_accuracy
from dp2vae_fast.vae.data import ImageData, load_images, make_image_data, to_unit, train_test_split
from dp2vae_fast.vae.evaluate import FIGURES, evaluate
from dp2vae_fast.vae.fid import FeatureNetwork, fid, load_feature_network

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

CNN = "cnn fitted on the real training data"


@pytest.fixture(scope="module")
def digits() -> tuple[ImageData, ImageData]:
    return train_test_split(load_images("digits"), 0.2, seed=0)


@pytest.fixture(scope="module")
def cnn_features(digits) -> FeatureNetwork:
    return load_feature_network("cnn", digits[0])


@pytest.fixture
def few_steps(monkeypatch):
    """For tests that ask for other things than accuracy."""
    monkeypatch.setattr("dp2vae_fast.vae.classifiers._STEPS", 10)


class ToUnit(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float() / 255


class ChannelMeans(nn.Module):
    """Takes colour only; drops half of the features when training."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout()

    def forward(self, images: Tensor) -> Tensor:
        red, green, blue = images.float().mean(dim=(2, 3)).unbind(1)
        return self.drop(torch.stack([red, green - red, blue + 1.0], dim=1))


def noise(count: int, *image_shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, *image_shape), generator=generator, dtype=torch.uint8)


def colour_data(count: int = 12, size: int = 9) -> ImageData:
    return make_image_data(noise(count, 3, size, size), torch.arange(count) % 2, name="noise")


def labels_of(data: ImageData) -> Tensor:
    assert data.labels is not None
    return data.labels


def refused(match: str, action, *arguments, **options) -> None:
    with pytest.raises(EvaluationError, match=match) as caught:
        action(*arguments, **options)
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------- accuracies


def test_real_digits_are_classified(digits):
    train, test = digits
    np.random.seed(5)
    expected = np.random.rand()
    np.random.seed(5)
    state = torch.get_rng_state()
    first = cnn_accuracy(train.images, labels_of(train), test, num_classes=10, seed=3)
    assert first >= 0.97
    assert logreg_accuracy(train.images, labels_of(train), test, num_classes=10) >= 0.95
    assert torch.equal(torch.get_rng_state(), state)
    assert np.random.rand() == expected

    torch.manual_seed(99)  # the global state has no say in it
    assert cnn_accuracy(train.images, labels_of(train), test, num_classes=10, seed=3) == first


def test_shuffled_labels_teach_nothing(digits):
    train, test = digits
    shuffled = labels_of(train)[torch.randperm(len(train), generator=torch.Generator().manual_seed(1))]
    assert cnn_accuracy(train.images, shuffled, test, num_classes=10) < 0.3
    assert logreg_accuracy(train.images, shuffled, test, num_classes=10) < 0.3


def test_accuracy_is_the_share_of_held_out_labels_met(digits):
    """Two classes that cannot be confused, and a test set in which one label of four is wrong."""
    images = torch.cat([torch.full((8, 1, 8, 8), level, dtype=torch.uint8) for level in (0, 255)])
    labels = torch.tensor([0] * 8 + [1] * 8)
    test = make_image_data(images[[0, 1, 8, 9]], torch.tensor([0, 1, 1, 1]), name="one wrong")
    assert cnn_accuracy(images, labels, test, num_classes=2) == 0.75
    assert logreg_accuracy(images, labels, test, num_classes=2) == 0.75


def test_one_class_only_is_always_predicted():
    images, test = noise(6, 1, 8, 8), make_image_data(noise(4, 1, 8, 8), torch.tensor([2, 2, 2, 0]), name="test")
    labels = torch.full((6,), 2)
    assert logreg_accuracy(images, labels, test, num_classes=3) == 0.75


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 17), (1, 28, 28), (3, 63, 64), (3, 128, 130), (1, 1, 1)])
def test_cnn_takes_every_size(shape):
    cnn = SmallCNN(shape, 5)
    images = noise(2, *shape)
    assert cnn(images).shape == (2, 5) and cnn.features(images).shape == (2, 64)


@pytest.mark.parametrize("accuracy", [cnn_accuracy, logreg_accuracy])
def test_bad_training_sets_are_refused(accuracy):
    test = colour_data()
    images, labels = test.images, labels_of(test)
    refused("expected uint8.*float32", accuracy, to_unit(images), labels, test, num_classes=2)
    refused(r"C = 1 or 3.*\[12, 2, 9, 9\]", accuracy, images[:, :2], labels, test, num_classes=2)
    refused(r"N > 0.*\[0, 3, 9, 9\]", accuracy, images[:0], labels[:0], test, num_classes=2)
    refused(r"int64 \[12\].*\[11\]", accuracy, images, labels[:11], test, num_classes=2)
    refused(r"int64.*float32", accuracy, images, labels.float(), test, num_classes=2)
    refused("from 0 to 1: expected 0 to 0", accuracy, images, labels, test, num_classes=1)
    refused("from -1 to 0", accuracy, images, labels - 1, test, num_classes=2)
    refused("noise: .*labelled", accuracy, images, labels, make_image_data(images, name="noise"), num_classes=2)
    refused("hold some out", accuracy, images, labels, test.subset(torch.arange(0)), num_classes=2)
    refused(r"\[3, 9, 9\].*\[1, 9, 9\]", accuracy, images[:, :1], labels, test, num_classes=2)


# ------------------------------------------------------------------------------------------------------ distance


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """The textbook formula, by scipy's matrix square root."""
    product = sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False))
    return float(
        np.sum((a.mean(0) - b.mean(0)) ** 2)
        + np.trace(np.cov(a, rowvar=False) + np.cov(b, rowvar=False) - 2 * np.real(product))
    )


def test_fid_is_the_frechet_distance(digits):
    """Pixel means of the four quadrants as features: covariances of full rank, so scipy's root is exact."""
    quadrants = nn.Sequential(ToUnit(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    network = FeatureNetwork("quadrants", quadrants, 4)
    real, other = digits[0].images, digits[1].images.flip(-1)
    expected = frechet(quadrants(real).double().numpy(), quadrants(other).double().numpy())
    assert fid(real, other, network) == pytest.approx(expected, rel=1e-4)
    assert fid(other, real, network) == pytest.approx(expected, rel=1e-4)


def test_fid_orders_what_it_should(digits, cnn_features):
    train, test = digits
    assert (cnn_features.name, cnn_features.features) == (CNN, 64)
    scale = fid(train.images, test.images, cnn_features)
    assert abs(fid(train.images, train.images, cnn_features)) < 1e-2 * scale
    faint = torch.where(noise(len(train), 1, 8, 8) < 64, noise(len(train), 1, 8, 8, seed=1), train.images)
    assert scale < fid(train.images, faint, cnn_features) < fid(train.images, noise(1437, 1, 8, 8), cnn_features)


def test_fid_refuses_what_it_cannot_measure(cnn_features):
    images = noise(4, 1, 8, 8)
    refused("real images: expected uint8", fid, to_unit(images), images, cnn_features)
    refused("synthetic images: expected uint8", fid, images, images[0], cnn_features)
    refused("1 synthetic image: .*at least two", fid, images, images[:1], cnn_features)
    refused(r"\[1, 8, 8\].*\[1, 8, 7\]", fid, images, images[..., :7], cnn_features)
    broken = nn.Sequential(ToUnit(), nn.Flatten(), nn.Threshold(2.0, float("nan")))
    refused("broken gives NaN", fid, images, images, FeatureNetwork("broken", broken, 64))


# ---------------------------------------------------------------------------------------------- feature networks


def test_features_are_what_the_fitted_cnn_separates_classes_by(digits, cnn_features):
    train, test = digits
    centres = torch.stack([cnn_features.module(train.images[labels_of(train) == k]).mean(0) for k in range(10)])
    nearest = torch.cdist(cnn_features.module(test.images), centres).argmin(1)
    assert float((nearest == labels_of(test)).float().mean()) > 0.95


def test_unlabelled_data_fit_a_network_of_another_name(few_steps):
    state = torch.get_rng_state()
    network = load_feature_network("cnn", make_image_data(noise(8, 3, 6, 9), name="photos"))
    assert network.name == f"{CNN} to recognize flips"
    assert network.module(noise(5, 3, 6, 9)).shape == (5, 64)
    assert torch.equal(torch.get_rng_state(), state)


def save(module: nn.Module, path: Path) -> str:
    torch.jit.save(torch.jit.script(module), str(path))
    return str(path)


def test_torchscript_round_trip(tmp_path, digits):
    file = save(ChannelMeans(), tmp_path / "means.pt")
    colour, grey = colour_data(), digits[0]
    network = load_feature_network(file, colour)
    assert (network.name, network.features) == ("torchscript means.pt", 3)
    expected = ChannelMeans().eval()(colour.images)
    assert torch.equal(network.module(colour.images), expected)
    assert fid(colour.images, colour.images.flip(1), network) == pytest.approx(
        frechet(expected.numpy(), ChannelMeans().eval()(colour.images.flip(1)).numpy()), rel=1e-3
    )
    seen = load_feature_network(file, grey).module(grey.images)
    assert torch.equal(seen[:, 1], torch.zeros(len(grey))) and torch.equal(seen[:, 2], seen[:, 0] + 1)


def test_unusable_networks_are_refused(tmp_path):
    data = colour_data()
    for wanted in ("resnet", "inception", "inception:", f"inception:{tmp_path / 'absent.pth'}", str(tmp_path)):
        refused(re.escape(f'network "{wanted}": use "cnn"'), load_feature_network, wanted, data)
    (tmp_path / "text.pt").write_text("not a network")
    refused(r"text\.pt is not a TorchScript file", load_feature_network, str(tmp_path / "text.pt"), data)
    for name, module, line in (
        ("floats.pt", nn.Conv2d(3, 4, 3), r"fails \(.*\): expected uint8 \[N, 3, H, W\]"),
        ("bytes.pt", nn.Flatten(), r"makes torch.uint8 \[2, 243\] of two images"),
        ("maps.pt", ToUnit(), r"makes torch.float32 \[2, 3, 9, 9\] of two images"),
    ):
        refused(f"torchscript {name} {line}", load_feature_network, save(module, tmp_path / name), data)


def test_inception_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setattr("torchmetrics.image.fid._TORCH_FIDELITY_AVAILABLE", False)
    torch.save({}, tmp_path / "weights.pth")
    refused("pip install torch-fidelity", load_feature_network, f"inception:{tmp_path / 'weights.pth'}", colour_data())


def test_inception_with_weights_of_its_own(tmp_path, monkeypatch):
    """A stand-in for torch-fidelity's network, at the place where torchmetrics would build it."""
    torch.save({"bias": torch.tensor([5.0])}, tmp_path / "weights.pth")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "wrong.pth")

    def metric(feature: int, feature_extractor_weights_path: str) -> SimpleNamespace:
        assert feature == 2048
        bias = torch.load(feature_extractor_weights_path)["bias"]
        torch.rand(1)  # layers are initialized before they are loaded
        return SimpleNamespace(inception=nn.Sequential(ChannelMeans(), nn.Threshold(-1e9, float(bias))))

    monkeypatch.setattr("dp2vae_fast.vae.fid.FrechetInceptionDistance", metric)
    state, data = torch.get_rng_state(), colour_data()
    network = load_feature_network(f"inception:{tmp_path / 'weights.pth'}", data)
    assert (network.name, network.features) == ("inception v3 weights.pth", 3)
    assert torch.equal(network.module(data.images), ChannelMeans().eval()(data.images))
    assert torch.equal(torch.get_rng_state(), state)
    refused(r"wrong\.pth does not hold weights", load_feature_network, f"inception:{tmp_path / 'wrong.pth'}", data)


# ---------------------------------------------------------------------------------------------------- everything


def sampler_of(data: ImageData, *, labelled: bool = True):
    """A "decoder" that knows the data by heart."""

    def sample(count: int) -> tuple[Tensor, Tensor | None]:
        rows = torch.randint(len(data), (count,), generator=torch.Generator().manual_seed(0))
        return data.images[rows], data.labels[rows] if labelled and data.labels is not None else None

    return sample


def test_a_memorizing_decoder_is_as_good_as_the_data(digits, tmp_path):
    train, test = digits
    file = save(ChannelMeans(), tmp_path / "means.pt")
    result = evaluate(sampler_of(train), train, test, samples=1500, features=("cnn", file))
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    for figure in ("cnn_accuracy_synthetic", "cnn_accuracy_real"):
        assert result[figure] >= 0.96
    for figure in ("logreg_accuracy_synthetic", "logreg_accuracy_real"):
        assert result[figure] >= 0.94
    assert result["fid"].keys() == result["fid_real"].keys() == {CNN, "torchscript means.pt"}
    assert 0 < result["fid"][CNN] < result["fid_real"][CNN]
    means = load_feature_network(file, train)
    assert result["fid"][means.name] == fid(train.images, sampler_of(train)(1500)[0], means)
    assert result["fid_real"][means.name] == fid(train.images, test.images, means)
    assert (result["samples"], result["train_records"], result["test_records"]) == (1500, 1437, 360)
    assert result["missing"] == {} and result["warnings"] == []
    assert result["private"] == {figure: False for figure in FIGURES}
    assert "none of these figures is covered" in result["note"]


def test_each_side_is_judged_by_its_own_images(digits, few_steps):
    train, test = digits
    mislabelled = train.images, (labels_of(train) + 1) % 10
    result = evaluate(lambda count: mislabelled, train, test, samples=len(train), features=())
    assert result["logreg_accuracy_synthetic"] < 0.1 and result["logreg_accuracy_real"] > 0.9


def test_as_many_records_as_samples_and_few_are_said_to_be_few(digits, few_steps):
    train, test = digits
    result = evaluate(sampler_of(train), train, test.subset(torch.arange(20)), samples=64)
    assert (result["samples"], result["train_records"], result["test_records"]) == (64, 64, 20)
    assert result["warnings"] == [
        f"fid: 64 images are too few for the 64 features of {CNN}",
        f"fid_real: 20 images are too few for the 64 features of {CNN}",
    ]


def test_what_cannot_be_measured_is_null_and_says_why(digits, few_steps):
    train, test = digits
    accuracies = [figure for figure in FIGURES if "accuracy" in figure]
    nobody = test.subset(torch.arange(0))

    result = evaluate(sampler_of(train), train, nobody, samples=65)
    reasons = dict.fromkeys(accuracies, "no records were held out to test on")
    assert result["missing"] == reasons | {"fid_real": "fewer than two records were held out"}
    assert all(result[figure] is None for figure in result["missing"]) and result["fid"][CNN] > 0

    result = evaluate(sampler_of(train, labelled=False), train, test, samples=65)
    assert result["missing"] == dict.fromkeys(accuracies[::2], "the samples have no labels")
    assert result["cnn_accuracy_synthetic"] is None and result["cnn_accuracy_real"] > 0

    photos, others = (make_image_data(noise(80, 1, 8, 8, seed=seed), name="photos") for seed in (0, 1))
    result = evaluate(sampler_of(photos), photos, others, samples=70)
    assert result["missing"] == dict.fromkeys(accuracies, "the data have no labels")
    assert result["fid_real"].keys() == {f"{CNN} to recognize flips"}


def test_unusable_arguments_are_refused_before_sampling(tmp_path):
    data = colour_data()
    file = save(ChannelMeans(), tmp_path / "means.pt")

    def never(count):
        raise AssertionError("sampled")

    refused("samples = 1", evaluate, never, data, data, samples=1)
    refused("1 training records", evaluate, never, data.subset(torch.tensor([0])), data)
    refused('"resnet"', evaluate, never, data, data, features=("resnet",))
    other = make_image_data(noise(4, 3, 9, 8), name="other")
    refused(r"other: test images \[3, 9, 8\].*\[3, 9, 9\]", evaluate, never, data, other)
    refused("have one name", evaluate, never, data, data, features=(file, file))


def test_samples_of_another_kind_are_refused(few_steps):
    data = colour_data()

    def run(match: str, images: Tensor, labels: Tensor | None) -> None:
        refused(match, evaluate, lambda count: (images, labels), data, data, samples=4, features=())

    run(r"samples of shape \[3, 3, 9, 9\]: expected \[4, 3, 9, 9\], as noise has", noise(3, 3, 9, 9), None)
    run(r"expected uint8.*float32", noise(4, 3, 9, 9).float(), None)
    run("from 0 to 2: expected 0 to 1", noise(4, 3, 9, 9), torch.tensor([0, 1, 2, 0]))
