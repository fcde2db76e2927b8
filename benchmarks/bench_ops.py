"""Every op on every backend that has it, on shapes of real decoders, against a floor that is computed here.

    python -m pytest benchmarks/bench_ops.py [-k conv] [--benchmark-max-time 0.3] [--record results/ops_cpu.json]

The floor of a case is the larger of two times: its bytes, each read or written once, at the rate of a copy of as many
bytes on this machine, and the multiply-adds of the cheapest exact way that is known, at the rate of a float32 matrix
product. How far above it an op is stands behind its name in the table; where it is far above, the planner may well take
another way. Nothing is timed unless it passes its gate: a record's squared norm as near the exact one as its error
bound says, gradients as float64 and autograd make them, noise the reference's.

A new op is one line in ``CASES``, or a factory where it comes in several shapes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timing import copying, product_rate
from torch import Tensor

from dp2vae_fast.ops import noise
from dp2vae_fast.ops._op import BACKENDS, OPS

KEY, STEP = torch.arange(8, dtype=torch.int32), torch.tensor(3)
CHECKED = 2  # records that the gate looks at


@dataclass(frozen=True)
class Case:
    """An op on arguments; ``check(arguments, result)`` says whether the result is right."""

    op: str
    what: str
    arguments: Callable[[], list[Any]]
    check: Callable[[list[Any], Any], bool]
    bytes: float = 0.0
    macs: float = 0.0
    rival: Callable[..., Any] | None = None  # the same by other means, on the same arguments

    @property
    def floor(self) -> float:
        """Seconds."""
        return max(copying(int(self.bytes)), self.macs / product_rate())


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _close(found: Tensor, exact: Tensor) -> bool:
    return bool((found[: len(exact)].double() - exact).norm() <= 1e-5 * exact.norm())


def _bounded(found: tuple[Tensor, Tensor], gradient: Tensor) -> bool:
    """Squared norms as near as their error bound says, and the bound of use."""
    exact = gradient.flatten(1).square().sum(1)
    norm_sq, error = (t[: len(exact)].double() for t in found)
    return bool(((norm_sq - exact).abs() <= error).all() and (error <= 0.5 * exact).all())


def _products(
    family: str,
    shape: str,
    made: Callable[[], list[Any]],
    exact: Callable[[list[Any]], Tensor],
    sizes: dict[str, float],
    rival: Callable[..., Any] | None = None,
    sums: str = "",
) -> list[Case]:
    """The four ops of a family. ``exact`` makes the gradients of the first records; ``sizes``: read (bytes of both
    operands), kept (of all gradients), weight (of one), direct and gram (multiply-adds). ``sums``: the op of weighted
    sums, where it is not the family's."""

    def norms(a: list[Any], r: Any) -> bool:
        return _bounded(r[-2:], exact(a))

    def gradients(a: list[Any], r: Any) -> bool:
        return norms(a, r) and _close(r[0], exact(a))

    def weighted() -> list[Any]:
        arguments = made()
        return [*arguments[:2], torch.linspace(0.1, 1, len(arguments[0])), *arguments[2:]]

    def total(a: list[Any], r: Tensor) -> bool:
        """Float64 sums over records and positions at once."""
        return _close(r, OPS[f"{family}_weighted_sum"].reference(*a).double())

    read, direct = sizes["read"], sizes["direct"]
    return [
        Case(f"{family}_norm_sq", shape, made, norms, read, min(direct, sizes["gram"]), rival),
        Case(f"{family}_direct_norm_sq", shape, made, norms, read, direct),
        Case(f"{family}_kept", shape, made, gradients, read + sizes["kept"], direct),
        Case(sums or f"{family}_weighted_sum", shape, weighted, total, read + sizes["weight"], direct),
    ]


def linear(what: str, n: int, t: int, d: int, p: int) -> list[Case]:
    def exact(arguments: list[Tensor]) -> Tensor:
        a, b = (x[:CHECKED].double() for x in arguments)
        return torch.einsum("ntp,ntd->npd", b, a)

    sizes = {
        "read": 4.0 * n * t * (d + p),
        "kept": 4.0 * n * d * p,
        "weight": 4.0 * d * p,
        "direct": n * t * d * p,
        "gram": n * t * (t + 1) / 2 * (d + p),
    }
    made = functools.partial(lambda: [_normal(n, t, d), _normal(n, t, p)])
    sums = "outer_weighted_sum" if t == 1 else ""
    return _products("linear", f"{what}: N={n} T={t} {d}→{p}", made, exact, sizes, sums=sums)


def conv(what: str, n: int, c_in: int, c_out: int, side: int, k: int, s: int, transposed: bool = False) -> list[Case]:
    """Square convolution with padding 1; ``side`` is of the input."""
    weight = [c_in, c_out, k, k] if transposed else [c_out, c_in, k, k]
    out = (side - 1) * s - 2 + k if transposed else (side + 2 - k) // s + 1
    run = F.conv_transpose2d if transposed else F.conv2d

    def made() -> list[Any]:
        x, b = _normal(n, c_in, side, side), _normal(n, c_out, out, out)
        return [x, b, weight, [s, s], [1, 1], [1, 1], 1, transposed]

    def exact(arguments: list[Any]) -> Tensor:
        w = torch.zeros(weight, dtype=torch.float64, device=arguments[0].device, requires_grad=True)
        pairs = [
            (x.double()[None], b.double()[None]) for x, b in zip(*(a[:CHECKED] for a in arguments[:2]), strict=True)
        ]
        return torch.stack([torch.autograd.grad(run(x, w, stride=s, padding=1), w, b)[0] for x, b in pairs])

    def unfolded(x: Tensor, b: Tensor, *_: Any) -> Tensor:
        """The Gram norm of an unfolded convolution, both halves."""
        plain, spread = (x, b) if transposed else (b, x)
        windows, plain = F.unfold(spread, k, padding=1, stride=s), plain.flatten(2)
        return (torch.bmm(windows.transpose(1, 2), windows) * torch.bmm(plain.transpose(1, 2), plain)).sum((1, 2))

    plain, spread, positions = (c_in, c_out, side**2) if transposed else (c_out, c_in, out**2)
    sizes = {
        "read": 4.0 * n * (c_in * side**2 + c_out * out**2),
        "kept": 4.0 * n * math.prod(weight),
        "weight": 4.0 * math.prod(weight),
        "direct": n * positions * math.prod(weight),
        "gram": n * positions**2 / 2 * (plain + s * s * spread),
    }
    shape = f"{what}: N={n} {c_in}→{c_out} {side}x{side} k{k}s{s}{' transposed' * transposed}"
    return _products("conv", shape, made, exact, sizes, unfolded)


def _noise_case(op: str, parameters: int, numbers: int, settings: tuple[Any, ...]) -> Case:
    """``numbers``: how many of four bytes a parameter takes to read and write; as many lists less the written ones."""
    lists = {"add_noise_": 1, "noise_sgd_": 2, "noise_adam_": 4}[op]

    def made() -> list[Any]:
        tensors = [[_normal(parameters // 1024, 1024).abs()] for _ in range(lists)]
        return [*tensors, *[[]] * {1: 0, 2: 1, 4: 1}[lists], KEY, STEP, 0, [0], 1.3, *settings]

    def check(arguments: list[Any], result: Any) -> bool:
        return _close(arguments[0][0].flatten().cpu(), wanted())

    @functools.cache
    def wanted() -> Tensor:
        expected = made()
        OPS[op](*expected, backend="reference")
        return expected[0][0].double().flatten()

    return Case(op, f"{parameters / 1e6:.1f} M parameters", made, check, 4.0 * numbers * parameters)


def _gradient(a: list[Tensor]) -> Tensor:
    return a[0][:CHECKED].double()


def _factors(a: list[Any], r: Tensor) -> bool:
    """At most what the exact norm allows, and hardly less."""
    exact = (a[2] / (a[0].double().sum(0)).sqrt()).clamp(max=1)
    return bool(((r <= exact) & (r >= 0.999 * exact)).all())


CASES: list[Case] = [
    *linear("W3 first", 512, 1, 64, 512),
    *linear("ViT mlp", 16, 64, 192, 768),
    *conv("W2 512→256", 16, 512, 256, 4, 4, 2, transposed=True),
    *conv("W2 256→128", 16, 256, 128, 8, 4, 2, transposed=True),
    *conv("W2 128→64", 16, 128, 64, 16, 4, 2, transposed=True),
    *conv("W1 64→32", 64, 64, 32, 7, 4, 2, transposed=True),
    *conv("W1 32→1", 64, 32, 1, 14, 4, 2, transposed=True),
    *conv("W4 256→128", 4, 256, 128, 16, 3, 1),
    *conv("W4 128→64", 4, 128, 64, 32, 3, 1),
    *conv("256→256 at 8x8", 8, 256, 256, 8, 3, 1),
    *conv("256→256 at 16x16", 8, 256, 256, 16, 3, 1),
    Case(
        "kept_weighted_sum",
        "N=64, 74 k numbers a record",
        lambda: [_normal(64, 64 * 1152), torch.linspace(0.1, 1, 64)],
        lambda a, r: _close(r, a[1].double() @ a[0].double()),
        bytes=4.0 * 64 * 64 * 1152,
    ),
    Case(
        "group_norm_grad_sample",
        "N=64 C=128 S=1024",
        lambda: [_normal(64, 128, 1024), _normal(64, 128, 1024), 8, 1e-5],
        lambda a, r: _close(r[0], (F.group_norm(a[0].double(), 8) * a[1].double()).sum(2)),
        bytes=8.0 * 64 * 128 * 1024,
    ),
    Case(
        "layer_norm_grad_sample",
        "N=64 T=64 D=192",
        lambda: [_normal(64, 64, 192), _normal(64, 64, 192), False, 1e-5],
        lambda a, r: _close(r[0], (F.layer_norm(a[0].double(), [192]) * a[1].double()).sum(1)),
        bytes=8.0 * 64 * 64 * 192,
    ),
    Case(
        "grad_sample_norm_sq",
        "N=64, 74 k numbers a record",
        lambda: [_normal(64, 64, 1152)],
        lambda a, r: _bounded(r, _gradient(a)),
        bytes=4.0 * 64 * 64 * 1152,
    ),
    Case(
        "clip_factors",
        "N=512, 20 parameters",
        lambda: [_normal(20, 512).square(), torch.zeros(20, 512), 3.0],
        _factors,
        bytes=4.0 * 41 * 512,
    ),
    Case(
        "random_words",
        "1 M words",
        lambda: [KEY, STEP, 0, 0, 0, 2**20],
        lambda a, r: torch.equal(r, noise.random_words(*a, backend="reference")),
        bytes=4.0 * 2**20,
    ),
    _noise_case("add_noise_", 2**22, 2, ()),
    _noise_case("noise_sgd_", 2**22, 3, (1 / 64, 1e-3, 0.0, 0.0, 0.0, False, False, False)),
    _noise_case("noise_adam_", 2**22, 7, (1 / 64, 3, 1e-3, 0.9, 0.999, 1e-8, 0.0, False, False)),
]
TURNS = [(case, backend) for case in CASES for backend in BACKENDS if not OPS[case.op].missing(backend)]
RIVALS = [case for case in CASES if case.rival is not None]


@pytest.mark.parametrize(("case", "backend"), TURNS, ids=[f"{c.op}-{b}-{c.what}" for c, b in TURNS])
def test_op(benchmark: Any, case: Case, backend: str) -> None:
    arguments = case.arguments()
    if gap := OPS[case.op]._gap(backend, "cpu", tuple(arguments)):
        pytest.skip(gap)
    result = OPS[case.op](*arguments, backend=backend)
    assert case.check(arguments, result), "wrong, so not timed"
    arguments = case.arguments()
    benchmark.group = case.op
    benchmark(OPS[case.op], *arguments, backend=backend)
    _label(benchmark, case, backend)


@pytest.mark.parametrize("case", RIVALS, ids=[f"{c.op}-rival-{c.what}" for c in RIVALS])
def test_rival(benchmark: Any, case: Case) -> None:
    """In the same group as the op: the unfolded Gram norm, which the op does without."""
    arguments = case.arguments()
    assert case.rival is not None
    found, (norm_sq, error) = case.rival(*arguments), OPS[case.op](*arguments)
    assert bool(((found - norm_sq).abs() <= 1e-3 * norm_sq + error).all()), "wrong, so not timed"
    benchmark.group = case.op
    benchmark(case.rival, *arguments)
    _label(benchmark, case, "unfold + bmm")


def _label(benchmark: Any, case: Case, how: str) -> None:
    times = benchmark.stats.stats.median / case.floor
    benchmark.extra_info.update(what=case.what, how=how, floor_ms=1e3 * case.floor)
    benchmark.stats.name = f"{case.what} [{how}] {times:.1f} x floor"
