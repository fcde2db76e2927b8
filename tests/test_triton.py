"""The Triton backend as a whole, its clip factors and its normalisation layers; interpreted where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from test_opcheck import arguments_of_every_op
from torch import Tensor

import dp2vae_fast
from dp2vae_fast import ops
from dp2vae_fast.ops._op import OPS

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of what a GPU does silently
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = sorted({row.op for row in dp2vae_fast.backends_table() if row.backend == "triton" and row.available})


def on_device(argument):
    if isinstance(argument, list):
        return [on_device(x) for x in argument]
    return argument.to(DEVICE) if isinstance(argument, Tensor) else argument


def test_every_op_has_a_kernel():
    """But for sums of outer products, which are matrix products of the vendor library."""
    every = {name for name, op in OPS.items() if op.__module__.startswith("dp2vae_fast.")}
    assert every - set(NAMES) == {"outer_weighted_sum"}


@pytest.mark.parametrize("name", [name for name in NAMES if name in arguments_of_every_op()])
def test_opcheck(name):
    arguments = tuple(on_device(x) for x in arguments_of_every_op()[name])
    checks = ("test_schema", "test_faketensor")  # what is written to, and shapes, strides and types of what comes back
    torch.library.opcheck(getattr(torch.ops.dp2vae_fast, name).triton, arguments, test_utils=checks)


def test_without_the_interpreter_a_cpu_tensor_is_refused_in_one_line():
    code = """
import torch
from dp2vae_fast import ops
from dp2vae_fast.ops import noise
key, step, x = torch.zeros(8, dtype=torch.int32), torch.tensor(0), torch.ones(2, 3)
for call in (
    lambda: ops.clip_factors(x, x, 1.0, backend="triton"),
    lambda: ops.grad_sample_norm_sq(x, backend="triton"),
    lambda: noise.add_noise_([x], key, step, 0, [0], 1.0, backend="triton"),
    lambda: noise.random_words(key, step, 0, 0, 0, 4, backend="triton"),
):
    try:
        call()
    except NotImplementedError as error:
        assert "triton: Triton runs on CPU tensors under TRITON_INTERPRET=1 only)" in str(error), error
    else:
        raise AssertionError("a compiled kernel ran on a CPU tensor")
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "DP2VAE_FAST_BACKEND": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (
            lambda x: ops.grad_sample_norm_sq(x.double(), backend="triton"),
            "the kernels take float32, float16, bfloat16",
        ),
        (lambda x: ops.clip_factors(x, x.half(), 1.0, backend="triton"), "the kernels take float32"),
        (lambda x: ops.linear_kept(x[:, :0, None], x[:, :0, None], backend="triton"), "an operand is empty"),
        (lambda x: ops.kept_weighted_sum(x, x[:, 0].double(), backend="triton"), "the kernels take float32"),
        (
            lambda x: ops.linear_weighted_sum(x[..., None], x[..., None], x[:, 0].half(), backend="triton"),
            "the kernel takes float32 factors",
        ),
        (lambda x: ops.embedding_norm_sq(x, x[..., None], 0, backend="triton"), "the kernel takes int64 and int32"),
        (
            lambda x: ops.layer_norm_grad_sample(*[x.new_ones(1, 1, 8193)] * 2, True, 1e-5, backend="triton"),
            "up to 8192",
        ),
    ],
)
def test_what_the_kernels_do_not_take_has_a_reason(call, reason):
    with pytest.raises(NotImplementedError, match=f"triton: .*{reason}.*Usable here: .*reference"):
        call(torch.ones(2, 3, device=DEVICE))


# --- clip factors -----------------------------------------------------------------------------------------------------


def factors(clip: bool, norm_sq: Tensor, error: Tensor, bound: float, backend: str) -> Tensor:
    if clip:
        return ops.clip_factors(norm_sq, error, bound, backend=backend)
    return ops.normalize_factors(norm_sq, error, bound, 0.01, backend=backend)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("layers, records", [(1, 1), (5, 0), (3, 127), (40, 129)])
@pytest.mark.parametrize("bound", [0.7, 1e-6, 3e4])
def test_factors_divide_by_an_upper_bound(clip: bool, layers: int, records: int, bound: float):
    generator = torch.Generator().manual_seed(1)
    norm_sq = torch.rand(records, layers, generator=generator).mT.mul(4).to(DEVICE)  # strided
    error = (torch.rand(layers, records, generator=generator) * 1e-3).to(DEVICE)
    found = factors(clip, norm_sq, error, bound, "triton")
    expected = factors(clip, norm_sq.double(), error.double(), bound, "reference")
    assert bool((found <= expected).all())
    torch.testing.assert_close(found.double(), expected, rtol=2 * (layers + 6) * 2.0**-23, atol=0)


@pytest.mark.parametrize("clip", [True, False])
def test_factors_of_special_records(clip: bool):
    inf, nan, huge = float("inf"), float("nan"), 3e38
    norm_sq = torch.tensor([[1.0, inf, nan, 1.0, 1.0, 0.0, huge, 1e-40]], device=DEVICE).repeat(2, 1)
    error = torch.tensor([[0.0, 0.0, 0.0, inf, nan, 0.0, 0.0, 0.0]], device=DEVICE).repeat(2, 1)
    found = factors(clip, norm_sq, error, 0.5, "triton")
    torch.testing.assert_close(found, factors(clip, norm_sq, error, 0.5, "reference"), rtol=1e-6, atol=0)
    assert found[1:5].tolist() == [0.0] * 4 and found[6] == 0.0  # the sum of two huge ones is not finite
    assert found[5] == (1.0 if clip else pytest.approx(50.0))


@pytest.mark.parametrize("bound", [float("nan"), -1.0, 0.0])
def test_what_is_no_bound_or_no_norm_clips_to_nothing(bound: float):
    norm_sq, error = torch.tensor([[4.0, 1.0], [-9.0, 3.0]], device=DEVICE), torch.zeros(2, 2, device=DEVICE)
    clips, normalizes = torch.ops.dp2vae_fast.clip_factors.triton, torch.ops.dp2vae_fast.normalize_factors.triton
    assert clips(norm_sq, error, bound).tolist() == normalizes(norm_sq, error, bound, 0.01).tolist() == [0.0, 0.0]
    for clip in (True, False):
        found = factors(clip, norm_sq, error, 1.0, "triton")
        assert found[0] == 0.0 and 0.49 < float(found[1]) <= 0.5
    assert normalizes(0 * norm_sq, error, 1e30, 1e-30).tolist() == [0.0, 0.0]  # beyond the largest number


@pytest.mark.parametrize("clip", [True, False])
def test_factors_below_the_normal_range_are_zero(clip: bool):
    norm = 2.0 ** torch.linspace(55.0, 60.0, 200, dtype=torch.float64)
    norm_sq = norm.square().float()[None].to(DEVICE)
    for bound in (2.0**-60, 2.0**-66, 2.0**-70, 2.0**-85):
        found = factors(clip, norm_sq, torch.zeros_like(norm_sq), bound, "triton")
        assert bool((found.double() * norm_sq[0].double().sqrt() <= bound).all())
        assert not bool(((found > 0) & (found < 2.0**-126)).any())
    assert bool((factors(clip, norm_sq, torch.zeros_like(norm_sq), 2.0**-60, "triton") > 0).all())


# --- normalisation layers ---------------------------------------------------------------------------------------------


GROUP_NORM = [((2, 8, 65), 2, 1e-5), ((1, 140, 7), 1, 1e-5), ((1, 6, 1), 2, 0.0), ((2, 4, 300), 4, 0.0)]
LAYER_NORM = [((2, 8, 65), True, 1e-5), ((2, 40, 7), False, 1e-5), ((1, 6, 1), True, 1e-5), ((2, 1, 300), False, 0.0)]
INPUTS = [(0.0, 1.0, torch.float32), (1e4, 0.1, torch.float32), (-1e6, 1.0, torch.float32), (100.0, 1.0, torch.float16)]


@pytest.mark.parametrize("mean, std, dtype", INPUTS)
@pytest.mark.parametrize(
    "norm, shape, how, eps",
    [(ops.group_norm_grad_sample, *case) for case in GROUP_NORM]
    + [(ops.layer_norm_grad_sample, *case) for case in LAYER_NORM],
)
def test_normalisation_layers(norm, shape, how, eps, mean: float, std: float, dtype: torch.dtype):
    """Against float64, contiguous and with channels last; a large mean costs no digits."""
    generator = torch.Generator().manual_seed(1)
    x = (mean + std * torch.randn(shape, generator=generator)).to(dtype).to(DEVICE)
    b = torch.randn(shape, generator=generator).to(dtype).to(DEVICE)
    exact = norm.reference(x.double(), b.double(), how, eps)
    for memory in (lambda t: t, lambda t: t.mT.contiguous().mT):
        found = norm(memory(x), memory(b), how, eps, backend="triton")
        for one, other in zip(found, exact, strict=True):
            assert one.dtype == torch.float32
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)  # as tests/test_affine.py


def test_a_bad_record_of_a_normalisation_layer_stays_with_itself():
    x, b = (torch.randn(3, 6, 20, generator=torch.Generator().manual_seed(s)).to(DEVICE) for s in (1, 2))
    broken = x.clone()
    broken[1, 2, 3] = float("nan")
    for norm, how in ((ops.group_norm_grad_sample, 2), (ops.layer_norm_grad_sample, False)):
        before, after = (norm(y, b, how, 1e-5, backend="triton")[0] for y in (x, broken))
        assert torch.equal(before[::2], after[::2])
        assert not bool(after[1].isfinite().all())
