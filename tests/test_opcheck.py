"""Every op as PyTorch sees it, and the package without its native module."""

from __future__ import annotations

import inspect
import itertools
import os
import subprocess
import sys

import pytest
import torch
from streams import KEY, STEP, same_bits
from torch import Tensor

import dp2vae_fast
from dp2vae_fast.ops import noise
from dp2vae_fast.ops._op import OPS


def arguments_of_every_op() -> dict[str, tuple]:
    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))

    def pair() -> list[Tensor]:
        return [torch.ones(3), torch.ones(130)]

    convolution = (randn(2, 4, 5), randn(2, 6, 2), [6, 2, 2], [2], [0], [1], 2, False)
    draws = (KEY, STEP, 0, [0, 1], 1.0)
    return {
        "group_norm_grad_sample": (randn(2, 6, 4), randn(2, 6, 4), 3, 1e-5),
        "layer_norm_grad_sample": (randn(2, 3, 4), randn(2, 3, 4), False, 1e-5),
        "clip_factors": (randn(3, 2).square(), randn(3, 2).square(), 1.0),
        "normalize_factors": (randn(3, 2).square(), randn(3, 2).square(), 1.0, 0.01),
        **{f"conv_{how}": convolution for how in ("norm_sq", "direct_norm_sq", "kept")},
        "conv_weighted_sum": (*convolution[:2], torch.tensor([0.5, 0.0]), *convolution[2:]),
        "embedding_norm_sq": (torch.tensor([[0, 1, 1], [2, 3, 0]]), randn(2, 3, 4), 3),
        "grad_sample_norm_sq": (randn(2, 3, 4),),
        "kept_weighted_sum": (randn(2, 7), torch.tensor([0.5, 0.0])),
        **{f"linear_{how}": (randn(2, 3, 4), randn(2, 3, 5)) for how in ("norm_sq", "direct_norm_sq", "kept")},
        "linear_weighted_sum": (randn(2, 3, 4), randn(2, 3, 5), torch.tensor([0.5, 0.0])),
        "outer_weighted_sum": (randn(2, 1, 4), randn(2, 1, 5), torch.tensor([0.5, 0.0])),
        "random_words": (KEY, STEP, 0, noise.COINS, 0, 37),
        "add_noise_": (pair(), *draws),
        "noise_sgd_": (pair(), pair(), pair(), *draws, 1.0, 0.1, 0.9, 0.0, 0.1, False, False, False),
        "noise_adam_": (
            *(pair() for _ in range(5)),
            *draws,
            *(1.0, 2, 0.1, 0.9, 0.99, 1e-8, 0.1, True, False),
        ),
    }


@pytest.mark.parametrize("overload", ["default", "reference"])
@pytest.mark.parametrize("name", sorted(n for n, op in OPS.items() if op.__module__.startswith("dp2vae_fast.")))
def test_opcheck(name, overload):
    arguments = arguments_of_every_op()
    assert name in arguments, f"add arguments for op {name} to arguments_of_every_op"
    torch.library.opcheck(getattr(getattr(torch.ops.dp2vae_fast, name), overload), arguments[name])


def tensors_of(values) -> list[Tensor]:
    lists = [value if isinstance(value, list | tuple) else [value] for value in values]
    return [x for x in itertools.chain(*lists) if isinstance(x, Tensor)]


@pytest.mark.parametrize("name", sorted(arguments_of_every_op()))
def test_every_op_takes_keywords(name):
    op, positional, named = OPS[name], arguments_of_every_op()[name], arguments_of_every_op()[name]
    names = list(inspect.signature(op).parameters)
    expected = op(*positional)
    found = op(*named[:1], **dict(reversed(list(zip(names, named, strict=True))[1:])))
    pairs = zip(tensors_of([found, *named]), tensors_of([expected, *positional]), strict=True)
    assert all(same_bits(one, other) for one, other in pairs)
    with pytest.raises(TypeError, match=rf"^{name}: missing a required argument: '{names[-1]}'; it takes {names[0]}"):
        op(*named[:-1])
    with pytest.raises(TypeError, match=rf"^{name}: got an unexpected keyword argument 'bound'; it takes {names[0]}"):
        op(*named, bound=1.0)


def test_ops_compile_without_a_graph_break_to_the_same_bits():
    adam = (0.5, 3, 0.1, 0.9, 0.99, 1e-3, 0.01, False, False)

    def step(params, sums, first, second, key, step):
        noise.noise_adam_(params, sums, first, second, [], key, step, 0, [0, 1], 1.3, *adam)
        return noise.random_words(key, step, 0, noise.COINS, 0, 40), params[1] + 1

    def lists():
        return [[torch.linspace(1, 2, 3), torch.linspace(1, 2, 130)] for _ in range(4)]

    eager, compiled = lists(), lists()
    expected = step(*eager, KEY, STEP)
    found = torch.compile(step, fullgraph=True)(*compiled, KEY, STEP)
    for one, other in zip(itertools.chain(found, *compiled), itertools.chain(expected, *eager), strict=True):
        assert same_bits(one, other)
    assert not same_bits(compiled[0][1], lists()[0][1])


def test_the_package_works_without_the_native_module():
    code = """
import sys, warnings
sys.modules["dp2vae_fast._C"] = None
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    import torch, dp2vae_fast
    from dp2vae_fast.ops import noise
    key, x = torch.arange(8, dtype=torch.int32), torch.zeros(200)
    noise.add_noise_([x], key, torch.tensor(3), 0, [0], 1.0)
    noise.add_noise_([x], key, torch.tensor(4), 0, [0], 1.0)
assert torch.isfinite(x).all() and x.std() > 1
said = [str(w.message) for w in said if "dp2vae_fast" in str(w.message)]
assert len(said) == 1, said
assert said[0] == (
    "dp2vae_fast runs on its plain-PyTorch reference ops: "
    "the native module is not built (reinstall with a C++ compiler)"
), said
rows = [row for row in dp2vae_fast.backends_table() if row.backend == "cpp"]
assert {"random_words", "add_noise_", "noise_sgd_", "noise_adam_"} <= {row.op for row in rows}
assert {(row.available, row.reason) for row in rows} == {
    (False, "the native module is not built (reinstall with a C++ compiler)")
}, rows
try:
    noise.random_words(key, torch.tensor(3), 0, 0, 0, 5, backend="cpp")
except NotImplementedError as error:
    assert "cpp: the native module is not built" in str(error), error
else:
    raise AssertionError("backend='cpp' ran without the native module")
print(noise.random_words(key, torch.tensor(3), 0, 0, 0, 5).tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "DP2VAE_FAST_BACKEND": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    key = torch.arange(8, dtype=torch.int32)
    assert done.stdout.strip() == str(noise.random_words(key, STEP, 0, 0, 0, 5).tolist())
    assert dp2vae_fast.backends_table()  # and this process still has what it had
