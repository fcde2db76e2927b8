"""Pictures: what is in a grid, what a PNG gives back, and that curves are drawn and labelled."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from dp2vae_fast.vae.figures import image_grid, plot_curves, write_png

GREY = 128


def ramp(count: int, channels: int, height: int, width: int) -> torch.Tensor:
    """Images in which every value differs from the separator's."""
    values = torch.arange(count * channels * height * width) % 127
    return values.to(torch.uint8).view(count, channels, height, width)


@pytest.mark.parametrize(
    ("count", "channels", "height", "width", "columns", "scale", "gap"),
    [(1, 1, 8, 8, 1, 1, 0), (5, 3, 4, 6, 3, 2, 2), (6, 1, 3, 2, 3, 5, 1), (2, 3, 5, 5, 4, 1, 2), (7, 1, 2, 2, 1, 3, 0)],
)
def test_every_pixel_is_where_it_belongs(count, channels, height, width, columns, scale, gap):
    images = ramp(count, channels, height, width)
    grid = image_grid(images, columns, scale=scale, gap=gap)
    rows, step_y, step_x = math.ceil(count / columns), scale * height + gap, scale * width + gap
    expected = np.full((rows * step_y + gap, columns * step_x + gap, channels), GREY, dtype=np.uint8)
    for index, image in enumerate(images.numpy()):
        top, left = gap + index // columns * step_y, gap + index % columns * step_x
        large = np.kron(image.transpose(1, 2, 0), np.ones((scale, scale, 1), dtype=np.uint8))
        expected[top : top + scale * height, left : left + scale * width] = large
    assert grid.dtype == np.uint8 and np.array_equal(grid, expected)


def test_tiny_images_are_enlarged_and_large_ones_left():
    assert image_grid(ramp(2, 1, 8, 8), 2).shape == (48 + 4, 2 * 48 + 6, 1)
    assert image_grid(ramp(1, 1, 28, 28), 1).shape == (28 + 4, 28 + 4, 1)
    assert image_grid(ramp(1, 3, 64, 60), 1, gap=0).shape == (64, 60, 3)


@pytest.mark.parametrize(
    ("images", "options", "match"),
    [
        (ramp(1, 1, 2, 2).float(), {}, "expected uint8.*float32"),
        (ramp(1, 1, 2, 2)[0], {}, r"\[1, 2, 2\]"),
        (ramp(1, 1, 2, 2)[:0], {}, r"\[0, 1, 2, 2\]"),
        (ramp(1, 1, 2, 2), {"columns": 0}, "columns = 0"),
        (ramp(1, 1, 2, 2), {"scale": 0}, "scale = 0"),
        (ramp(1, 1, 2, 2), {"gap": -1}, "gap = -1"),
    ],
)
def test_impossible_grids_are_refused(images, options, match):
    with pytest.raises(ValueError, match=match):
        image_grid(images, **({"columns": 1} | options))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_png_round_trip(tmp_path, channels, mode):
    grid = image_grid(ramp(3, channels, 5, 4), 2)
    write_png(tmp_path / "grid.png", grid)
    with Image.open(tmp_path / "grid.png") as picture:
        assert (picture.format, picture.mode) == ("PNG", mode)
        assert np.array_equal(np.asarray(picture).reshape(grid.shape), grid)
    write_png(tmp_path / "grid.png", grid[..., 0])
    with Image.open(tmp_path / "grid.png") as picture:
        assert np.array_equal(np.asarray(picture), grid[..., 0])
    assert [file.name for file in tmp_path.iterdir()] == ["grid.png"]


@pytest.mark.parametrize("shape", [(4,), (4, 4, 2), (4, 4, 3, 1), (0, 4)])
def test_what_is_no_picture_is_not_written(tmp_path, shape):
    with pytest.raises(ValueError, match="written from uint8"):
        write_png(tmp_path / "a.png", np.zeros(shape, dtype=np.uint8))
    with pytest.raises(ValueError, match="float64"):
        write_png(tmp_path / "a.png", np.zeros((4, 4)))
    assert not list(tmp_path.iterdir())


def rows(count: int) -> list[dict[str, float | None]]:
    return [{"step": s, "loss": 40.0 / s, "epsilon": 0.1 * math.sqrt(s)} for s in range(1, count + 1)]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn, as objects."""
    from matplotlib.backends import backend_agg

    figures = []

    class Recorder(backend_agg.FigureCanvasAgg):
        def __init__(self, figure):
            super().__init__(figure)
            figures.append(figure)

    monkeypatch.setattr(backend_agg, "FigureCanvasAgg", Recorder)
    return figures


def test_curves_show_the_rows_and_whom_they_are_for(tmp_path, drawn):
    history = rows(20)
    plot_curves(history, tmp_path / "curves.png")
    assert drawn[0].get_suptitle() == "not private: for the curator only"
    for axes, key in zip(drawn[0].axes, ("loss", "epsilon"), strict=True):
        steps, values = axes.lines[0].get_data()
        assert list(steps) == [row["step"] for row in history] and list(values) == [row[key] for row in history]
        assert axes.get_xlabel() == "step"
    with Image.open(tmp_path / "curves.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert min(pixels.shape[:2]) >= 400 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10


def test_holes_and_short_histories(tmp_path, drawn):
    history = rows(3)
    history[1] |= {"loss": math.nan, "epsilon": math.inf}
    history[2] |= {"epsilon": None}
    plot_curves(history, tmp_path / "holes.png")
    _, epsilon = drawn[0].axes
    assert epsilon.lines[0].get_xdata().tolist() == [history[0]["step"]]  # what is not known is left out
    for count in (0, 1):
        plot_curves(rows(count), tmp_path / "short.png")
        assert len(drawn[-1].axes[0].lines[0].get_xdata()) == count


def test_no_global_state_of_pyplot(tmp_path):
    loaded = "matplotlib.pyplot" in sys.modules
    plot_curves(rows(2), tmp_path / "curves.png")
    assert ("matplotlib.pyplot" in sys.modules) == loaded
