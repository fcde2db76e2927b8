"""Pictures: grids of images as PNG files, and the curves of a run for its curator."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.nn.functional import pad

from ..runs.checkpoint import write_atomic

_SEPARATOR = 128
_READABLE = 48


def image_grid(images: Tensor, columns: int, *, scale: int | None = None, gap: int = 2) -> np.ndarray:
    """Images side by side, row by row, on mid-grey: uint8 [N, C, H, W] -> uint8 [H', W', C].

    Args:
        columns: images a row; the last row is filled up with grey.
        scale: how often a pixel is repeated in both directions. None: so often that the longer side has up to
            48 pixels; images larger than that stay as they are.
        gap: grey pixels between images and around them.

    Shapes: ``H' = ceil(N / columns) * (scale * H + gap) + gap``, ``W' = columns * (scale * W + gap) + gap``.
    Raises ``ValueError``: images that are not uint8 [N, C, H, W], none of them, or a size below its minimum.
    """
    if str(images.dtype) != "torch.uint8" or images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"images: expected uint8 [N, C, H, W] with N > 0, but got {images.dtype} {list(images.shape)}")
    count, channels, height, width = images.shape
    if scale is None:
        scale = max(1, _READABLE // max(height, width))
    if columns < 1 or scale < 1 or gap < 0:
        raise ValueError(f"columns = {columns}, scale = {scale}, gap = {gap}: expected at least 1, 1 and 0")
    rows = math.ceil(count / columns)
    large = images.cpu().repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    cells = pad(large, (gap, 0, gap, 0), value=_SEPARATOR)
    cells = pad(cells, (0, 0, 0, 0, 0, 0, 0, rows * columns - count), value=_SEPARATOR)
    cells = cells.view(rows, columns, channels, *cells.shape[2:]).permute(2, 0, 3, 1, 4)
    grid = pad(cells.reshape(channels, rows * cells.shape[2], -1), (0, gap, 0, gap), value=_SEPARATOR)
    return grid.permute(1, 2, 0).contiguous().numpy()


def write_png(path: Path, array: np.ndarray, privacy: str = "") -> None:
    """Write uint8 [H, W, C] with C = 1 or 3, or [H, W], as a PNG file, atomically.

    ``privacy``: what is to be known of it, as a text of the file by this name.

    Raises ``ValueError`` for another shape or dtype.
    """
    pixels = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    if array.dtype != np.uint8 or array.size == 0 or not (pixels.ndim == 2 or array.shape[2:] == (3,)):
        got = f"{array.dtype} {list(array.shape)}"
        raise ValueError(f"{path}: a PNG is written from uint8 [H, W, C] with C = 1 or 3, but got {got}")
    picture, texts = Image.fromarray(np.ascontiguousarray(pixels)), PngInfo()
    if privacy:
        texts.add_itxt("privacy", privacy)
    write_atomic(path, lambda file: picture.save(file, format="PNG", pnginfo=texts))


def plot_curves(rows: Sequence[Mapping[str, float | None]], path: Path) -> None:
    """Draw loss and epsilon over the steps into a PNG file, atomically.

    The loss is not noised, so the picture says that it is for the curator only.

    Args:
        rows: one mapping a step with the keys ``step``, ``loss`` and ``epsilon``. None, NaN and infinities are left
            out; no rows make an empty picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    figure.suptitle("not private: for the curator only")
    steps = _column(rows, "step")
    for place, (key, label) in enumerate((("loss", "loss (mean a record)"), ("epsilon", "ε spent"))):
        axes = figure.add_subplot(2, 1, place + 1)
        values = _column(rows, key)
        known = np.isfinite(values)  # epsilon is known at checkpoints only
        axes.plot(steps[known], values[known], marker="." if known.sum() < 50 else "")
        axes.set(xlabel="step", ylabel=label)
        axes.grid(alpha=0.3)
    canvas = FigureCanvasAgg(figure)
    write_atomic(path, canvas.print_png)


def _column(rows: Sequence[Mapping[str, float | None]], key: str) -> np.ndarray:
    return np.array([row[key] for row in rows], dtype=np.float64)
