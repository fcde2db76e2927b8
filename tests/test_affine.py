"""The native kernels of normalisation layers, on every instruction set, against float64."""

from __future__ import annotations

import pytest
import torch

from dp2vae_fast import ops
from dp2vae_fast.ops import _op

pytestmark = pytest.mark.skipif(bool(_op._native_gap), reason=_op._native_gap)


@pytest.fixture(params=["avx512", "avx2", "portable"])
def isa(request):
    from dp2vae_fast import _C

    before = _C.build_info()["isa"]
    if not _C.select_isa(request.param):
        pytest.skip(f"no {request.param} here")
    yield
    _C.select_isa(before)


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (100.0, 1.0), (1e4, 0.1), (-1e6, 1.0)])
@pytest.mark.parametrize("eps", [1e-5, 0.0])
@pytest.mark.parametrize("shape", [(2, 8, 65), (2, 48, 7), (1, 6, 1)])
def test_a_large_mean_costs_no_digits(isa, mean: float, std: float, eps: float, shape: tuple[int, int, int]):
    generator = torch.Generator().manual_seed(1)
    x = mean + std * torch.randn(shape, generator=generator)
    b = torch.randn(shape, generator=generator)
    for norm, how in ((ops.group_norm_grad_sample, (2,)), (ops.layer_norm_grad_sample, (False,))):
        if norm is ops.layer_norm_grad_sample and shape[2] == 1:
            continue  # no variance
        exact = norm.reference(x.double(), b.double(), *how, eps)
        for memory in (lambda t: t, lambda t: t.mT.contiguous().mT):
            if norm is ops.layer_norm_grad_sample and memory(x).stride(2) != 1:
                continue
            found = norm(memory(x), memory(b), *how, eps, backend="cpp")
            for a, e in zip(found, exact, strict=True):
                torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 4, 0)])
def test_empty_inputs(shape: tuple[int, int, int]):
    for found in ops.group_norm_grad_sample(torch.zeros(shape), torch.zeros(shape), 2, 1e-5):
        assert torch.equal(found, torch.zeros(shape[:2]))
