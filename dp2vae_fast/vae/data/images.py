"""Images in memory: what every reader returns, and what the rest of the package is given."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_CLASSES = 1000
_HASH_CHUNK = 1 << 24


class DataError(ValueError):
    """Data that cannot be used; the message is one line that names the thing and the way out."""


@dataclass(frozen=True)
class ImageData:
    """Images of one size, and a label for each of them or for none. Built by :func:`make_image_data`.

    Args:
        images: uint8 [N, C, H, W] with C = 1 (grey) or 3 (RGB).
        labels: int64 [N] in 0 .. num_classes - 1, or None.
        num_classes: 0 for unlabelled data.
        class_names: one name a class; empty for unlabelled data.
        name: where the images came from, for messages and file names.
        sha256: digest of pixels and labels. It identifies the records, so it is as confidential as they are.
    """

    images: Tensor
    labels: Tensor | None
    num_classes: int
    class_names: tuple[str, ...]
    name: str
    sha256: str

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def rows(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images uint8 [B, C, H, W], of which :func:`to_unit` makes floats, and labels [B] of the records at
        ``indices``."""
        return self.images[indices], None if self.labels is None else self.labels[indices]

    def subset(self, indices: Tensor) -> ImageData:
        """The records at ``indices`` (int64 [M]), in that order, with a digest of their own."""
        images = self.images[indices]
        labels = None if self.labels is None else self.labels[indices]
        return dataclasses.replace(self, images=images, labels=labels, sha256=digest(images, labels, self.num_classes))


def make_image_data(
    images: Tensor,
    labels: Tensor | None = None,
    *,
    name: str,
    num_classes: int | None = None,
    class_names: Sequence[str] = (),
) -> ImageData:
    """Check images and labels and put them together.

    The number of classes is ``num_classes``, or the number of ``class_names``, or one more than the largest
    label. In the last case it is read from the data, and labels with wide gaps are refused: they are more
    likely damaged than meant.

    Raises :class:`DataError`: wrong dtype or shape, no images, label count mismatch, labels out of range.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        shape = list(images.shape)
        raise DataError(f"{name}: expected uint8 images [N, C, H, W] with C = 1 or 3, but got {images.dtype} {shape}")
    if 0 in images.shape:
        raise DataError(f"{name} holds no images: name a source with at least one")
    if labels is None:
        return ImageData(images, None, 0, (), name, digest(images, None, 0))
    if labels.shape != images.shape[:1]:
        raise DataError(
            f"{name}: {len(images)} images but labels of shape {list(labels.shape)}: give one label an image"
        )
    classes = _count_classes(labels, num_classes or len(class_names) or None, name)
    names = tuple(class_names) or tuple(str(k) for k in range(classes))
    if len(names) != classes:
        raise DataError(f"{name}: {len(names)} class names for {classes} classes: give one name a class")
    labels = labels.to(torch.int64)
    return ImageData(images, labels, classes, names, name, digest(images, labels, classes))


def _count_classes(labels: Tensor, declared: int | None, name: str) -> int:
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0:
        raise DataError(f"{name}: label {lowest} is out of range: number the classes from 0")
    if declared is not None:
        if highest >= declared:
            raise DataError(
                f"{name}: label {highest} is out of range for {declared} classes "
                f"(0 to {declared - 1}): correct the labels"
            )
        return declared
    used = len(labels.unique())
    if highest >= MAX_CLASSES or highest + 1 > 2 * used:
        raise DataError(
            f"{name}: label {highest} is out of range: only {used} different labels occur; "
            "number the classes from 0 without gaps"
        )
    return highest + 1


def digest(images: Tensor, labels: Tensor | None, num_classes: int) -> str:
    """SHA-256 over shape, pixels and labels, read in pieces so that nothing is copied as a whole."""
    head = f"uint8 {list(images.shape)} labels {labels is not None} classes {num_classes}\n"
    sha = hashlib.sha256(head.encode())
    rows = max(1, _HASH_CHUNK // max(1, images[0].numel())) if len(images) else 1
    for chunk in images.split(rows):
        sha.update(chunk.contiguous().numpy().data)
    if labels is not None:
        sha.update(labels.to(torch.int64).contiguous().numpy().astype("<i8", copy=False).data)
    return sha.hexdigest()


def record_digests(data: ImageData) -> set[str]:
    """A digest of each record's pixels, to recognise a record elsewhere; as confidential as the records."""
    return {hashlib.sha256(image.contiguous().numpy().data).hexdigest() for image in data.images}


def to_unit(images: Tensor) -> Tensor:
    """uint8 pixels 0 .. 255 as float32 in [0, 1]: ``images / 255``."""
    return images.to(torch.float32).div_(255)


def to_pixels(images: Tensor) -> Tensor:
    """Float images in [0, 1] as uint8, clamped and rounded to nearest: undoes :func:`to_unit` exactly."""
    return images.detach().clamp(0, 1).mul(255).round_().to(torch.uint8)


def train_test_split(data: ImageData, test_fraction: float = 0.2, seed: int = 0) -> tuple[ImageData, ImageData]:
    """Split by a public permutation of the record indices; ``ceil(test_fraction * N)`` records are held out.

    The permutation depends on (N, seed) only, never on what the records contain. The records that a guarantee
    speaks of are those of the first part; figures computed on the second part are not covered by it.

    Edge cases: ``test_fraction=0`` gives an empty second part.
    Raises :class:`DataError` when nothing is left to train on.
    """
    if not 0 <= test_fraction < 1:
        raise ValueError(f"test_fraction = {test_fraction}: expected a fraction from 0 to below 1")
    held_out = math.ceil(test_fraction * len(data) - 1e-9)
    if held_out >= len(data):
        raise DataError(
            f"{data.name}: holding out {held_out} of {len(data)} images leaves none to train on: "
            "lower the test fraction"
        )
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    if held_out == 0:
        return data, data.subset(order[:0])  # nothing is copied: the images may fill the memory
    return data.subset(order[held_out:].sort().values), data.subset(order[:held_out].sort().values)


def check_trainable(data: ImageData, *, batch_size: int, conditional: bool) -> None:
    """Raise :class:`DataError` unless ``data`` fills a batch and, if ``conditional``, two classes or more."""
    if len(data) < batch_size:
        raise DataError(
            f"{data.name}: {len(data)} training images are fewer than the expected batch size "
            f"of {batch_size}: lower it or add images"
        )
    if not conditional:
        return
    if data.labels is None:
        raise DataError(
            f"{data.name} has no labels, which conditional training needs: add them, or train unconditionally"
        )
    if len(data.labels.unique()) < 2:
        raise DataError(f"{data.name} has one class only: add another one, or train unconditionally")
