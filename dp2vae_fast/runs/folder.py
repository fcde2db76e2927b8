"""The folder of a run: what is released in it, what stays with the curator, and when it may be opened.

::

    OUT/decoder.safetensors  decoder.json  privacy.json  privacy.md  samples.png  metrics.json
    OUT/curator/run.json  ledger  audit.json  history.csv  curves.png  real.png
    OUT/curator/stage1.pt  DP-SGD.pt  latents.f32  latents.f32.json, and of stage 1, by the encoder mode:
                class-means.pt  covariance.pt  DP-SGD-of-the-encoder.pt  warm-start.pt  pre-training.pt

Only what lies outside ``curator/`` may leave the curator's hands, without ``metrics.json``: no figure in it is private,
as it says itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import MECHANISM_TABLES, Config
from .checkpoint import RunError, load_checkpoint, remove_temporaries, save_checkpoint, write_json
from .ledger import Ledger

_SIGNS_OF_A_RUN = ("decoder.safetensors", "privacy.json")
_IDENTITY = {"ledger", "run.json"}


class RunFolder:
    """The folder of one run, opened for training; a context manager that holds the ledger's lock.

    Args:
        path: where the run lives; created, with its parents, when missing. None: nothing is written anywhere.
        resume: go on with the run that is there, or start one. Without it a folder that holds a run is refused.
        config: settings of the run. A resumed run must have the same, except for performance (other
            than the engine) and for the path of the data.
        data_sha256: digest of the training records, which must be the same too.

    Raises :class:`~dp2vae_fast.runs.checkpoint.RunError`: the folder holds a run, another run, or cannot be written.
    """

    def __init__(self, path: Path | None, *, resume: bool, config: Config, data_sha256: str) -> None:
        self.path = path
        self._id: str | None = None
        self._created: list[Path] = []
        self._is_new = False
        self.ledger = Ledger()
        if path is None:
            return
        check_output(path, resume=resume)
        created = _make_folder(path / "curator")
        try:
            self.ledger = Ledger(path / "curator" / "ledger")
            self._created = created  # who has no lock removes nothing: it may be another process's
            remove_temporaries(path)
            remove_temporaries(path / "curator")
            self._identify(path, config, data_sha256)
        except BaseException as error:
            self.__exit__()
            if isinstance(error, OSError):
                raise RunError(f"cannot write into {path}: {error.strerror}") from error
            raise

    def curator_file(self, name: str) -> Path | None:
        """Where a file of the curator's belongs; None where nothing is written."""
        return None if self.path is None else self.path / "curator" / name

    def load(self, name: str) -> dict[str, Any] | None:
        """The state that was saved under ``curator/name``, or None; a state of another run is refused."""
        file = self.curator_file(name)
        state = None if file is None else load_checkpoint(file)
        if state is not None and state.get("run") != self._id:
            raise RunError(f"{file} belongs to another run: put the run's own file back, or train into a new folder")
        return state

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Save a state atomically as ``curator/name``, with the run's id."""
        if self.path is not None:
            save_checkpoint(self.path / "curator" / name, state | {"run": self._id})

    def _identify(self, folder: Path, config: Config, data_sha256: str) -> None:
        file = folder / "curator" / "run.json"
        if not file.exists():
            strangers = [sign for sign in _SIGNS_OF_A_RUN if (folder / sign).exists()]
            strangers += sorted(f"curator/{p.name}" for p in file.parent.iterdir() if p.name not in _IDENTITY)
            strangers += ["curator/ledger"] if self.ledger.spent() else []
            if strangers:
                raise RunError(f"{folder} holds {strangers[0]} of an unknown run: train into a new folder")
            self._id, self._is_new = secrets.token_hex(16), True
            known = {"id": self._id, "recipe": config.recipe, "config": config.to_dict(), "data_sha256": data_sha256}
            write_json(file, known)
            return
        known = read_run(folder)
        self._id = known["id"]
        differences = [
            f"{name} was {known['config'][table].get(name)!r} and is now {value!r}"
            for table in MECHANISM_TABLES
            for name, value in json.loads(json.dumps(config.to_dict()[table])).items()
            if name != "data" and known["config"][table].get(name) != value
        ]
        engine = known["config"]["performance"].get("engine")  # what the report says of rounding depends on it
        if engine != config.performance.engine:
            differences.append(f"engine was {engine!r} and is now {config.performance.engine!r}")
        if differences:
            changed = "; ".join(differences)
            raise RunError(f"{folder} holds a run of another configuration ({changed}): train into a new folder")
        if known["data_sha256"] != data_sha256:
            raise RunError(f"{folder} holds a run on other data: resume with those, or train into a new folder")

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *error: object) -> None:
        """Remove what was created for a run that never drew noise, nothing that was there before; then release the
        lock."""
        unused = not self.ledger.spent() and (self._created or self._is_new)
        if unused and self.path is not None:
            curator = self.path / "curator"
            # A checkpoint may come from training without noise: it must never be parted from the run it belongs to.
            if {p.name for p in curator.iterdir()} <= _IDENTITY:
                for name in _IDENTITY:
                    (curator / name).unlink(missing_ok=True)
        self.ledger.close()
        if unused:
            _remove_empty(self._created)


def read_run(path: Path) -> dict[str, Any]:
    """The identity of the run in ``path``: its recipe, configuration and data hash."""
    file = path / "curator" / "run.json"
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path} holds no run (no curator/run.json): name the folder of one") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{file} cannot be read ({error}): the run cannot be used") from error
    if not _is_identity(known):
        raise RunError(f"{file} does not say what the run is made of: put back its own, or train into a new folder")
    return known


def _is_identity(known: Any) -> bool:
    """Whether id, settings and data hash are there."""
    if not isinstance(known, dict) or not all(isinstance(known.get(name), str) for name in ("id", "data_sha256")):
        return False
    tables = known.get("config")
    return (
        isinstance(tables, dict)
        and set(Config().to_dict()) <= set(tables)
        and all(isinstance(table, dict) for table in tables.values())
    )


def data_sources(config: Config) -> list[Path]:
    """Files and folders that a run reads its images from."""
    named = (config.data.data, config.privacy.public_encoder)
    return [Path(os.path.expanduser(source)) for source in named if source and source != "digits"]


def holds_run(path: Path) -> bool:
    """Whether there is anything of a run in ``path``, be it damaged."""
    curator = path / "curator"
    return any((path / sign).exists() for sign in _SIGNS_OF_A_RUN) or (curator.is_dir() and any(curator.iterdir()))


def check_output(path: Path, *, resume: bool, sources: Sequence[Path] = ()) -> None:
    """Refuse an output folder that cannot be used, without writing anything.

    ``sources`` are what images are read from: a run's folder must neither hold them nor lie among them.
    """
    if path.exists() and not path.is_dir():
        raise RunError(f"cannot write into {path}: it is not a folder")
    for source in sources:
        here, there = path.resolve(), source.resolve()
        if here == there or here in there.parents or there in here.parents:
            raise RunError(f"cannot write into {path}: it holds, or lies in, the data {source}: choose another folder")
    if not resume and holds_run(path):
        raise RunError(f"{path} already holds a run: add --resume to go on with it, or choose another folder")
    others = sorted(p.name for p in path.iterdir() if p.name[0] != ".") if path.is_dir() and not holds_run(path) else []
    if others and others != ["curator"]:
        raise RunError(f"{path} holds {others[0]} and no run: choose a new folder, or an empty one")
    nearest = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise RunError(f"cannot write into {path}: {nearest} is not a folder that may be written")


def _make_folder(folder: Path) -> list[Path]:
    """Create ``folder`` and its parents; returns those that were missing, innermost first."""
    missing = [f for f in (folder, *folder.parents) if not f.exists()]
    try:
        folder.mkdir(0o700, parents=True, exist_ok=True)  # parents are as usual
    except OSError as error:
        _remove_empty(missing)
        raise RunError(f"cannot write into {folder.parent}: {error.strerror}") from error
    return missing


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
