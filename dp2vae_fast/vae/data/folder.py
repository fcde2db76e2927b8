"""Folders of image files: a subfolder a class, or one flat folder without labels."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from .images import DataError, ImageData, make_image_data
from .pictures import Pictures, Wanted, read_pictures

_SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation"}
_IGNORED = {"thumbs.db", "desktop.ini"}


def read_image_folder(folder: Path, wanted: Wanted) -> ImageData:
    """Read ``folder``; subfolders are classes, or splits if they are called so. Hidden files are ignored."""
    subfolders, files = _entries(folder)
    if not subfolders and not files:
        raise DataError(f"{folder} is empty: put images into it, or one subfolder of images for each class")
    if subfolders and {p.name.lower() for p in subfolders} <= _SPLITS:
        chosen = next((p for p in subfolders if p.name.lower() == wanted.split), None)
        if chosen is None:
            names = ", ".join(p.name for p in subfolders)
            raise DataError(
                f'{folder} has no split "{wanted.split}", only {names}: name the folder of the split itself'
            )
        folder = chosen
        subfolders, files = _entries(folder)
        if not subfolders and not files:
            raise DataError(f"{folder} is empty: put images into it, or one subfolder of images for each class")
    else:
        wanted.require_only_split(str(folder))
    if subfolders and files:
        raise DataError(
            f"{folder} holds both subfolders and files such as {files[0].name}: sort every image into a class, or none"
        )

    classes = [_files_below(subfolder) for subfolder in subfolders] or [files]
    paths = [path for members in classes for path in members]
    pictures = Pictures(len(paths), open=lambda i: Image.open(paths[i]), describe=lambda i: str(paths[i]))
    images = read_pictures(pictures, str(folder), wanted)
    if not subfolders:
        return make_image_data(images, name=str(folder))
    labels = torch.cat([torch.full((len(members),), k) for k, members in enumerate(classes)])
    return make_image_data(images, labels, name=str(folder), class_names=[p.name for p in subfolders])


def _entries(folder: Path) -> tuple[list[Path], list[Path]]:
    """Subfolders and files of ``folder``, sorted by name."""
    entries = sorted(p for p in folder.iterdir() if _visible(p))
    return [p for p in entries if p.is_dir()], [p for p in entries if not p.is_dir()]


def _files_below(folder: Path) -> list[Path]:
    paths = sorted(p for p in folder.rglob("*") if not p.is_dir() and all(map(_visible, (p, *_parents(p, folder)))))
    if not paths:
        raise DataError(f"{folder} is empty: a class needs at least one image, so fill it or remove it")
    return paths


def _parents(path: Path, top: Path) -> list[Path]:
    return [top / part for part in path.relative_to(top).parents if part != Path(".")]


def _visible(path: Path) -> bool:
    return not path.name.startswith(".") and path.name.lower() not in _IGNORED
