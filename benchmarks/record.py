"""A record that grows row by row on disk, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from environment import environment


class Record:
    """Rows under ``path``, told apart by their entries ``key``.

    Raises:
        SystemExit: the file was made elsewhere or from another commit.
    """

    def __init__(self, path: Path, key: tuple[str, ...], *, again: bool = False, **about: Any) -> None:
        self.path, self.key = path, key
        self.content: dict[str, Any] = {"environment": environment(), **about, "rows": []}
        if path.exists() and not again:
            old = json.loads(path.read_text())
            if {**old, "rows": []} != self.content:
                raise SystemExit(f"{path} was made elsewhere, otherwise or from another commit: use --again, or --out")
            self.content = old

    def __contains__(self, row: dict[str, Any]) -> bool:
        return any(all(old[k] == row[k] for k in self.key) for old in self.content["rows"])

    def add(self, row: dict[str, Any]) -> None:
        """Add a row and write the file."""
        self.content["rows"].append(row)
        self.write()

    def write(self) -> None:
        """Write the file, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.content, indent=1) + "\n")
        part.replace(self.path)


def rounded(value: Any) -> Any:
    """The same with numbers of four digits, which is more than a measurement knows."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
