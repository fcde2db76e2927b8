"""The ledger: what the accountant must count, on disk *before* any noise is drawn.

A run may be killed at any instruction. What has then been spent cannot be read from the last checkpoint:
noise drawn after it has met private data all the same. So a step may draw its noise only once the ledger says
that it has; steps are reserved in blocks, and after a crash the whole block counts as spent. A clean stop
writes the exact number.

The file is append-only text: one record of fixed size per line, each with a checksum. Nothing is ever
overwritten, so a write that was cut short can only be the last record, and its step has not drawn anything
yet.
"""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from pathlib import Path

from ..engine.accounting import Mechanism
from .checkpoint import RunError, sync_folder

RECORD = 256
BLOCK = 8
_sync = getattr(os, "fdatasync", os.fsync)


class Ledger:
    """Counts, per mechanism, the steps whose noise may have been drawn on private data.

    ``path=None`` keeps the ledger in memory, for runs that cannot be resumed. With a path the file is created
    when it is missing and locked for as long as the object lives: a second process that trains into the same
    folder is refused, because its draws would be counted once and made twice.

    Guarantees: when :meth:`reserve` returns, the file (synced) says at least the number of steps asked for; a
    torn last record is dropped, any other damage raises :class:`RunError` because the spent budget would be
    unknown.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._spent: dict[str, Mechanism] = {}
        self._before: dict[str, int] = {}
        self._found: dict[str, int] = {}
        self._file: int | None = None
        self.key_number = -1
        self.replay = ""
        if path is not None:
            self._open(path)

    def _open(self, path: Path) -> None:
        is_new = not path.exists()
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise RunError(f"another process is training into {path.parent.parent}: wait for it, or stop it") from None
        if not os.fstat(file).st_nlink:
            os.close(file)
            raise RunError(f"another process has just given up {path.parent.parent}: start again")
        if is_new:
            sync_folder(path.parent)
        content = _read_all(file)
        records = [_decode(content[i : i + RECORD]) for i in range(0, len(content) - RECORD + 1, RECORD)]
        if records and records[-1] is None:
            del records[-1]
        for number, record in enumerate(records, 1):
            if record is None:
                os.close(file)
                raise RunError(f"{path} is damaged at record {number}: what was spent is unknown, train anew")
            self._apply(record)
        self._found = {name: m.steps for name, m in self._spent.items()}  # perhaps drawn by an earlier process
        os.ftruncate(file, len(records) * RECORD)
        os.lseek(file, 0, os.SEEK_END)
        self._file = file

    def begin_key(self, replay: str = "") -> int:
        """Record that a fresh noise key is in use from here on and return its number (0 for the first one).

        ``replay`` names the circumstances under which a seeded key may be used again for the steps it was
        used for already.
        """
        self._append({"key": self.key_number + 1, "replay": replay})
        return self.key_number

    def find(self, name: str) -> Mechanism | None:
        """The mechanism ``name`` with the steps that count as spent, or None when it was never reserved."""
        return self._spent.get(name)

    def steps(self, name: str) -> int:
        """Steps of the mechanism ``name`` that count as spent (0 when it was never reserved)."""
        return self._spent[name].steps if name in self._spent else 0

    def steps_before_key(self, name: str) -> int:
        """Those of :meth:`steps` that were spent under earlier keys: where the current key begins to
        count."""
        return self._before.get(name, 0)

    def reserve(self, mechanism: Mechanism, step: int, *, last: int | None = None) -> None:
        """Make sure that the first ``step`` steps of ``mechanism`` count as spent before their noise is
        drawn.

        Reserves up to the end of a block of 8 steps, never beyond ``last``; does nothing when the file says
        as much already.
        """
        known = self._spent.get(mechanism.name)
        if known is not None and (known.noise_multiplier, known.sample_rate) != (
            mechanism.noise_multiplier,
            mechanism.sample_rate,
        ):
            raise RunError(
                f"the ledger holds steps of {mechanism.name} at another noise or rate, as another version plans them: "
                "go on with that one, or train into a new folder"
            )
        if step > self.steps(mechanism.name):
            block = -(-step // BLOCK) * BLOCK
            self._append(_spend(mechanism, max(step, min(block, last or step))))

    def settle(self, mechanism: Mechanism, steps: int) -> None:
        """Write the exact number of steps whose noise was drawn, at a clean stop of the process that reserved
        them; never fewer than the file said when this process opened it."""
        steps = max(steps, self._found.get(mechanism.name, 0))
        if steps < self.steps(mechanism.name):
            self._append(_spend(mechanism, steps))

    def spent(self) -> tuple[Mechanism, ...]:
        """Every mechanism that counts, with its number of steps, in the order of first use."""
        return tuple(self._spent.values())

    def close(self) -> None:
        """Release the file and its lock."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _append(self, record: dict) -> None:
        if self._file is not None:
            data = _encode(record)
            if os.write(self._file, data) != len(data):
                raise RunError("the ledger could not be written (disk full?): stopped before drawing uncounted noise")
            _sync(self._file)
        self._apply(record)

    def _apply(self, record: dict) -> None:
        if "key" in record:
            self.key_number, self.replay = record["key"], record["replay"]
            self._before = {name: m.steps for name, m in self._spent.items()}
        else:
            self._spent[record["name"]] = Mechanism(**record)


def _spend(mechanism: Mechanism, steps: int) -> dict:
    return {
        "name": mechanism.name,
        "noise_multiplier": mechanism.noise_multiplier,
        "sample_rate": mechanism.sample_rate,
        "steps": steps,
    }


def _encode(record: dict) -> bytes:
    body = json.dumps(record, separators=(",", ":")).encode()
    data = b"%08x " % zlib.crc32(body) + body
    if len(data) >= RECORD:
        raise ValueError(
            f"a ledger record takes at most {RECORD - 1} bytes, got {len(data)}: shorten the mechanism's name"
        )
    return data.ljust(RECORD - 1) + b"\n"


def _decode(data: bytes) -> dict | None:
    checksum, _, body = data.rstrip().partition(b" ")
    try:
        return json.loads(body) if int(checksum, 16) == zlib.crc32(body) else None
    except ValueError:
        return None


def _read_all(file: int) -> bytes:
    os.lseek(file, 0, os.SEEK_SET)
    parts = []
    while part := os.read(file, 1 << 20):
        parts.append(part)
    return b"".join(parts)
