"""Encoded pictures (PNG, JPEG, ...) to one uint8 tensor; all headers are read before anything is decoded."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .images import DataError

_GREY = {"1", "L", "LA", "La"}
_DEEP = {"F", "I"}


@dataclass(frozen=True)
class Wanted:
    """What the caller of :func:`load_images` asked for."""

    image_size: int | None = None
    channels: int | None = None
    split: str = "train"
    num_classes: int | None = None

    def require_only_split(self, name: str) -> None:
        """Refuse every split but "train", for a source of one part."""
        if self.split != "train":
            raise DataError(f'{name} has no split "{self.split}": it is one part, which is called "train"')


@dataclass(frozen=True)
class Pictures:
    """Pictures that are opened by index; ``describe`` names one in a message."""

    count: int
    open: Callable[[int], Image.Image]
    describe: Callable[[int], str]


def read_pictures(pictures: Pictures, name: str, wanted: Wanted) -> Tensor:
    """Decode all pictures: uint8 [N, C, H, W]. Mixed sizes are refused before anything is decoded."""
    headers = [_header(pictures, index) for index in range(pictures.count)]
    channels = wanted.channels or (1 if all(mode in _GREY for mode, _ in headers) else 3)
    if wanted.image_size is None:
        _require_one_size([size for _, size in headers], pictures, name)
        width, height = headers[0][1]
    else:
        width = height = wanted.image_size
    out = np.empty((pictures.count, channels, height, width), dtype=np.uint8)

    def decode(index: int) -> None:
        try:
            with pictures.open(index) as picture:
                picture.load()
                out[index] = convert(picture, channels, wanted.image_size)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(
                f"{pictures.describe(index)} is damaged ({_one_line(error)}): replace or remove it"
            ) from error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for _ in pool.map(decode, range(pictures.count)):
            pass
    return torch.from_numpy(out)


def convert(picture: Image.Image, channels: int, image_size: int | None) -> np.ndarray:
    """One decoded picture as uint8 [C, H, W]: EXIF orientation, colours, then the central square, resized."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    picture = picture.convert("L" if channels == 1 else "RGB")
    if image_size is not None and picture.size != (image_size, image_size):
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        square = picture.crop((left, top, left + side, top + side))
        picture = square.resize((image_size, image_size), Image.Resampling.LANCZOS)
    array = np.asarray(picture)
    return array[None] if channels == 1 else array.transpose(2, 0, 1)


def _header(pictures: Pictures, index: int) -> tuple[str, tuple[int, int]]:
    """Mode and (width, height) as displayed, from the header alone."""
    try:
        with pictures.open(index) as picture:
            mode, (width, height) = picture.mode, picture.size
            # A PNG may carry its EXIF behind the pixels, and asking for it would decode them: only what is in front.
            exif = picture.getexif() if picture.format != "PNG" or "exif" in picture.info else {}
            turned = exif.get(0x0112, 1) >= 5
    except UnidentifiedImageError as error:
        raise DataError(f"{pictures.describe(index)} is not an image: remove it, or move it elsewhere") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{pictures.describe(index)} cannot be opened ({_one_line(error)}): replace or remove it"
        ) from error
    if mode.partition(";")[0] in _DEEP:
        raise DataError(f"{pictures.describe(index)} has more than 8 bits a channel: save it with 8 bits")
    return mode, (height, width) if turned else (width, height)


def _require_one_size(sizes: Sequence[tuple[int, int]], pictures: Pictures, name: str) -> None:
    for index, size in enumerate(sizes):
        if size != sizes[0]:
            first, other = (f"{w}x{h}" for w, h in (sizes[0], size))
            raise DataError(
                f"{name} mixes image sizes "
                f"({pictures.describe(0)} is {first}, {pictures.describe(index)} is {other}): "
                "give an image size (--image-size) to crop and resize them"
            )


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
