"""Real images for tests: crops of scikit-learn's two sample photographs, as a folder of two classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image

PHOTOGRAPHS = ("china", "flower")


def crops(photograph: str, count: int, size: int = 64) -> np.ndarray:
    """``count`` crops from an even grid of corners (they may overlap): uint8 [count, size, size, 3]."""
    picture = load_sample_image(f"{photograph}.jpg")
    height, width = picture.shape[:2]
    columns = int(np.ceil(np.sqrt(count * width / height)))
    rows = -(-count // columns)
    tops = np.linspace(0, height - size, rows).astype(int)
    lefts = np.linspace(0, width - size, columns).astype(int)
    corners = [(top, left) for top in tops for left in lefts][:count]
    return np.stack([picture[top : top + size, left : left + size] for top, left in corners])


def make_image_folder(folder: Path, per_class: int = 40, size: int = 64) -> Path:
    """Write ``per_class`` colour images of ``size`` x ``size`` pixels into each of two class subfolders."""
    for photograph in PHOTOGRAPHS:
        (folder / photograph).mkdir(parents=True)
        for index, crop in enumerate(crops(photograph, per_class, size)):
            Image.fromarray(crop).save(folder / photograph / f"{index:04d}.png")
    return folder
