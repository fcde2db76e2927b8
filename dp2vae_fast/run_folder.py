"""The folder of a run: what is released in it, what stays with the curator, and when it may be opened.

::

    OUT/decoder.safetensors  decoder.json  privacy.json  privacy.md  samples.png  metrics.json
    OUT/curator/run.json  ledger  checkpoint.pt  stage1.pt  history.csv  curves.png  real.png

Only what lies outside ``curator/`` may leave the curator's hands; ``metrics.json`` says itself which of its
figures are private.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from .config import MECHANISM_TABLES, Config
from .vae.checkpoint import RunError, remove_temporaries, write_json
from .vae.ledger import Ledger

_SIGNS_OF_A_RUN = ("curator/run.json", "decoder.safetensors", "privacy.json")


class RunFolder:
    """The folder of one run, opened for training.

    Args:
        path: where the run lives; created, with its parents, when missing.
        resume: go on with the run that is there. Without it a folder that holds a run is refused.

    Raises :class:`~dp2vae_fast.vae.checkpoint.RunError`: the folder holds a run, holds none to resume, or
    cannot be written.
    """

    def __init__(self, path: Path, *, resume: bool) -> None:
        self.path = path
        self.curator = path / "curator"
        check_output(path, resume=resume)
        self._created = _make_folder(self.curator)
        try:
            remove_temporaries(path)
            remove_temporaries(self.curator)
            self.ledger = Ledger(self.curator / "ledger")
        except OSError as error:
            self._remove_created()
            raise RunError(f"cannot write into {path}: {error.strerror}") from error

    def identify(self, config: Config, data_sha256: str) -> None:
        """Write ``run.json`` for a new run; for a resumed one make sure that configuration and data are still
        the same.

        Settings of performance may differ: they do not change the mechanism.
        """
        file = self.curator / "run.json"
        if not file.exists():
            write_json(
                file, {"recipe": config.recipe, "config": config.to_dict(), "data_sha256": data_sha256}
            )
            return
        known = read_run(self.path)
        differences = [
            f"{name} was {known['config'][table].get(name)!r} and is now {value!r}"
            for table in MECHANISM_TABLES
            for name, value in json.loads(json.dumps(config.to_dict()[table])).items()
            if known["config"][table].get(name) != value
        ]
        if differences:
            changed = "; ".join(differences)
            raise RunError(
                f"{self.path} holds a run of another configuration ({changed}): train into a new folder"
            )
        if known["data_sha256"] != data_sha256:
            raise RunError(
                f"{self.path} holds a run on other data: resume with those, or train into a new folder"
            )

    def close(self) -> None:
        """Release the lock. A folder made for a run that never came to draw noise is removed again; one that
        was there before is not."""
        drawn = bool(self.ledger.spent())
        self.ledger.close()
        if not drawn:
            self._remove_created()

    def _remove_created(self) -> None:
        for name in ("ledger", "run.json"):
            if self._created:
                (self.curator / name).unlink(missing_ok=True)
        for folder in self._created:
            try:
                folder.rmdir()
            except OSError:
                return


def read_run(path: Path) -> dict[str, Any]:
    """The identity of the run in ``path``: its recipe, configuration and data hash."""
    file = path / "curator" / "run.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path} holds no run to resume: leave --resume out to start one") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{file} cannot be read ({error}): the run cannot be resumed") from error


def check_output(path: Path, *, resume: bool) -> None:
    """Refuse an output folder that cannot be used, without writing anything."""
    if path.exists() and not path.is_dir():
        raise RunError(f"cannot write into {path}: it is not a folder")
    if resume:
        read_run(path)
    elif any((path / sign).exists() for sign in _SIGNS_OF_A_RUN):
        raise RunError(f"{path} already holds a run: add --resume to go on with it, or choose another folder")
    nearest = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise RunError(f"cannot write into {path}: {nearest} is not a folder that may be written")


def _make_folder(folder: Path) -> list[Path]:
    """Create ``folder`` and its parents; returns those that were missing, innermost first."""
    missing = [f for f in (folder, *folder.parents) if not f.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        for created in missing:
            if created.is_dir():
                shutil.rmtree(created)
        raise RunError(f"cannot write into {folder.parent}: {error.strerror}") from error
    return missing
