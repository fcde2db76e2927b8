"""What leaves a run: the decoder with its report, and what stays behind with the curator."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ..runs.checkpoint import RunError, write_atomic, write_json, write_text
from .data import ImageData, to_pixels
from .figures import image_grid, plot_curves, write_png
from .models import Decoder, ModelError, ModelSpec, build_decoder
from .report import headline, write_report

_PER_CLASS = 10
_UNLABELLED = 64
_RECORDS = "training records: for the curator only"


def save_decoder(decoder: Decoder, folder: Path, privacy: str = "") -> None:
    """Write ``decoder.json`` (what it is built from) and ``decoder.safetensors`` (its weights), each atomically.

    ``privacy``: what is guaranteed of the weights, as metadata of their file by this name.
    """
    write_json(folder / "decoder.json", asdict(decoder.spec))
    state = {name: value.detach().cpu().contiguous() for name, value in decoder.state_dict().items()}
    write_atomic(folder / "decoder.safetensors", lambda file: file.write(save(state, {"privacy": privacy})))


def load_decoder(folder: str | Path) -> Decoder:
    """A released decoder, ready to :meth:`~dp2vae_fast.vae.models.Decoder.sample`. Runs no code from the files.

    Raises :class:`~dp2vae_fast.runs.checkpoint.RunError`: no decoder there, or one that cannot be read.
    """
    folder = Path(folder)
    try:
        settings = json.loads((folder / "decoder.json").read_text(encoding="utf-8"))
        decoder = build_decoder(ModelSpec(**settings | {"image_shape": tuple(settings["image_shape"])}))
        decoder.load_state_dict(load_file(folder / "decoder.safetensors"))
    except FileNotFoundError as error:
        raise RunError(f"{folder} holds no decoder: name the folder of a finished run") from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, ModelError) as error:
        raise RunError(f"the decoder in {folder} cannot be read: release it again from its run") from error
    return decoder.eval()


def save_release(folder: Path, decoder: Decoder, report: dict[str, Any], metrics: dict[str, Any] | None) -> None:
    """Write what stands outside ``curator/``: the release, and the metrics beside it.

    The decoder comes last, so that none is ever without its report. Weights and picture carry the guarantee, or that
    there is none, in one sentence: files are passed on singly.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_report(report, folder)
    if metrics is not None:
        write_json(folder / "metrics.json", metrics)
    write_png(folder / "samples.png", sample_grid(decoder), headline(report))
    save_decoder(decoder, folder, headline(report))


def sample_grid(decoder: Decoder) -> np.ndarray:
    """A picture of samples, uint8 ``[H, W, C]``: a row a class, or a square where there are no classes."""
    classes = decoder.spec.num_classes
    generator = torch.Generator().manual_seed(0)
    if not classes:
        return image_grid(to_pixels(decoder.sample(_UNLABELLED, generator=generator)), columns=8)
    labels = torch.arange(min(classes, 20)).repeat_interleave(_PER_CLASS)
    images = to_pixels(decoder.sample(len(labels), labels, generator=generator))
    return image_grid(images, columns=_PER_CLASS)


def save_for_curator(folder: Path, train: ImageData, history: list[dict[str, Any]]) -> None:
    """Write what no guarantee covers, for one user alone: pictures of records, and losses that are not noised."""
    folder.mkdir(0o700, parents=True, exist_ok=True)
    write_png(folder / "real.png", image_grid(train.images[:_UNLABELLED], columns=8), _RECORDS)
    if history:
        table = io.StringIO()
        writer = csv.DictWriter(table, fieldnames=list(history[0]))
        writer.writeheader()
        writer.writerows(history)
        write_text(folder / "history.csv", table.getvalue())
        plot_curves(history, folder / "curves.png")
