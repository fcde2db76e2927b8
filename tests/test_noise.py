"""add_noise_ and the optimizers that draw noise as they go, against torch.optim on the same noise."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from streams import _C, BACKENDS, KEY, STEP, native, same_bits
from torch import Tensor

from dp2vae_fast.ops import noise

SHAPES = [(), (0,), (7,), (2, 64, 1), (13, 11), (1031,)]
INDICES = [3, 0, 12, 4, 2**32 - 1, 1]
STEPS = 4
# Roundings that two programs of the same step may take differently for one element: no update has more operations.
ROUNDINGS = 20


def some(dtype: torch.dtype, seed: int, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in SHAPES]


@functools.cache
def drawn(dtype: torch.dtype, step: int, backend: str) -> list[Tensor]:
    """The noise that each of these tensors gets; not to be written to."""
    z = [torch.zeros(shape, dtype=dtype) for shape in SHAPES]
    noise.add_noise_(z, KEY, torch.tensor(step), 2, INDICES, 1.0, backend=backend)
    return z


def assert_same_but_for_rounding(found: list[Tensor], expected: list[Tensor]) -> None:
    """Equal up to `ROUNDINGS` half-spacings a step, at the size of the tensor's largest element."""
    for one, other in zip(found, expected, strict=True):
        roundings = STEPS * ROUNDINGS * torch.finfo(other.dtype).eps / 2
        size = other.abs().max().item() if other.numel() else 0.0
        torch.testing.assert_close(one, other, rtol=0, atol=roundings * size)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_add_noise_adds_std_times_z(backend, dtype):
    tensors, before = some(dtype, 0), some(dtype, 0)
    noise.add_noise_(tensors, KEY, STEP, 2, INDICES, 1.7, backend=backend)
    for tensor, old, z in zip(tensors, before, drawn(dtype, 3, backend), strict=True):
        assert same_bits(tensor, old + 1.7 * z)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_tensors_are_added_to_in_float32(dtype):
    tensors, before = some(dtype, 0), some(dtype, 0)
    noise.add_noise_(tensors, KEY, STEP, 2, INDICES, 1.7)
    for tensor, old, z in zip(tensors, before, drawn(torch.float32, 3, "reference"), strict=True):
        assert torch.equal(tensor, (old.float() + 1.7 * z).to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_noise_and_no_tensors(backend):
    tensors, before = some(torch.float32, 0), some(torch.float32, 0)
    noise.add_noise_(tensors, KEY, STEP, 2, INDICES, 0.0, backend=backend)
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(tensor, old)
    noise.add_noise_([], KEY, STEP, 2, [], 1.0, backend=backend)
    noise.noise_sgd_([], [], [], KEY, STEP, 2, [], 1.0, 1.0, 0.1, 0.0, 0.0, 0.0, False, False, True, backend=backend)
    adam = (1.0, 1.0, 1, 0.1, 0.9, 0.99, 1e-8, 0.0, False, False)
    noise.noise_adam_([], [], [], [], [], KEY, STEP, 2, [], *adam, backend=backend)


SGD_SETTINGS = [
    dict(momentum=m, dampening=d, nesterov=n, weight_decay=w, maximize=x)
    for m, d, n in [(0.0, 0.0, False), (0.9, 0.0, False), (0.9, 0.3, False), (0.9, 0.0, True)]
    for w in (0.0, 0.1)
    for x in (False, True)
]
ADAM_SETTINGS = [
    dict(amsgrad=a, decoupled_weight_decay=c, weight_decay=w, maximize=x)
    for a in (False, True)
    for c, w in [(False, 0.0), (False, 0.1), (True, 0.1)]
    for x in (False, True)
]
LR, STD, SCALE, BETAS, EPS = 0.05, 1.3, 0.25, (0.8, 0.7), 0.01  # beta2 so small that amsgrad's maximum holds on


def names(settings: dict) -> str:
    return ", ".join(name if value is True else f"{name} {value}" for name, value in settings.items() if value) or "-"


def sums_at(step: int, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Sums of gradients that shrink, so that the largest second moment is not the last."""
    return [total / 4**step for total in some(dtype, 10 + step, device)]


def run_sgd(settings: dict, dtype: torch.dtype, backend: str, device: str = "cpu") -> list[list[Tensor]]:
    """Parameters and momentum buffers after `STEPS` steps; checks on the way that the sums are only read."""
    params = some(dtype, 0, device)
    buffers = [torch.full_like(p, math.nan) for p in params] if settings["momentum"] else []
    for step in range(STEPS):
        sums = sums_at(step, dtype, device)
        noise.noise_sgd_(
            params,
            sums,
            buffers,
            KEY.to(device),
            torch.tensor(step, device=device),
            2,
            INDICES,
            STD,
            SCALE,
            LR,
            settings["momentum"],
            settings["dampening"],
            settings["weight_decay"],
            settings["nesterov"],
            settings["maximize"],
            first_step=step == 0,
            backend=backend,
        )
        assert all(same_bits(s.cpu(), t) for s, t in zip(sums, sums_at(step, dtype), strict=True))
        assert all(s._version == 0 for s in sums)
    return [params, buffers]


def run_adam(settings: dict, dtype: torch.dtype, backend: str, device: str = "cpu") -> list[list[Tensor]]:
    """Parameters and moments after `STEPS` steps; checks on the way that the sums are only read."""
    params = some(dtype, 0, device)
    first, second, largest = ([torch.zeros_like(p) for p in params] for _ in range(3))
    largest = largest if settings["amsgrad"] else []
    for step in range(STEPS):
        sums = sums_at(step, dtype, device)
        noise.noise_adam_(
            params,
            sums,
            first,
            second,
            largest,
            KEY.to(device),
            torch.tensor(step, device=device),
            2,
            INDICES,
            STD / 4**step,
            SCALE,
            step + 1,
            LR,
            *BETAS,
            EPS,
            settings["weight_decay"],
            settings["decoupled_weight_decay"],
            settings["maximize"],
            backend=backend,
        )
        assert all(same_bits(s.cpu(), t) for s, t in zip(sums, sums_at(step, dtype), strict=True))
        assert all(s._version == 0 for s in sums)
    return [params, first, second, largest]


def run_torch(optimizer: torch.optim.Optimizer, params: list[Tensor], stds: list[float], backend: str) -> None:
    """The same steps by torch.optim, on the same noisy gradients."""
    for step, std in enumerate(stds):
        z = drawn(params[0].dtype, step, backend)
        for param, total, one in zip(params, sums_at(step, params[0].dtype), z, strict=True):
            param.grad = (total + std * one) * SCALE
        optimizer.step()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("settings", SGD_SETTINGS, ids=names)
def test_noise_sgd_is_sgd_on_noisy_gradients(settings, dtype, backend):
    expected = some(dtype, 0)
    optimizer = torch.optim.SGD(expected, lr=LR, foreach=False, **settings)
    run_torch(optimizer, expected, [STD] * STEPS, backend)
    params, buffers = run_sgd(settings, dtype, backend)
    assert_same_but_for_rounding(params, expected)
    if buffers:
        assert_same_but_for_rounding(buffers, [optimizer.state[p]["momentum_buffer"] for p in expected])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("settings", ADAM_SETTINGS, ids=names)
def test_noise_adam_is_adam_on_noisy_gradients(settings, dtype, backend):
    expected = some(dtype, 0)
    optimizer = torch.optim.Adam(expected, lr=LR, betas=BETAS, eps=EPS, foreach=False, **settings)
    run_torch(optimizer, expected, [STD / 4**step for step in range(STEPS)], backend)
    params, *moments = run_adam(settings, dtype, backend)
    assert_same_but_for_rounding(params, expected)
    for name, found in zip(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), moments, strict=True):
        if found:
            assert_same_but_for_rounding(found, [optimizer.state[p][name] for p in expected])


def test_the_optimizer_tests_would_notice_every_setting():
    """No two settings end within a hundred times the tolerance that the tests above allow."""
    for run, all_settings in ((run_sgd, SGD_SETTINGS), (run_adam, ADAM_SETTINGS)):
        ends = {names(settings): run(settings, torch.float32, BACKENDS[0])[0][-1] for settings in all_settings}
        tolerance = STEPS * ROUNDINGS * torch.finfo(torch.float32).eps / 2
        for (one, a), (other, b) in itertools.combinations(ends.items(), 2):
            assert (a - b).abs().max() > 100 * tolerance * a.abs().max(), (one, other)


# --- what is refused, and what falls back -----------------------------------------------------------------------------


def call_add(**changes):
    arguments = dict(
        tensors=[torch.ones(3), torch.ones(2, 2)], key=KEY, step=STEP, mechanism=0, indices=[0, 1], std=1.0
    )
    noise.add_noise_(**{**arguments, **changes})


def call_sgd(**changes):
    arguments = dict(
        params=[torch.ones(3)],
        sums=[torch.ones(3)],
        momentum_buffers=[torch.ones(3)],
        key=KEY,
        step=STEP,
        mechanism=0,
        indices=[0],
        std=1.0,
        scale=1.0,
        lr=0.1,
        momentum=0.9,
        dampening=0.0,
        weight_decay=0.0,
        nesterov=False,
        maximize=False,
        first_step=False,
    )
    noise.noise_sgd_(**{**arguments, **changes})


def call_adam(**changes):
    arguments = dict(
        params=[torch.ones(3)],
        sums=[torch.ones(3)],
        exp_avgs=[torch.ones(3)],
        exp_avg_sqs=[torch.ones(3)],
        max_exp_avg_sqs=[torch.ones(3)],
        key=KEY,
        step=STEP,
        mechanism=0,
        indices=[0],
        std=1.0,
        scale=1.0,
        optimizer_step=1,
        lr=0.1,
        beta1=0.9,
        beta2=0.99,
        eps=1e-8,
        weight_decay=0.0,
        decoupled=False,
        maximize=False,
    )
    noise.noise_adam_(**{**arguments, **changes})


def call_words(**changes):
    arguments = dict(key=KEY, step=STEP, mechanism=0, domain=0, index=0, n=3)
    noise.random_words(**{**arguments, **changes})


REFUSED = [
    (call_add, dict(indices=[1, 1]), "indices .* repeat"),
    (call_add, dict(indices=[0]), "indices holds 1 numbers, tensors 2 tensors"),
    (call_add, dict(indices=[0, 2**32]), "indices hold 4294967296, expected 0 to"),
    (call_add, dict(indices=[0, -1]), "indices hold -1"),
    (call_add, dict(mechanism=2**30), "mechanism is 1073741824"),
    (call_add, dict(mechanism=-1), "mechanism is -1"),
    (call_add, dict(std=-0.1), "std is -0.1"),
    (call_add, dict(std=math.nan), "std is nan"),
    (call_add, dict(std=math.inf), "std is inf"),
    (call_add, dict(key=KEY.long()), r"key is torch.int64 \[8\]"),
    (call_add, dict(key=KEY[:7]), r"key is torch.int32 \[7\]"),
    (call_add, dict(step=torch.tensor(1, dtype=torch.int32)), "step is torch.int32"),
    (call_add, dict(step=torch.tensor([1])), r"step is torch.int64 \[1\]"),
    (call_add, dict(tensors=[torch.ones(3), torch.ones(2, dtype=torch.int32)]), r"tensors\[1\] is torch.int32"),
    (call_add, dict(tensors=[torch.ones(3), torch.ones(2, dtype=torch.complex64)]), r"tensors\[1\] is torch.complex64"),
    (call_sgd, dict(sums=[]), "sums holds 0 tensors, params 1"),
    (call_sgd, dict(sums=[torch.ones(1, 3)]), r"sums\[0\] has shape \[1, 3\], params\[0\] \[3\]"),
    (call_sgd, dict(momentum_buffers=[]), "momentum is 0.9 but momentum_buffers is empty"),
    (call_sgd, dict(momentum_buffers=[torch.ones(4)]), r"momentum_buffers\[0\] has shape \[4\]"),
    (call_sgd, dict(indices=[0, 1]), "indices holds 2 numbers"),
    (call_adam, dict(exp_avgs=[]), "exp_avgs holds 0"),
    (call_adam, dict(exp_avg_sqs=[torch.ones(2)]), r"exp_avg_sqs\[0\] has shape"),
    (call_adam, dict(max_exp_avg_sqs=[torch.ones(2)]), r"max_exp_avg_sqs\[0\] has shape"),
    (call_adam, dict(optimizer_step=0), "optimizer_step is 0"),
    (call_words, dict(domain=4), "domain is 4"),
    (call_words, dict(n=-1), "n is -1"),
    (call_words, dict(index=-1), "indices hold -1"),
]


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize(("call", "changes", "message"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_refused_calls_name_the_argument(call, changes, message, backend):
    call(backend=backend)
    with pytest.raises(ValueError, match=message):
        call(**changes, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("step", [-1, 2**32, 2**40 + 3])
def test_a_step_whose_noise_would_repeat_is_refused(step, backend):
    untouched = torch.ones(300)
    for call, changes in [(call_add, dict(tensors=[untouched, torch.ones(1)])), (call_sgd, {}), (call_words, {})]:
        with pytest.raises(RuntimeError, match="step is"):
            call(step=torch.tensor(step), **changes, backend=backend)
    assert (untouched == 1).all()


UNSUPPORTED = [
    (call_add, lambda: dict(tensors=[torch.ones(3), torch.ones(2, 5).T]), "tensor 1 is not contiguous"),
    (call_add, lambda: dict(tensors=[torch.ones(3, dtype=torch.bfloat16), torch.ones(2)]), "tensor 0 has dtype"),
    (call_sgd, lambda: dict(sums=[torch.ones(6)[::2]]), "tensor 0 is not contiguous"),
    (call_sgd, lambda: dict(sums=[torch.ones(3).double()]), "tensor 0 has dtype torch.float32, torch.float64"),
    (call_adam, lambda: dict(exp_avgs=[torch.ones(6)[::2]]), "tensor 0 is not contiguous"),
]


@native
@pytest.mark.parametrize(("call", "changes", "reason"), UNSUPPORTED, ids=lambda x: x if isinstance(x, str) else "")
def test_what_the_kernels_do_not_take_falls_back_or_raises(call, changes, reason):
    with pytest.raises(NotImplementedError, match=f"cpp: {reason}.*Usable here: reference"):
        call(**changes(), backend="cpp")
    automatic, reference = changes(), changes()
    call(**automatic)
    call(**reference, backend="reference")
    for name in automatic:
        for one, other, untouched in zip(automatic[name], reference[name], changes()[name], strict=True):
            assert torch.equal(one, other)
            assert name == "sums" or not torch.equal(one, untouched)


def test_strided_tensors_get_the_noise_of_their_row_major_place():
    strided, plain = torch.zeros(5, 40).T, torch.zeros(40, 5)
    noise.add_noise_([strided], KEY, STEP, 0, [0], 1.0)
    noise.add_noise_([plain], KEY, STEP, 0, [0], 1.0, backend="reference")
    assert torch.equal(strided, plain)


@native
def test_the_kernels_guard_memory_when_called_directly():
    ops = torch.ops.dp2vae_fast
    one, two = torch.ones(3), torch.ones(4)
    draws = (KEY, STEP, 0)
    sgd = (1.0, 1.0, 0.1, 0.9, 0.0, 0.0, False, False, False)
    for tensors, indices in [([torch.ones(6)[::2]], [0]), ([one.half()], [0]), ([one, two], [0, 0]), ([one], [])]:
        with pytest.raises(RuntimeError):
            ops.add_noise_.default(tensors, *draws, indices, 1.0)
    for lists in [([one], [two], [one]), ([one], [], [one]), ([one], [one.double()], [one]), ([one], [one], [])]:
        with pytest.raises(RuntimeError):
            ops.noise_sgd_.default(*lists, *draws, [0], *sgd)
    for words in [(KEY[:4], STEP, 0, 0, 0, 4), (KEY.long(), STEP, 0, 0, 0, 4), (KEY, STEP, 0, 0, 0, -1)]:
        with pytest.raises(RuntimeError):
            ops.random_words.default(*words)
    assert (one == 1).all() and (two == 1).all()


@native
def test_an_unknown_instruction_set_changes_nothing():
    before = _C.build_info()["isa"]
    assert not _C.select_isa("sse9") and _C.build_info()["isa"] == before
