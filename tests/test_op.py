"""The op machinery: schema, backends, explicit requests, compilation."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import dp2vae_fast
from dp2vae_fast.ops import _op
from dp2vae_fast.ops._op import op


@op()
def toy_affine(x: Tensor, scale: float, shift: Tensor | None = None) -> Tensor:
    """Return scale * x + shift."""
    return x * scale if shift is None else x * scale + shift


@op(mutates=("xs",))
def toy_scale_(xs: list[Tensor], scale: float, powers: list[int]) -> None:
    """Multiply each tensor in place by scale ** power."""
    for x, power in zip(xs, powers, strict=True):
        x.mul_(scale**power)


@toy_scale_.register("triton", supports=lambda xs, scale, powers: scale > 0 or f"scale is {scale}, expected > 0")
def _toy_scale_triton(xs: list[Tensor], scale: float, powers: list[int]) -> None:
    torch._foreach_mul_(xs, [scale**power for power in powers])


@pytest.fixture(autouse=True)
def _only_the_visible_order(monkeypatch):
    monkeypatch.setattr(_op, "_requested", None)


def test_schema_is_inferred_and_op_is_registered():
    assert str(torch.ops.dp2vae_fast.toy_scale_.default._schema).startswith("dp2vae_fast::toy_scale_(Tensor(a0!)[] xs")
    assert "Return scale" in (toy_affine.__doc__ or "")
    torch.testing.assert_close(torch.ops.dp2vae_fast.toy_affine(torch.ones(2), 3.0), torch.full((2,), 3.0))


def test_automatic_choice_falls_back_to_the_reference():
    x = torch.arange(3.0)
    torch.testing.assert_close(toy_affine(x, 2.0, shift=x), 3 * x)
    torch.testing.assert_close(toy_affine.reference(x, 2.0), 2 * x)


def test_ops_record_no_gradient():
    parameter = torch.nn.Parameter(torch.ones(2))
    assert not toy_affine(parameter, 2.0).requires_grad
    toy_scale_([parameter], 2.0, [1])
    torch.testing.assert_close(parameter.detach(), torch.full((2,), 2.0))


@pytest.mark.parametrize("name", ["reference", "triton", None])
def test_mutation_of_a_saved_tensor_is_noticed(name):
    parameter = torch.nn.Parameter(torch.ones(2))
    loss = (parameter * parameter).sum()
    toy_scale_([parameter], 2.0, [1], backend=name)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_explicit_request_runs_exactly_that_or_raises_with_the_reason():
    x = torch.ones(2)
    toy_scale_([x], 2.0, [1], backend="triton")
    torch.testing.assert_close(x, torch.full((2,), 2.0))
    with pytest.raises(NotImplementedError, match=r"triton: scale is -1.0, expected > 0.*Usable.*reference"):
        toy_scale_([x], -1.0, [1], backend="triton")
    with pytest.raises(NotImplementedError, match=r"toy_affine.*cpp: .*Usable here: reference"):
        toy_affine(x, 2.0, backend="cpp")
    with pytest.raises(ValueError, match="'gpu' is unknown: choose among"):
        toy_affine(x, 2.0, backend="gpu")
    with pytest.raises(ValueError, match="'gpu' is unknown"), dp2vae_fast.backend("gpu"):
        pass


def test_context_manager_requests_nests_and_restores():
    x = torch.ones(2)
    with dp2vae_fast.backend("triton"):
        toy_scale_([x], 2.0, [1])
        with pytest.raises(NotImplementedError):
            toy_affine(x, 2.0)
        with dp2vae_fast.backend("reference"):
            toy_affine(x, 2.0)
        toy_affine(x, 2.0, backend="reference")
        with pytest.raises(NotImplementedError):
            toy_affine(x, 2.0)
    toy_affine(x, 2.0)
    with dp2vae_fast.backend("triton,reference"):
        toy_affine(x, 2.0)


def test_table_gives_a_reason_for_every_gap():
    rows = [row for row in dp2vae_fast.backends_table() if row.op in ("toy_affine", "toy_scale_")]
    assert [row.backend for row in rows] == ["cpp", "cuda", "triton", "reference"] * 2
    assert all(row.available != bool(row.reason) for row in rows)
    assert {row.op: row.available for row in rows if row.backend == "triton"} == {
        "toy_affine": False,
        "toy_scale_": True,
    }


@pytest.mark.parametrize("overload", ["default", "reference", "triton"])
def test_opcheck_mutating(overload):
    torch.library.opcheck(getattr(torch.ops.dp2vae_fast.toy_scale_, overload), ([torch.ones(2)], 2.0, [1]))


def test_opcheck_functional():
    torch.library.opcheck(torch.ops.dp2vae_fast.toy_affine.default, (torch.ones(2), 2.0, None))
    torch.library.opcheck(torch.ops.dp2vae_fast.toy_affine.reference, (torch.ones(2), 2.0))


def test_compiles_without_a_graph_break():
    @torch.compile(fullgraph=True)
    def compiled(x: Tensor) -> Tensor:
        y = x + 1
        toy_scale_([y], 2.0, [1], backend="triton")
        return toy_affine(y, 3.0)

    torch.testing.assert_close(compiled(torch.ones(3)), torch.full((3,), 12.0))
    with (
        dp2vae_fast.backend("reference"),
        pytest.raises(Exception, match=r"cannot run as requested|[Uu]nsupported"),
    ):
        torch.compile(lambda x: toy_affine(x, 1.0, backend="cpp"), fullgraph=True)(torch.ones(3))


def _python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_environment_variable_requests_a_backend():
    code = "from dp2vae_fast.ops import _op; print(_op._requested)"
    assert _python(code, DP2VAE_FAST_BACKEND="reference") == "('reference',)"
    assert _python(code, DP2VAE_FAST_BACKEND="") == "None"


def test_without_the_native_module_everything_runs_and_says_so_once():
    code = """
import sys, warnings
sys.modules["dp2vae_fast._C"] = None
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    import dp2vae_fast, torch
    from dp2vae_fast.ops._op import op
    def toy(x: torch.Tensor) -> torch.Tensor:
        return x + 1
    toy = op()(toy)
    toy(torch.ones(1)); toy(torch.ones(1))
print(sum("plain-PyTorch reference" in str(w.message) for w in said))
"""
    assert _python(code, DP2VAE_FAST_BACKEND="") == "1"
