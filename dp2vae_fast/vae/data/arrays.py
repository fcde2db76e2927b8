"""Arrays of pixels: NumPy files, and the checks that every array goes through."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .images import DataError, ImageData, make_image_data
from .pictures import Wanted, convert

_CHUNK = 1024
_LAYOUTS = "[N, H, W], [N, H, W, C] or [N, C, H, W] with C = 1 or 3"


def pixels_from(array: np.ndarray, name: str, wanted: Wanted) -> Tensor:
    """Any supported array as uint8 [N, C, H, W], in chunks: a memory-mapped array is never copied as a whole.

    Raises :class:`DataError`: unsupported dtype or shape, NaN or infinite pixels, values out of range.
    """
    if array.dtype.kind not in "buif":
        raise DataError(
            f"{name}: images of type {array.dtype}: expected whole numbers from 0 to 255 or floats in [0, 1]"
        )
    array = _channels_first(array, name)
    count, stored, height, width = array.shape
    if 0 in array.shape:
        raise DataError(f"{name} holds no images: name a source with at least one")
    channels = wanted.channels or stored
    size = wanted.image_size
    redraw = channels != stored or (size is not None and (height, width) != (size, size))
    shape = (size, size) if size is not None else (height, width)
    out = np.empty((count, channels, *shape), dtype=np.uint8)
    for start in range(0, count, _CHUNK):
        chunk = _to_uint8(np.asarray(array[start : start + _CHUNK]), start, name)
        if not redraw:
            out[start : start + len(chunk)] = chunk
            continue
        for offset, pixels in enumerate(chunk):
            picture = Image.fromarray(pixels[0] if stored == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
            out[start + offset] = convert(picture, channels, size)
    return torch.from_numpy(out)


def labels_from(array: np.ndarray, name: str) -> Tensor:
    """Labels as int64 [N], from whole numbers of shape [N] or [N, 1]."""
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise DataError(f"{name}: labels of shape {list(array.shape)}: expected [N], one class number an image")
    whole = array.dtype.kind in "bui" or (
        array.dtype.kind == "f" and np.isfinite(array).all() and (array % 1 == 0).all()
    )
    if not whole:
        raise DataError(f"{name}: labels of type {array.dtype}: expected whole numbers, one class number an image")
    return torch.from_numpy(array.astype(np.int64))


def _channels_first(array: np.ndarray, name: str) -> np.ndarray:
    if array.ndim == 3:
        return array[:, None]
    if array.ndim == 4 and array.shape[1] in (1, 3):
        return array
    if array.ndim == 4 and array.shape[3] in (1, 3):
        return array.transpose(0, 3, 1, 2)
    raise DataError(f"{name}: images of shape {list(array.shape)}: expected {_LAYOUTS}")


def _to_uint8(chunk: np.ndarray, start: int, name: str) -> np.ndarray:
    if chunk.dtype == np.uint8:
        return chunk
    if chunk.dtype.kind == "b":
        return chunk.astype(np.uint8) * 255
    if chunk.dtype.kind == "f" and not (finite := np.isfinite(chunk)).all():
        index = start + int((~finite).reshape(len(chunk), -1).any(axis=1).argmax())
        raise DataError(f"{name}: image {index} has NaN or infinite pixels: remove or repair it")
    lowest, highest = chunk.min(), chunk.max()
    top = 1 if chunk.dtype.kind == "f" else 255
    if lowest < 0 or highest > top:
        kind = "floats in [0, 1]" if top == 1 else "whole numbers from 0 to 255"
        raise DataError(f"{name}: pixels from {lowest:g} to {highest:g}: expected {kind}; rescale by public constants")
    return np.rint(chunk * (255 if top == 1 else 1)).astype(np.uint8)


def read_npy(path: Path, wanted: Wanted) -> ImageData:
    """Images from ``path``, labels from the file beside it that :func:`_labels_path` names, if it exists."""
    wanted.require_only_split(str(path))
    images = pixels_from(_load(path), str(path), wanted)
    labels_path = _labels_path(path)
    labels = labels_from(_load(labels_path), str(labels_path)) if labels_path.exists() else None
    return make_image_data(images, labels, name=str(path), num_classes=wanted.num_classes)


def _labels_path(path: Path) -> Path:
    if "images" in path.stem:
        return path.with_name(path.name.replace("images", "labels"))
    return path.with_name(f"{path.stem}_labels.npy")


def _load(path: Path) -> Any:
    try:
        return np.load(path, mmap_mode="r" if path.suffix == ".npy" else None, allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        if "pickle" in str(error) or "Python objects" in str(error):
            raise DataError(
                f"{path} holds pickled objects, which are never loaded: save plain numbers with numpy.save"
            ) from error
        raise DataError(f"{path} is truncated or not a NumPy file: save it again") from error


def read_npz(path: Path, wanted: Wanted) -> ImageData:
    """Images, labels and optionally ``num_classes`` or ``class_names`` from one archive."""
    archive = _load(path)
    if isinstance(archive, np.ndarray):
        raise DataError(f"{path} is one array, not an archive of them: call the file .npy")
    with archive:
        image_key = _find(archive.files, "images", wanted.split, ("images", "image", "x", "data", "arr_0"))
        label_key = _find(archive.files, "labels", wanted.split, ("labels", "label", "y", "targets", "arr_1"))
        if image_key is None:
            keys = ", ".join(archive.files) or "none"
            raise DataError(
                f'{path} has no images for split "{wanted.split}" among its arrays ({keys}): call the array "images"'
            )
        images = pixels_from(_entry(archive, image_key, path), f"{path}[{image_key}]", wanted)
        labels = None if label_key is None else labels_from(_entry(archive, label_key, path), f"{path}[{label_key}]")
        names = _entry(archive, "class_names", path).tolist() if "class_names" in archive.files else []
        declared = wanted.num_classes
        if "num_classes" in archive.files:
            declared = int(labels_from(_entry(archive, "num_classes", path).reshape(-1), f"{path}[num_classes]")[0])
    return make_image_data(images, labels, name=str(path), num_classes=declared, class_names=[str(n) for n in names])


def _find(keys: list[str], kind: str, split: str, plain: tuple[str, ...]) -> str | None:
    """The array with the images or labels of ``split``: names that say the split first, then plain ones."""
    short = "x" if kind == "images" else "y"
    candidates = [
        f"{split}_{kind}",
        f"{kind}_{split}",
        f"{short}_{split}",
        *(plain if split == "train" else ()),
    ]
    return next((key for key in candidates if key in keys), None)


def _entry(archive: Any, key: str, path: Path) -> np.ndarray:
    try:
        return archive[key]
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}[{key}] cannot be read as numbers: save the archive again with numpy.savez") from error
