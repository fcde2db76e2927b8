"""Which reader a source belongs to."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from .arrays import labels_from, pixels_from, read_npy, read_npz
from .folder import read_image_folder
from .idx import is_idx, read_idx
from .images import DataError, ImageData, make_image_data
from .pictures import Wanted

KINDS = (
    'use "digits", a folder of images, .npy, .npz, MNIST-style idx files, .parquet, '
    "or a Hugging Face data set saved to disk"
)


def load_images(
    source: str | Path,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    split: str = "train",
    num_classes: int | None = None,
) -> ImageData:
    """Read images, and labels where there are any, into memory.

    Sources:
        ``"digits"``: scikit-learn's 1797 digits of 8x8 pixels. Level v of 0 .. 16 becomes
            ``round(v * 255 / 16)``; nothing is lost, since ``round(pixel * 16 / 255)`` gives v back.
        Folder of images: a subfolder a class, sorted by name; or all images in the folder itself, unlabelled.
            Subfolders that are all called ``train``, ``test``, ``val`` are splits.
        ``.npy``: images; labels from the file called ``labels`` where this one is called ``images``, else
            from ``NAME_labels.npy``. A folder that holds ``images.npy`` will do.
        ``.npz``: ``images`` and ``labels``, or the names of Keras and MedMNIST (``x_train``,
            ``train_images``, ...); optionally ``num_classes`` or ``class_names``.
        idx: MNIST-style files, gzipped or not, or a folder of them; labels as for ``.npy``.
        Hugging Face: a ``save_to_disk`` folder, a ``.parquet`` file, or a folder of them. The columns are
            found by their feature types.

    Arrays are [N, H, W], [N, H, W, C] or [N, C, H, W] with C = 1 or 3; whole numbers from 0 to 255, or floats
    in [0, 1], which are rounded to 8 bits. Transparency is dropped; EXIF orientation is applied.

    Args:
        image_size: side length in pixels. Images of another size are cropped centrally to a square and
            resized (Lanczos). None: images stay as they are, and must all have one size.
        channels: 1 for grey (ITU-R 601 luma), 3 for RGB; None: grey if all images are grey, else RGB.
        split: which part of a source that has several; a source of one part is called "train".
        num_classes: declares the classes 0 .. num_classes - 1 where the source does not.

    Every transform looks at one record at a time.
    Raises :class:`DataError` with one line for everything that cannot be read.
    """
    if image_size is not None and image_size < 1:
        raise DataError(f"image_size = {image_size}: expected at least 1")
    if channels not in (None, 1, 3):
        raise DataError(f"channels = {channels}: expected 1 (grey) or 3 (RGB)")
    wanted = Wanted(image_size, channels, split, num_classes)
    if source == "digits":
        return _digits(wanted)
    path = Path(os.path.expanduser(source))  # as it is, where there is no such user
    try:
        return _read(path, wanted)
    except DataError:
        raise
    except MemoryError as error:
        raise DataError(f"{path} does not fit into memory: use fewer images or a smaller image_size") from error
    except OSError as error:
        raise DataError(f"{error.filename or path} cannot be read: {error.strerror or error}") from error


def _read(path: Path, wanted: Wanted) -> ImageData:
    if not path.exists():
        raise DataError(f"{path} does not exist: {KINDS}")
    if path.is_file():
        return _read_file(path, wanted)
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        from .huggingface import read_saved

        return read_saved(path, wanted)
    if (path / "images.npy").exists():
        return read_npy(path / "images.npy", wanted)
    if any(path.glob("*idx[1-4]-ubyte*")):
        return read_idx(path, wanted)
    if parquet := sorted({*path.glob("*.parquet"), *path.glob("data/*.parquet")}):
        from .huggingface import read_parquet

        return read_parquet(path, parquet, wanted)
    return read_image_folder(path, wanted)


def _read_file(path: Path, wanted: Wanted) -> ImageData:
    if path.suffix == ".npy":
        return read_npy(path, wanted)
    if path.suffix == ".npz":
        return read_npz(path, wanted)
    if path.suffix == ".parquet":
        from .huggingface import read_parquet

        return read_parquet(path, [path], wanted)
    if is_idx(path):
        return read_idx(path, wanted)
    raise DataError(f"{path} is not a kind of file that can be read: {KINDS}")


def _digits(wanted: Wanted) -> ImageData:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError('"digits" comes with scikit-learn: pip install "dp2vae_fast[train]"') from error
    wanted.require_only_split("digits")
    levels, classes = load_digits(return_X_y=True)
    pixels = np.rint(np.asarray(levels) * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    labels = labels_from(np.asarray(classes), "digits")
    return make_image_data(pixels_from(pixels, "digits", wanted), labels, name="digits", num_classes=10)
