"""One secret key, and the mechanisms that draw from it without ever sharing a block.

A `Keystream` owns the key and numbers the mechanisms; each `Stream` owns one mechanism number and counts its steps. As
the ChaCha20 nonce is (mechanism, domain; step; parameter index), two draws could only meet if a step were taken twice:
so steps only go forwards, they advance *before* the words are drawn, and neither class can be copied or pickled. Of a
secret key there is no second owner. A seeded one may be made again, to go on (`skip_to`) or to repeat a run; a second
one in the same process is warned of.
"""

from __future__ import annotations

import hashlib
import math
import os
import secrets
import threading
import warnings
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from dp2vae_fast.ops import noise

_MAX_STEP = 1 << 32  # a step is one word of the nonce
_MAX_MECHANISM = 1 << 30
_drawn_from: set[bytes] = set()  # fingerprints of the seeded keys that this process has drawn from


def _derive(text: str, use: bytes) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=32, person=b"dp2vae " + use[:9]).digest()


class _Unpicklable:
    """Refuses `copy` and `pickle`: a second owner of the same counters would repeat their noise."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled: its key must not leave the process "
            "and its noise must not repeat. Make a new Keystream where one is needed"
        )


class Keystream(_Unpicklable):
    """One ChaCha20 key; hands out mechanism numbers. Made by `secret`, `seeded` or `from_generator`.

    Guarantees:
        The key is never shown by ``repr``, pickled or written anywhere. Every `stream` has a mechanism of
        its own.
    Args:
        once: warn where this process has drawn from the same key by another Keystream.
    Attributes:
        source: "secret", or "seeded" where the key follows from something that the caller knows.
        names: the name of every stream so far, by mechanism number.
        fingerprint: tells keys apart. A seed could be guessed by it: it must not leave the process.
    """

    __slots__ = ("_keys", "_lock", "_once", "_process", "_start", "_streams", "fingerprint", "source")

    def __init__(self, key: bytes, source: str, *, once: bool = False) -> None:
        if len(key) != 32:
            raise ValueError(f"key has {len(key)} bytes, expected 32")
        self.source = source
        self.fingerprint = _derive(key.hex(), b"print")
        self._once = once
        self._keys = {torch.device("cpu"): torch.frombuffer(bytearray(key), dtype=torch.int32)}
        self._lock = threading.Lock()
        self._streams: list[Stream] = []
        self._start = 0, 0
        self._process = os.getpid()

    @classmethod
    def secret(cls) -> Keystream:
        """A fresh key from the operating system: what a private release needs."""
        return cls(secrets.token_bytes(32), "secret")

    @classmethod
    def seeded(cls, seed: int, *, once: bool = True) -> Keystream:
        """A key derived from `seed`, for reproducible runs: whoever knows the seed can subtract the noise.

        ``once=False`` is for a caller who sees to it that nothing but the same draws on the same data is repeated.
        """
        return cls(_derive(str(int(seed)), b"seed"), "seeded", once=once)

    @classmethod
    def from_generator(cls, generator: torch.Generator) -> Keystream:
        """A key derived from 256 bits drawn from `generator`, which advances. Its state is no secret."""
        words = torch.randint(-(2**31), 2**31, (8,), generator=generator, device=generator.device).tolist()
        return cls(_derive(str(words), b"generator"), "seeded", once=True)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(stream.name for stream in self._streams)

    @property
    def position(self) -> tuple[int, int]:
        """The first step, and the first coin step, that none of the streams so far has taken."""
        each = [self._start, *((stream.step, stream.coin_step) for stream in self._streams)]
        return max(step for step, _ in each), max(coin_step for _, coin_step in each)

    def skip_to(self, step: int, coin_step: int) -> None:
        """Go on from there at least, with every stream, such as are made later included: what a run before this one has
        drawn from the same key is not drawn again."""
        with self._lock:
            self._start = max(step, self._start[0]), max(coin_step, self._start[1])
            for stream in self._streams:
                stream.advance_to(max(step, stream.step), max(coin_step, stream.coin_step))

    def __repr__(self) -> str:
        return f"Keystream(source={self.source!r}, names={list(self.names)})"

    def stream(self, name: str) -> Stream:
        """A new mechanism of this key; every call gives another one, equal names included."""
        with self._lock:
            if len(self._streams) >= _MAX_MECHANISM:
                raise OverflowError(f"all {_MAX_MECHANISM} mechanisms of this Keystream are taken: make a new one")
            if self._once and not self._streams:
                self._say_that_noise_repeats()
            self._streams.append(Stream(self, name, len(self._streams)))
            self._streams[-1].advance_to(*self._start)
            return self._streams[-1]

    def _say_that_noise_repeats(self) -> None:
        if self.fingerprint in _drawn_from:
            warnings.warn(
                "this process has drawn noise from the same seed or generator state before, and equal noise cancels in "
                "the difference of two results: release one of them at most, or give each a seed of its own",
                stacklevel=3,
            )
        _drawn_from.add(self.fingerprint)

    def key_tensor(self, device: torch.device | str = "cpu") -> Tensor:
        """The key as the ops take it, int32 ``[8]``; kept once per device."""
        if os.getpid() != self._process:
            raise RuntimeError(
                "this Keystream belongs to the parent process, which may draw the same noise: make a new one"
            )
        device = torch.device(device)
        if device not in self._keys:
            self._keys[device] = self._keys[torch.device("cpu")].to(device)
        return self._keys[device]


class Stream(_Unpicklable):
    """One mechanism of a `Keystream`: its noise, and its coins, each with a step counter of its own.

    Guarantees:
        No step is ever used twice, whatever fails in between and whichever thread asks.
    """

    __slots__ = ("_coin_step", "_keystream", "_lock", "_step", "mechanism", "name")

    def __init__(self, keystream: Keystream, name: str, mechanism: int) -> None:
        self.name = name
        self.mechanism = mechanism
        self._keystream = keystream
        self._step = self._coin_step = 0
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        steps = f"step={self._step}, coin_step={self._coin_step}"
        return f"Stream({self.name!r}, mechanism={self.mechanism}, {steps})"

    @property
    def source(self) -> str:
        return self._keystream.source

    @property
    def step(self) -> int:
        """The step that the next draw of noise will use."""
        return self._step

    @property
    def coin_step(self) -> int:
        """The step that the next Poisson draw will use."""
        return self._coin_step

    def advance_to(self, step: int, coin_step: int | None = None) -> None:
        """Skip to `step`, and to `coin_step` where given; used when a run resumes.

        Raises:
            ValueError: that would go back, and so repeat noise or coins.
        """
        with self._lock:
            coin_step = self._coin_step if coin_step is None else coin_step
            if step < self._step or coin_step < self._coin_step:
                raise ValueError(
                    f"stream {self.name!r} stands at step {self._step}, coin step {self._coin_step}: "
                    f"it cannot go back to {step}, {coin_step}, as its noise would repeat"
                )
            self._step, self._coin_step = step, coin_step

    def key_tensor(self, device: torch.device | str = "cpu") -> Tensor:
        """The key for the fused optimizer, int32 ``[8]`` on `device`."""
        return self._keystream.key_tensor(device)

    def next_step(self) -> int:
        """Take the current step for one draw over all parameters; it is spent from here on, drawn or not."""
        with self._lock:
            if self._step >= _MAX_STEP:
                raise OverflowError(f"stream {self.name!r} has no steps left of 2^32: make a new stream")
            self._step += 1
            return self._step - 1

    def new_key(self) -> Tensor:
        """256 bits for another `Keystream`, int32 ``[8]``; takes one step."""
        return noise.random_words(self.key_tensor(), torch.tensor(self.next_step()), self.mechanism, noise.NOISE, 0, 8)

    def add_noise_(self, tensors: Sequence[Tensor], std: float, indices: Sequence[int] | None = None) -> None:
        """Add ``std * z`` to every tensor in place, z standard normal, and take one step.

        Args:
            tensors: on any devices; `indices` tells them apart (default: their position).
        Raises:
            ValueError: repeated or missing indices, or a negative or infinite std.
        """
        indices = range(len(tensors)) if indices is None else indices
        if len(indices) != len(tensors) or len(set(indices)) != len(indices):
            raise ValueError(f"indices {list(indices)} do not name each of the {len(tensors)} tensors once")
        step = self.next_step()
        for device in {tensor.device: None for tensor in tensors}:
            here = [position for position, tensor in enumerate(tensors) if tensor.device == device]
            noise.add_noise_(
                [tensors[position] for position in here],
                self.key_tensor(device),
                torch.tensor(step, device=device),
                self.mechanism,
                [indices[position] for position in here],
                std,
            )

    def poisson(self, n: int, rate: float) -> Tensor:
        """One Poisson draw over n records: each in with probability `rate`, independently. Indices int64,
        ascending.

        A record is in where its uniform 53-bit integer is below ``floor(rate * 2^53)``: never more often
        than is accounted for.

        Edge cases:
            rate 0 draws nobody, rate 1 everybody; n = 0 gives an empty draw. Each takes one coin step.
        Raises:
            ValueError: rate is not in [0, 1], or n is negative.
        """
        if not 0 <= rate <= 1:
            raise ValueError(f"rate is {rate}, expected a probability")
        if n < 0:
            raise ValueError(f"n is {n}, expected a number of records")
        with self._lock:
            if self._coin_step >= _MAX_STEP:
                raise OverflowError(f"stream {self.name!r} has no coin steps left of 2^32: make a new stream")
            step = torch.tensor(self._coin_step)
            self._coin_step += 1
        words = noise.random_words(self.key_tensor(), step, self.mechanism, noise.COINS, 0, 2 * n)
        high, low = (words.to(torch.int64) & 0xFFFFFFFF).view(n, 2).unbind(1)
        uniform = (high >> 5 << 26) + (low >> 6)
        return (uniform < math.floor(rate * 2**53)).nonzero().flatten()
