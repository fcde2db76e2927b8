"""Hugging Face ``datasets`` from disk. Nothing is downloaded, and nothing is written into a cache."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from .arrays import labels_from, pixels_from
from .images import DataError, ImageData, make_image_data
from .pictures import Pictures, Wanted, read_pictures

try:
    import datasets
    from datasets.table import InMemoryTable
except ImportError as _error:
    raise DataError('Hugging Face data sets need the datasets library: pip install "dp2vae_fast[train]"') from _error


def read_saved(path: Path, wanted: Wanted) -> ImageData:
    """Read what ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote."""
    try:
        loaded: Any = datasets.load_from_disk(str(path))
    except Exception as error:
        raise DataError(
            f"{path} cannot be opened by datasets {datasets.__version__}: save it again with save_to_disk"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        return _read(_choose_split(path, loaded, wanted.split), f"{path}[{wanted.split}]", wanted)
    wanted.require_only_split(str(path))
    return _read(loaded, str(path), wanted)


def read_parquet(path: Path, files: Sequence[Path], wanted: Wanted) -> ImageData:
    """Read ``.parquet`` files; the split is what their names begin with, up to the first hyphen or dot."""
    import pyarrow
    from pyarrow import parquet

    if path.is_dir():
        splits = {f.name.replace(".", "-").partition("-")[0] for f in files}
        if wanted.split in splits:
            files = [f for f in files if f.name.replace(".", "-").partition("-")[0] == wanted.split]
        elif len(splits) > 1 or wanted.split != "train":
            raise DataError(
                f'{path} has no split "{wanted.split}", only {", ".join(sorted(splits))}: name the .parquet file itself'
            )
    else:
        wanted.require_only_split(str(path))
    try:
        table = pyarrow.concat_tables([parquet.read_table(f) for f in files])
        dataset = datasets.Dataset(InMemoryTable(table))
    except (pyarrow.ArrowException, ValueError, TypeError) as error:
        raise DataError(f"{path} cannot be read as parquet: export it again") from error
    return _read(dataset, str(path), wanted)


def _choose_split(path: Path, parts: Any, split: str) -> Any:
    if split in parts:
        return parts[split]
    if split == "train" and len(parts) == 1:
        return next(iter(parts.values()))
    raise DataError(
        f'{path} has no split "{split}", only {", ".join(parts)}: rename one, or save that split on its own'
    )


def _read(dataset: Any, name: str, wanted: Wanted) -> ImageData:
    if len(dataset) == 0:
        raise DataError(f"{name} holds no images: name a source with at least one")
    image_column = _image_column(dataset.features, name)
    if isinstance(dataset.features[image_column], datasets.Image):
        images = read_pictures(_pictures(dataset, image_column, name), f"{name}[{image_column}]", wanted)
    else:
        array = np.asarray(dataset.with_format("numpy", columns=[image_column])[:][image_column])
        images = pixels_from(array, f"{name}[{image_column}]", wanted)
    label_column = _label_column(dataset.features)
    if label_column is None:
        return make_image_data(images, name=name)
    feature = dataset.features[label_column]
    names = feature.names if isinstance(feature, datasets.ClassLabel) else []
    column = dataset.with_format(None).select_columns([label_column])[:][label_column]
    if None in column:
        raise DataError(f"{name}[{label_column}]: record {column.index(None)} has no label: remove it or label it")
    labels = labels_from(np.asarray(column), f"{name}[{label_column}]")
    return make_image_data(images, labels, name=name, num_classes=wanted.num_classes, class_names=names)


def _pictures(dataset: Any, column: str, name: str) -> Pictures:
    encoded = dataset.with_format(None).select_columns([column]).cast_column(column, datasets.Image(decode=False))

    def open_picture(index: int) -> Image.Image:
        value = encoded[index][column]
        if value is None or (value["bytes"] is None and value["path"] is None):
            raise UnidentifiedImageError("the record has no image")
        return Image.open(value["path"] if value["bytes"] is None else BytesIO(value["bytes"]))

    return Pictures(len(dataset), open_picture, describe=lambda index: f"{name}: record {index}")


def _image_column(features: Any, name: str) -> str:
    pictures = [c for c, f in features.items() if isinstance(f, datasets.Image)]
    arrays = [c for c, f in features.items() if isinstance(f, datasets.Array2D | datasets.Array3D)]
    found = pictures or arrays
    preferred = [c for c in found if c in ("image", "images", "img")]
    if len(found) == 1 or len(preferred) == 1:
        return (preferred or found)[0]
    columns = ", ".join(features)
    many = "several image columns" if found else "no image column"
    raise DataError(
        f'{name} has {many} among {columns}: call the one to train on "image" and give it the Image feature'
    )


def _label_column(features: Any) -> str | None:
    classes = [c for c, f in features.items() if isinstance(f, datasets.ClassLabel)]
    named = [c for c in ("label", "labels", "fine_label", "target", "class") if c in features]
    return next((c for c in (*(n for n in named if n in classes), *classes, *named)), None)
