"""ChaCha20, to the bit: RFC 8439 on every backend, instruction set and number of threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from streams import _C, BACKENDS, KEY, LENGTHS, MANY, STEP, draw, native, same_bits
from torch import Tensor

from dp2vae_fast.ops import noise

# RFC 8439, section 2.3.2 and appendix A.1: key, block counter, nonce, keystream block.
RFC_8439 = {
    "2.3.2": (
        bytes(range(32)),
        1,
        bytes.fromhex("000000090000004a00000000"),
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e",
    ),
    "A.1 #1": (
        bytes(32),
        0,
        bytes(12),
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
    ),
    "A.1 #2": (
        bytes(32),
        1,
        bytes(12),
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
    ),
    "A.1 #3": (
        bytes(31) + b"\x01",
        1,
        bytes(12),
        "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
        "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0",
    ),
    "A.1 #4": (
        b"\x00\xff" + bytes(30),
        2,
        bytes(12),
        "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"
        "13b25aa26cb4a648cb9b9d1be65b2c0924a66c54d545ec1b7374f4872e99f096",
    ),
    "A.1 #5": (
        bytes(32),
        0,
        bytes(11) + b"\x02",
        "c2c64d378cd536374ae204b9ef933fcd1a8b2288b3dfa49672ab765b54ee27c7"
        "8a970e0e955c14f3a88e741b97c286f75f8fc299e8148362fa198a39531bed6d",
    ),
}


def words_of(raw: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(raw, "<i4").copy())


@pytest.mark.parametrize("vector", RFC_8439)
def test_rfc_8439_reference_block(vector):
    key, counter, nonce, block = RFC_8439[vector]
    words = noise.chacha20_blocks(words_of(key), torch.tensor([counter], dtype=torch.int32), words_of(nonce))
    assert words.T.numpy().astype("<i4").tobytes().hex() == block


@native
@pytest.mark.parametrize("vector", RFC_8439)
def test_rfc_8439_native_block(vector):
    key, counter, nonce, block = RFC_8439[vector]
    assert _C.chacha20_block(key, counter, nonce).hex() == block


def keystream_block(key: bytes, counter: int, nonce: bytes, backend: str) -> str:
    """The block by way of `random_words`, whose arguments become the nonce."""
    first, step, index = (word % 2**32 for word in words_of(nonce).tolist())
    arguments = (words_of(key), torch.tensor(step), first // 4, first % 4, index, 16 * (counter + 1))
    return noise.random_words(*arguments, backend=backend)[16 * counter :].numpy().astype("<i4").tobytes().hex()


@pytest.mark.parametrize("vector", RFC_8439)
def test_rfc_8439_random_words_reference(vector):
    key, counter, nonce, block = RFC_8439[vector]
    assert keystream_block(key, counter, nonce, "reference") == block


@native
@pytest.mark.parametrize("vector", RFC_8439)
def test_rfc_8439_random_words_cpp(vector, each_isa):
    key, counter, nonce, block = RFC_8439[vector]
    for isa in each_isa():
        assert keystream_block(key, counter, nonce, "cpp") == block, isa


@native
def test_block_counters_are_unsigned():
    counters = [0, 2**31 - 1, 2**31, 2**32 - 1]
    signed = torch.tensor(counters).to(torch.int32)
    nonce = torch.tensor([1, -2, 3], dtype=torch.int32)
    blocks = noise.chacha20_blocks(KEY, signed, nonce).T
    for counter, block in zip(counters, blocks, strict=True):
        assert _C.chacha20_block(KEY.numpy().tobytes(), counter, nonce.numpy().tobytes()) == block.numpy().tobytes()


@native
def test_words_are_bit_identical_at_every_length_isa_and_thread_count(each_isa, each_thread_count):
    arguments = (KEY, torch.tensor(2**32 - 1), 2**30 - 1, 3, 2**32 - 1)
    expected = noise.random_words(*arguments, MANY, backend="reference")
    assert expected.unique().numel() > 0.999 * MANY  # 70001 of 2^32: 0.6 repeats are expected
    for isa in each_isa():
        for threads in each_thread_count():
            for n in [*LENGTHS, 8191, MANY]:
                words = noise.random_words(*arguments, n, backend="cpp")
                assert same_bits(words, expected[:n]), (isa, threads, n)


def test_reference_words_do_not_depend_on_length():
    expected = noise.random_words(KEY, STEP, 0, 0, 0, MANY, backend="reference")
    for n in LENGTHS:
        assert same_bits(noise.random_words(KEY, STEP, 0, 0, 0, n, backend="reference"), expected[:n])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_strided_key_is_read_as_it_is(backend):
    strided = torch.stack((KEY, torch.zeros_like(KEY)), 1)[:, 0]
    assert not strided.is_contiguous()
    assert same_bits(draw(40, key=strided, backend=backend), draw(40, backend=backend))
