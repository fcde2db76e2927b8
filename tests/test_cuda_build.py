"""The CUDA kernels without a GPU: they compile without spills, and their code gives the CPU's bits, run on the host."""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from streams import _C, KEY, LENGTHS, native, same_bits
from torch import Tensor

from dp2vae_fast.ops import clip, noise

ROOT = Path(__file__).parents[1]
nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
# A multiprocessor has 65,536 registers: 72 leave room for 28 warps in float32, 96 for 20 in float64.
REGISTERS = {"f": 72, "d": 96, "": 48}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, str]:
    """The CUDA module alone, and what nvcc said."""
    folder = tmp_path_factory.mktemp("cuda")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder, "--build-temp", folder / "temp"]
    wishes = {"DP2VAE_FAST_NATIVE": "0", "DP2VAE_FAST_CUDA": "1", "DP2VAE_FAST_CUDA_ARCHS": "80 90 100"}
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **wishes}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (module,) = (folder / "dp2vae_fast").glob("_cuda*")
    return module, done.stdout + done.stderr


@nvcc
def test_no_kernel_spills_or_takes_too_many_registers(built):
    pattern = (
        r"entry function '(\S+)' for 'sm_(\d+)'.*?"
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    )
    kernels = re.findall(pattern, built[1], re.S)
    assert {arch for _, arch, *_ in kernels} == {"80", "90", "100"} and len(kernels) == 3 * 8
    for name, arch, stores, loads, registers in kernels:
        print(f"sm_{arch} {registers:>3} registers {name}")
        update = re.search(r"(AddNoise|Sgd|Adam)", name)
        kind = "" if not update else re.search(r"(?:AddNoise|Sgd|Adam)E?([fd])", name).group(1)  # type: ignore[union-attr]
        assert (stores, loads) == ("0", "0"), (name, arch)
        assert int(registers) <= REGISTERS[kind], (name, arch, registers)


@nvcc
def test_the_module_loads_beside_any_torch_and_cpu_tensors_stay_on_the_cpu(built):
    code = f"""
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("dp2vae_fast._cuda", {str(built[0])!r})
module = sys.modules["dp2vae_fast._cuda"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import dp2vae_fast
from dp2vae_fast.ops import noise
assert module.BUILT_FOR == "sm_80 sm_90 sm_100 compute_100"
rows = {{row.op for row in dp2vae_fast.backends_table() if row.backend == "cuda" and row.available}}
kernels = {{"random_words", "add_noise_", "noise_sgd_", "noise_adam_", "clip_factors", "normalize_factors"}}
assert rows == kernels, rows
key, x = torch.arange(8, dtype=torch.int32), torch.zeros(200)
noise.add_noise_([x], key, torch.tensor(3), 0, [0], 1.0)
try:
    noise.add_noise_([x], key, torch.tensor(3), 0, [0], 1.0, backend="cuda")
except NotImplementedError as error:
    assert "runs on cuda tensors only" in str(error)
else:
    raise AssertionError("CPU tensors ran on the CUDA kernels")
assert 0.5 < x.std() < 1.5
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- the kernels' code on the host ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("host") / "host.so"
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["c++", *flags, ROOT / "tests" / "cuda_on_host.cpp", "-o", library], check=True)
    return ctypes.CDLL(str(library))


def structure(pointers: int, numbers: int, flags: int, real) -> type[ctypes.Structure]:
    fields = [(f"p{i}", ctypes.c_void_p) for i in range(pointers)] + [(f"x{i}", real) for i in range(numbers)]
    return type("Update", (ctypes.Structure,), {"_fields_": fields + [(f"b{i}", ctypes.c_bool) for i in range(flags)]})


def run_on_host(host, name: str, lists, numbers, flags, indices, step: int, device: bool) -> int:
    """Runs an update's kernel over parallel lists of tensors (None: an absent list); returns its number of launches."""
    first = lists[0]
    double = first[0].dtype == torch.float64
    kind = structure(len(lists), len(numbers), len(flags), ctypes.c_double if double else ctypes.c_float)
    pointers = [[0 if tensors is None else tensors[i].data_ptr() for tensors in lists] for i in range(len(first))]
    count = len(first)
    updates = (kind * count)(*(kind(*(p or None for p in row), *numbers, *flags) for row in pointers))
    sizes = (ctypes.c_int64 * count)(*(x.numel() for x in first))
    aligned = (ctypes.c_bool * count)(*(all(p % 16 == 0 for p in row) for row in pointers))
    function = getattr(host, name + ("_double" if double else "_float"))
    function.restype = ctypes.c_int64
    key, at = ctypes.c_void_p(KEY.data_ptr()), torch.tensor(step)
    draw = (key, ctypes.c_void_p(at.data_ptr()), ctypes.c_uint32(4 * 2), ctypes.c_bool(device))
    numbers64 = (ctypes.c_int64 * count)(*indices)
    return function(*draw, updates, sizes, numbers64, aligned, ctypes.c_int64(count))


# Lengths about a superblock, a block of threads (2048) and none at all; views that no vector load may touch.
SIZES = [0, 1, 3, 4, 5, 31, 127, 128, 129, 513, 2047, 2048, 2049, 5001, 0]


def some(seed: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.rand(n, generator=generator, dtype=dtype) for n in SIZES]
    return [*tensors, torch.rand(700, generator=generator, dtype=dtype)[1:]]


INDICES = [*range(7, 7 + len(SIZES)), 2**32 - 1]


@native
@compiler
@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_has_the_bits_of_the_cpu(host, dtype, device):
    found, expected = some(0, dtype), some(0, dtype)
    assert run_on_host(host, "add_noise", [found], [1.7], [], INDICES, 2**32 - 1, device) == 1
    noise.add_noise_(expected, KEY, torch.tensor(2**32 - 1), 2, INDICES, 1.7, backend="cpp")
    assert all(same_bits(one, other) for one, other in zip(found, expected, strict=True))


@native
@compiler
def test_the_tail_path_on_the_host(host):
    found, expected = [torch.zeros(2**21)], [torch.zeros(2**21)]  # about 32 pairs need a second word
    run_on_host(host, "add_noise", [found], [1.0], [], [9], 1, True)
    noise.add_noise_(expected, KEY, torch.tensor(1), 2, [9], 1.0, backend="cpp")
    assert same_bits(found[0], expected[0])


@native
@compiler
def test_more_tensors_than_a_launch_holds(host):
    found, expected = ([torch.zeros(1 + i % 5) for i in range(2500)] for _ in range(2))
    assert run_on_host(host, "add_noise", [found], [1.0], [], range(2500), 1, True) > 1
    noise.add_noise_(expected, KEY, torch.tensor(1), 2, list(range(2500)), 1.0, backend="cpp")
    assert all(same_bits(one, other) for one, other in zip(found, expected, strict=True))


@native
@compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("momentum, dampening, nesterov", [(0.0, 0.0, False), (0.9, 0.3, False), (0.9, 0.0, True)])
@pytest.mark.parametrize("first_step", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_sgd_has_the_bits_of_the_cpu(host, dtype, momentum, dampening, nesterov, first_step, decay):
    found, expected = ([some(seed, dtype) for seed in range(3)] for _ in range(2))
    numbers, flags = [1.3, 0.25, 0.05, momentum, 1 - dampening, decay], [nesterov, first_step]
    lists = found if momentum else [*found[:2], None]
    run_on_host(host, "sgd", lists, numbers, flags, INDICES, 5, True)
    settings = (1.3, 0.25, 0.05, momentum, dampening, decay, nesterov, False, first_step)
    buffers = expected[2] if momentum else []
    noise.noise_sgd_(*expected[:2], buffers, KEY, torch.tensor(5), 2, INDICES, *settings, backend="cpp")
    for one, other in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
        assert same_bits(one, other)


@native
@compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("decoupled, decay", [(False, 0.0), (False, 0.1), (True, 0.1)])
def test_adam_has_the_bits_of_the_cpu(host, dtype, amsgrad, decoupled, decay):
    found, expected = ([some(seed, dtype) for seed in range(5)] for _ in range(2))
    lr, beta1, beta2, eps, step = 0.05, 0.8, 0.7, 0.01, 3
    corrections = [lr / (1 - beta1**step), 1 - beta1, beta2, 1 - beta2, math.sqrt(1 - beta2**step), eps]
    numbers = [1.3, 0.25, *corrections, 0.0 if decoupled else decay, 1 - lr * decay if decoupled else 1.0]
    run_on_host(host, "adam", found if amsgrad else [*found[:4], None], numbers, [], INDICES, 5, True)
    settings = (1.3, 0.25, step, lr, beta1, beta2, eps, decay, decoupled, False)
    largest = expected[4] if amsgrad else []
    noise.noise_adam_(*expected[:4], largest, KEY, torch.tensor(5), 2, INDICES, *settings, backend="cpp")
    for one, other in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
        assert same_bits(one, other)


@compiler
@pytest.mark.parametrize("n", LENGTHS)
def test_words_have_the_bits_of_the_reference(host, n):
    out, step = torch.full((n + 8,), -1, dtype=torch.int32), torch.tensor(2**32 - 1)
    pointers = (ctypes.c_void_p(KEY.data_ptr()), ctypes.c_void_p(step.data_ptr()))
    host.words(
        *pointers, ctypes.c_uint32(4 * 3 + 2), ctypes.c_uint32(6), ctypes.c_int64(n), ctypes.c_void_p(out.data_ptr())
    )
    assert same_bits(out[:n], noise.random_words(KEY, step, 3, 2, 6, n, backend="reference"))
    assert (out[n:] == -1).all()


@compiler
@pytest.mark.parametrize("stability", [None, 0.01])
def test_clip_factors_are_those_of_the_reference(host, stability):
    norm_sq = torch.rand(5, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 9, 40)
    error = norm_sq * 1e-6
    norm_sq[:, 3] = error[:, 3] = 0.0
    norm_sq[1, 4], error[2, 5], norm_sq[0, 6], norm_sq[:, 7] = math.inf, math.nan, -math.inf, 3e38
    out = torch.full((40,), math.nan)
    tensors = [ctypes.c_void_p(x.data_ptr()) for x in (norm_sq, error, out)]
    shape = (ctypes.c_int64(5), ctypes.c_int64(40), ctypes.c_double(1.5), ctypes.c_double(stability or 0.0))
    host.factors(*tensors[:2], *shape, ctypes.c_bool(stability is not None), tensors[2])
    more = (1.5,) if stability is None else (1.5, stability)
    op = clip.clip_factors if stability is None else clip.normalize_factors
    assert (out[4:8] == 0).all()
    torch.testing.assert_close(out, op(norm_sq, error, *more, backend="reference"), rtol=4e-6, atol=0)
    if _C:
        assert same_bits(out, op(norm_sq, error, *more, backend="cpp"))


@compiler
@pytest.mark.parametrize("normalizes", [False, True])
def test_clip_factors_below_the_normal_range_are_zero(host, normalizes):
    norm_sq = (2.0 ** torch.linspace(110.0, 120.0, 200, dtype=torch.float64)).float()[None]
    error, out = torch.zeros_like(norm_sq), torch.full((200,), math.nan)
    tensors = [ctypes.c_void_p(x.data_ptr()) for x in (norm_sq, error, out)]
    for bound in (2.0**-66, 2.0**-70, 2.0**-85):
        shape = (ctypes.c_int64(1), ctypes.c_int64(200), ctypes.c_double(bound), ctypes.c_double(0.0))
        host.factors(*tensors[:2], *shape, ctypes.c_bool(normalizes), tensors[2])
        assert (out.double() * norm_sq[0].double().sqrt() <= bound).all()
        assert not ((out > 0) & (out < 2.0**-126)).any()
