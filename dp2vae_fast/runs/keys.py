"""Noise keys of a run: one key a stage, a fresh set whenever noise could otherwise repeat.

Seeded keys may be used again after a stop, but only to repeat the very same draws on the very same data: same
settings, same data, same software, same machine type. The ledger remembers under which circumstances its current key
was made.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass

import torch

from ..config import MECHANISM_TABLES, Config
from ..engine.keystream import Keystream
from .checkpoint import fingerprint
from .environment import circumstances
from .ledger import Ledger

# PyTorch's state of a generator on the CPU: three words of its own, then those of MT19937, all as 64 bits each.
_HEADER, _WORDS = 3, 624


@dataclass(frozen=True)
class RunKeys:
    """The keys of one stretch of a run.

    ``number`` counts the sets of keys that the run has had. A seeded key depends on ``mechanism`` (a fingerprint of the
    settings) too, so that two runs of different settings that share a seed do not share their noise. The noise key
    depends on ``noise``, a fingerprint of all that a noisy sum follows from: on the records, as the same noise on two
    neighbouring data sets would cancel between two releases, and on settings of performance. By these sums differ in
    the latents that rows get, in rounding and in the size of their noise, and would cancel it as well.
    """

    seed: int | None
    number: int
    mechanism: str = ""
    noise: str = ""

    def keystream(self, stage: str) -> Keystream:
        """Where the noise and the coins of ``stage`` come from: the operating system, or the seed."""
        if self.seed is None:
            return Keystream.secret()
        return Keystream.seeded(self._derive(f"noise {self.noise} {stage}"), once=False)

    def generator(self, purpose: str) -> torch.Generator:
        """Initial weights and reparametrisation noise.

        The guarantee needs the latter to be independent of the records and unknown to whoever sees the release: latents
        are drawn by place in the batch, and only while they are exchangeable does a record change nobody else's. So the
        whole state is filled: of a seed, PyTorch's generator on the CPU takes 32 bits.
        """
        if self.seed is None:
            seed, state = secrets.randbits(63), secrets.token_bytes(4 * _WORDS)
        else:
            seed, state = self._derive(purpose) % 2**63, hashlib.shake_256(self._text(purpose)).digest(4 * _WORDS)
        generator = torch.Generator().manual_seed(seed)
        whole = generator.get_state()
        words = torch.frombuffer(bytearray(state), dtype=torch.int32).to(torch.int64) & 0xFFFFFFFF
        whole.view(torch.int64)[_HEADER : _HEADER + _WORDS] = words
        return generator.set_state(whole)

    def _derive(self, purpose: str) -> int:
        return int.from_bytes(hashlib.sha256(self._text(purpose)).digest(), "big")

    def _text(self, purpose: str) -> bytes:
        return f"{self.seed}/{self.number}/{self.mechanism}/{purpose}".encode()


def take_keys(
    ledger: Ledger, config: Config, data_sha256: str, device: torch.device, checkpoint_key: int | None
) -> RunKeys:
    """The keys to go on with: those of the stretch before where a seeded run repeats itself exactly, else fresh ones.

    ``checkpoint_key`` is the number of the keys that the last checkpoint was made with, None without a checkpoint. If
    later keys have been in use since, the earlier ones must not be continued: their next steps are counted as the
    later keys'.
    """
    seed = config.privacy.seed
    if seed is None:
        return RunKeys(None, ledger.begin_key())
    here = fingerprint(config.fingerprint(), data_sha256, circumstances(device))
    known = ledger.key_number >= 0 and ledger.replay == here
    again = known and checkpoint_key in (None, ledger.key_number)
    return RunKeys(
        seed,
        ledger.key_number if again else ledger.begin_key(here),
        mechanism=config.fingerprint(*MECHANISM_TABLES),
        noise=fingerprint(config.fingerprint(), data_sha256, device.type),
    )
