"""Keystream and Stream: nothing is drawn twice, nothing is shown."""

import copy
import itertools
import math
import os
import pickle
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dp2vae_fast.engine.keystream import Keystream
from dp2vae_fast.ops import noise


@pytest.fixture
def uses(monkeypatch):
    """Every (mechanism, domain, step, index) that is drawn, in order."""
    drawn = []
    real_noise, real_words = noise.add_noise_, noise.random_words

    def add_noise_(tensors, key, step, mechanism, indices, std):
        drawn.extend((mechanism, noise.NOISE, int(step), index) for index in indices)
        real_noise(tensors, key, step, mechanism, indices, std)

    def random_words(key, step, mechanism, domain, index, n):
        drawn.append((mechanism, domain, int(step), index))
        return real_words(key, step, mechanism, domain, index, n)

    monkeypatch.setattr(noise, "add_noise_", add_noise_)
    monkeypatch.setattr(noise, "random_words", random_words)
    return drawn


def test_no_nonce_is_used_twice(uses):
    keystream = Keystream.seeded(0)
    streams = [keystream.stream("noise"), keystream.stream("noise"), keystream.stream("batches")]
    for stream in streams:
        for _ in range(3):
            stream.add_noise_([torch.zeros(3), torch.zeros(0), torch.zeros(2, 2)], 1.0)
            stream.add_noise_([torch.zeros(2)], 1.0, indices=[5])
            stream.poisson(4, 0.5)
            with pytest.raises(ValueError):
                stream.add_noise_([torch.zeros(2)], -1.0)  # a failed draw takes its step with it
            stream.next_step()
        stream.advance_to(stream.step + 2, stream.coin_step + 2)
        stream.add_noise_([torch.zeros(2)], 1.0)
        stream.poisson(4, 0.5)
    assert len(set(uses)) == len(uses) == 3 * (3 * (3 + 1 + 1 + 1) + 2)


def test_a_failed_draw_never_hands_its_step_to_the_next(uses, monkeypatch):
    stream = Keystream.seeded(0).stream("noise")
    recording = noise.add_noise_

    def interrupted(*arguments):
        recording(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(noise, "add_noise_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stream.add_noise_([torch.zeros(2)], 1.0)
    monkeypatch.setattr(noise, "add_noise_", recording)
    stream.add_noise_([torch.zeros(2)], 1.0)
    assert len(set(uses)) == len(uses) == 2


def test_threads_never_share_a_step():
    stream = Keystream.seeded(0).stream("noise")
    taken: list[int] = []
    threads = [threading.Thread(target=lambda: taken.extend(stream.next_step() for _ in range(200))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(1600))


def test_different_draws_are_different():
    keystream = Keystream.seeded(0)
    first, second = keystream.stream("a"), keystream.stream("a")
    draws = []
    for stream in (first, first, second):
        tensors = [torch.zeros(64), torch.zeros(64)]
        stream.add_noise_(tensors, 1.0)
        draws += tensors
    for one, other in itertools.combinations(draws, 2):
        assert not (one == other).any()
    assert not torch.equal(first.poisson(500, 0.5), first.poisson(500, 0.5))


def test_steps_only_go_forwards():
    stream = Keystream.seeded(0).stream("noise")
    stream.advance_to(10, 3)
    assert (stream.step, stream.coin_step) == (10, 3)
    stream.advance_to(10)
    for step, coin_step in [(9, 3), (11, 2)]:
        with pytest.raises(ValueError, match="cannot go back"):
            stream.advance_to(step, coin_step)
    with pytest.raises(AttributeError):
        stream.step = 0  # pyright: ignore[reportAttributeAccessIssue]
    stream.advance_to(2**32, 2**32)
    with pytest.raises(OverflowError, match="no steps left"):
        stream.next_step()
    with pytest.raises(OverflowError, match="no coin steps left"):
        stream.poisson(3, 0.5)


def test_a_resumed_seeded_stream_continues_the_same_noise():
    def draw(stream):
        tensors = [torch.zeros(5)]
        stream.add_noise_(tensors, 1.0)
        return torch.cat([*tensors, stream.poisson(50, 0.3)])

    whole = Keystream.seeded(7).stream("noise")
    expected = [draw(whole) for _ in range(4)]
    resumed = Keystream.seeded(7).stream("noise")
    resumed.advance_to(2, 2)
    assert torch.equal(draw(resumed), expected[2])
    assert torch.equal(draw(resumed), expected[3])


def test_a_keystream_skips_with_every_stream_and_such_as_come_later():
    keystream = Keystream.seeded(0)
    first, second = keystream.stream("a"), keystream.stream("b")
    first.advance_to(5, 1)
    second.advance_to(2, 4)
    assert keystream.position == (5, 4)
    keystream.skip_to(3, 3)
    assert (first.step, first.coin_step, second.step, second.coin_step) == (5, 3, 3, 4)
    third = keystream.stream("c")
    assert (third.step, third.coin_step) == (3, 3)
    keystream.skip_to(0, 0)
    assert (third.step, third.coin_step) == (3, 3) and keystream.position == (5, 4)


def test_a_seeded_key_that_is_drawn_from_again_is_said(recwarn):
    def generator():
        return torch.Generator().manual_seed(1234567)

    for make in (lambda: Keystream.seeded(1234567), lambda: Keystream.from_generator(generator())):
        unused, used = make(), make()
        used.stream("noise")
        used.stream("coins")
        assert not recwarn
        with pytest.warns(UserWarning, match="equal noise cancels"):
            unused.stream("noise")
        unused.stream("coins")
    for _ in range(2):
        Keystream.seeded(1234567, once=False).stream("a run that repeats itself")
        Keystream.secret().stream("noise")
    assert not recwarn


def test_sources_and_keys():
    assert Keystream.secret().source == "secret"
    assert not torch.equal(Keystream.secret().key_tensor(), Keystream.secret().key_tensor())
    assert torch.equal(Keystream.seeded(1).key_tensor(), Keystream.seeded(1).key_tensor())
    assert not torch.equal(Keystream.seeded(1).key_tensor(), Keystream.seeded(2).key_tensor())
    generator = torch.Generator().manual_seed(3)
    one, two = Keystream.from_generator(generator), Keystream.from_generator(generator)
    assert one.source == "seeded" and not torch.equal(one.key_tensor(), two.key_tensor())
    again = Keystream.from_generator(torch.Generator().manual_seed(3))
    assert torch.equal(one.key_tensor(), again.key_tensor())
    with pytest.raises(ValueError, match="expected 32"):
        Keystream(b"short", "secret")


def test_names_are_recorded():
    keystream = Keystream.seeded(0)
    assert [keystream.stream(name).mechanism for name in ("a", "b", "a")] == [0, 1, 2]
    assert keystream.names == ("a", "b", "a")


def test_the_key_is_not_shown_copied_or_pickled():
    keystream = Keystream.secret()
    stream = keystream.stream("noise")
    words = {str(word) for word in keystream.key_tensor().tolist()}
    key = keystream.key_tensor().numpy().tobytes()
    for secret in (keystream, stream):
        shown = repr(secret) + str(secret) + format(secret)
        assert not any(word in shown for word in words) and key.hex() not in shown
        assert not hasattr(secret, "__dict__")
        for leak in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="cannot be copied or pickled"):
                leak(secret)
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            torch.save({"state": secret}, os.devnull)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_cannot_draw_the_parents_noise():
    stream = Keystream.secret().stream("noise")
    child = os.fork()
    if child == 0:
        try:
            stream.poisson(3, 0.5)
        except RuntimeError:
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_repeated_or_missing_indices_are_refused():
    stream = Keystream.seeded(0).stream("noise")
    for indices in ([0, 0], [0], [0, 1, 2]):
        with pytest.raises(ValueError, match="each of the 2 tensors once"):
            stream.add_noise_([torch.zeros(2), torch.zeros(2)], 1.0, indices=indices)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(0, 300), rate=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_poisson_compares_53_bit_uniforms(n, rate, seed):
    stream = Keystream.seeded(seed).stream("batches")
    words = noise.random_words(stream.key_tensor(), torch.tensor(0), 0, noise.COINS, 0, 2 * n)
    unsigned = [word % 2**32 for word in words.tolist()]
    uniforms = [(high >> 5) * 2**26 + (low >> 6) for high, low in zip(unsigned[::2], unsigned[1::2], strict=True)]
    expected = [i for i, u in enumerate(uniforms) if u < math.floor(rate * 2**53)]
    assert stream.poisson(n, rate).tolist() == expected


def test_poisson_edges_and_rate():
    stream = Keystream.seeded(0).stream("batches")
    assert stream.poisson(100, 0.0).numel() == 0
    assert torch.equal(stream.poisson(100, 1.0), torch.arange(100))
    assert stream.poisson(0, 0.5).dtype == torch.int64
    for n, rate in [(3, 1.1), (3, -0.1), (3, math.nan), (-1, 0.5)]:
        with pytest.raises(ValueError):
            stream.poisson(n, rate)
    counts = torch.tensor([float(stream.poisson(1000, 0.1).numel()) for _ in range(400)])
    deviation = math.sqrt(1000 * 0.1 * 0.9)
    assert abs(counts.mean() - 100) < 4 * deviation / math.sqrt(400)
    assert abs(counts.var() / deviation**2 - 1) < 4 * math.sqrt(2 / 400)  # not a fixed-size sampler
