"""Classifiers that judge samples: trained on some images, tested on held-out real ones."""

from __future__ import annotations

import warnings

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .data import ImageData, to_unit

FEATURES = 64
"""Dimension of what :class:`SmallCNN` sees before its last layer."""
CHUNK = 64
"""Images that are looked at together where nothing is trained."""
DIFFERENT = "test images {} but training images {}: read both with the same image_size and channels"
_STEPS, _BATCH = 600, 64
_LEARNING_RATE, _WEIGHT_DECAY = 3e-3, 1e-2
_LOGREG_ITERATIONS = 200


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
            nn.Linear(4 * 64, FEATURES),
            nn.ReLU(),
        )
        self.head = nn.Linear(FEATURES, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


class _ToUnit(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return to_unit(images)


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
    cnn = fit_cnn(train_images, train_labels, num_classes, seed)
    with torch.inference_mode():
        predicted = torch.cat([cnn(chunk).argmax(dim=1) for chunk in test.images.split(CHUNK)])
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


def fit_cnn(images: Tensor, labels: Tensor, num_classes: int, seed: int) -> SmallCNN:
    """A :class:`SmallCNN` trained on uint8 images ``[N, C, H, W]`` and labels ``[N]``, frozen, in eval mode."""
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


def check_images(images: Tensor, name: str) -> None:
    """Raise :class:`EvaluationError` unless ``images`` are uint8 ``[N, C, H, W]``, and some."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        got = f"{images.dtype} {list(images.shape)}"
        raise EvaluationError(f"{name} images: expected uint8 [N, C, H, W] with C = 1 or 3 and N > 0, but got {got}")


def _check_labelled(images: Tensor, labels: Tensor, test: ImageData, num_classes: int) -> Tensor:
    """The labels of ``test``, once everything fits together."""
    check_images(images, "training")
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        got = f"{labels.dtype} {list(labels.shape)}"
        raise EvaluationError(f"training labels: expected int64 [{len(images)}], one an image, but got {got}")
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= num_classes:
        raise EvaluationError(f"training labels from {lowest} to {highest}: expected 0 to {num_classes - 1}")
    if test.labels is None or len(test) == 0:
        raise EvaluationError(f"{test.name}: accuracy is tested on labelled images: hold some out")
    if test.image_shape != images.shape[1:]:
        raise EvaluationError(f"{test.name}: {DIFFERENT.format(list(test.image_shape), list(images.shape[1:]))}")
    return test.labels
