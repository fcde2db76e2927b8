"""Images in: a reader for every supported source, one frozen object out, one clear line on failure."""

from .images import (
    DataError,
    ImageData,
    check_trainable,
    make_image_data,
    record_digests,
    to_pixels,
    to_unit,
    train_test_split,
)
from .load import load_images

__all__ = [
    "DataError",
    "ImageData",
    "check_trainable",
    "load_images",
    "make_image_data",
    "record_digests",
    "to_pixels",
    "to_unit",
    "train_test_split",
]
