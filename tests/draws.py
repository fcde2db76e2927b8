"""``python tests/draws.py LOG ARGUMENTS...``: the command line, with every draw of the generator written to LOG first.

A line a draw: operation, digest of the key, mechanism, domain, step, parameter indices. It is on disk before the draw
is made, so whatever was drawn when the process dies is in the log.
"""

import hashlib
import inspect
import os
import sys

from dp2vae_fast.ops._op import Op
from dp2vae_fast.ops.noise import NOISE

DRAWING = ("add_noise_", "noise_sgd_", "noise_adam_", "random_words")


def log_draws(path: str) -> None:
    """From now on, append a line to the file at ``path`` before every draw."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    call = Op.__call__

    def logged(self, *args, backend=None, **kwargs):
        if self.name in DRAWING:
            given = inspect.signature(self.reference).bind(*args, **kwargs).arguments
            key = hashlib.sha256(given["key"].numpy().tobytes()).hexdigest()[:16]
            indices = ",".join(map(str, given.get("indices", [given.get("index")])))
            fields = (self.name, key, given["mechanism"], given.get("domain", NOISE), int(given["step"]), indices)
            os.write(file, (" ".join(map(str, fields)) + "\n").encode())
        return call(self, *args, backend=backend, **kwargs)

    Op.__call__ = logged


if __name__ == "__main__":
    from dp2vae_fast.cli import main

    log_draws(sys.argv.pop(1))
    main()
