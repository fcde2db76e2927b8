"""The idx format of MNIST: a type byte, big-endian dimensions, raw numbers; gzipped or not."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from .arrays import labels_from, pixels_from
from .images import DataError, ImageData, make_image_data
from .pictures import Wanted

_TYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
_GZIP = b"\x1f\x8b"
_PREFIXES = {"train": ("train",), "test": ("t10k", "test")}


def is_idx(path: Path) -> bool:
    """Whether a file is idx, by its first bytes or, for gzipped and damaged ones, by its name."""
    with open(path, "rb") as file:
        head = file.read(4)
    return "idx" in path.name or (len(head) == 4 and head[:2] == b"\0\0" and head[2] in _TYPES and 1 <= head[3] <= 4)


def read_idx(path: Path, wanted: Wanted) -> ImageData:
    """Images of an idx file, or of the wanted split in a folder; labels from the file that belongs to it."""
    if path.is_dir():
        path = _images_file(path, wanted.split)
    else:
        wanted.require_only_split(str(path))
    images = pixels_from(read_array(path), str(path), wanted)
    labels_path = _labels_file(path)
    labels = None if labels_path is None else labels_from(read_array(labels_path), str(labels_path))
    return make_image_data(images, labels, name=str(path), num_classes=wanted.num_classes)


def read_array(path: Path) -> np.ndarray:
    """The array of one idx file. Raises :class:`DataError` for anything that is not exactly one."""
    try:
        content = path.read_bytes()
        if content[:2] == _GZIP:
            content = gzip.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is a damaged gzip file: copy it again") from error
    dimensions = content[3] if len(content) > 3 else 0
    start = 4 + 4 * dimensions
    if content[:2] != b"\0\0" or len(content) < start or not dimensions or content[2] not in _TYPES:
        raise DataError(f"{path} is not an idx file: its first bytes are not those of the format")
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", dimensions, offset=4))
    dtype = np.dtype(_TYPES[content[2]])
    expected, got = math.prod(shape) * dtype.itemsize, len(content) - start
    if expected != got:
        raise DataError(
            f"{path} is damaged: its header promises {expected} bytes for {list(shape)}, "
            f"but {got} follow; copy it again"
        )
    return np.frombuffer(content, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))


def _images_file(folder: Path, split: str) -> Path:
    candidates = sorted(p for p in folder.iterdir() if "images" in p.name and "idx" in p.name)
    if not candidates:
        raise DataError(
            f"{folder} has idx files but none with images: it should hold one such as train-images-idx3-ubyte"
        )
    prefixes = _PREFIXES.get(split, (split,))
    fitting = [p for p in candidates if any(prefix in p.name.split("images")[0] for prefix in prefixes)]
    plain = {p.name.removesuffix(".gz") for p in fitting}
    if len(plain) == 1:
        return fitting[0]
    if not fitting and len(candidates) == 1 and split == "train":
        return candidates[0]
    found = ", ".join(p.name for p in fitting or candidates)
    raise DataError(
        f'{folder} does not have exactly one images file for split "{split}" ({found}): name the file itself'
    )


def _labels_file(path: Path) -> Path | None:
    name = path.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1").replace("idx4", "idx1")
    if name == path.name.removesuffix(".gz"):
        return None
    return next((p for p in (path.with_name(name), path.with_name(f"{name}.gz")) if p.exists()), None)
