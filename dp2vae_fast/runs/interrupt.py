"""Ctrl-C between two steps instead of in the middle of one."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from types import FrameType
from typing import Any


class Stopped(KeyboardInterrupt):
    """A run has ended because ``signal`` asked for it."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = number


class StopRequest:
    """While open, the first SIGINT or SIGTERM is only noted, and said to be; a second one interrupts at once.

    Signals reach the main thread only; elsewhere nothing is changed.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._signal: int | None = None
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self._signal is not None

    def obey(self) -> None:
        """Raise :class:`Stopped` where a signal has come."""
        if self._signal is not None:
            raise Stopped(self._signal)

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self._SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise Stopped(number)
        self._signal = number
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # a closed stream, or one in the middle of a write
            print("stopping after the present step; once more: at once", file=sys.stderr, flush=True)
