"""What a GPU must do and no CPU can show: every op on every backend there against float64 on the CPU, noise to the bit,
whole steps, streams, devices and captured draws. The same bodies run on the CPU too, so that they are known to work;
tests/test_triton*.py and tests/test_captured.py run on a GPU by themselves and are not repeated here.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import gate
import pytest
import torch
from cases import grads_one_by_one, lying, record_loss
from environment import multiply_float32
from streams import _C, KEY, same_bits, ulp_distance
from test_noise import (
    ADAM_SETTINGS,
    INDICES,
    SGD_SETTINGS,
    assert_same_but_for_rounding,
    names,
    run_adam,
    run_sgd,
    some,
)
from test_products import SHAPES, conv_product, linear_product
from torch import Tensor, nn

from dp2vae_fast import PrivacyEngine, ops
from dp2vae_fast.engine.keystream import Keystream
from dp2vae_fast.ops import _op, noise

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, where Triton is interpreted
GPU = torch.cuda.is_available()
gpu = pytest.mark.skipif(not GPU, reason="no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]
PLACES = [("cpu", "cpp"), ("cpu", "reference")]  # Triton's interpreter has tests of its own
PLACES += [pytest.param("cuda", backend, marks=gpu) for backend in _op.ORDER["cuda"]]
TO_THE_BIT = ("cpp", "cuda", "triton")  # the reference forms normals in float64
FORMS = [(torch.float32, memory) for memory in ("contiguous", "channels last", "strided")]
FORMS += [(torch.float16, "contiguous"), (torch.bfloat16, "contiguous"), (torch.bfloat16, "channels last")]
BOUND = 0.7
STEP = 3


def moved(value: Any, device: str | torch.device, dtype: torch.dtype | None = None) -> Any:
    """Tensors on a device, those of real numbers as ``dtype``, with their strides; lists too."""
    if isinstance(value, list | tuple):
        return type(value)(moved(x, device, dtype) for x in value)
    if not isinstance(value, Tensor):
        return value
    dtype = dtype if dtype and value.is_floating_point() else value.dtype
    if torch.device(device) == value.device or value.is_contiguous():
        return value.to(device, dtype)
    # Tensor.to closes gaps.
    last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    memory = torch.zeros(last + 1, device=device, dtype=dtype)
    if dtype.is_floating_point:
        memory.fill_(torch.nan)
    return memory.as_strided(value.shape, value.stride()).copy_(value)


def run(name: str, backend: str, arguments: tuple) -> Any:
    """The op on that backend, or the test is skipped with the reason why not."""
    op = _op.OPS[name]
    if gap := op._gap(backend, _op._device_type(arguments), arguments):
        pytest.skip(gap)
    return op(*arguments, backend=backend)


@pytest.fixture(params=["ieee", "tf32"])
def precision(request):
    """How float32 is multiplied, which the error bounds must know."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    multiply_float32(request.param == "tf32")
    yield request.param
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@gpu
@pytest.mark.skipif(torch.version.cuda is None or shutil.which("nvcc") is None, reason="nothing to build it with")
def test_the_cuda_module_is_built_and_preferred():
    assert _op._cuda_gap == ""
    rows = {row.op for row in _op.backends_table() if row.backend == "cuda" and row.available}
    assert {"add_noise_", "noise_sgd_", "noise_adam_", "random_words", "clip_factors", "normalize_factors"} == rows
    assert _op.ORDER["cuda"][0] == "cuda"


# --- ops against float64 ----------------------------------------------------------------------------------------------


def squares(values: Tensor) -> Tensor:
    return values.double().flatten(1).square().sum(1)


def conv(name: str) -> Callable[[torch.dtype, str], tuple]:
    shape = next(shape for shape in SHAPES if shape.name == name)

    def make(dtype: torch.dtype, memory: str) -> tuple:
        product = conv_product(shape, dtype, memory)
        return product.activations, product.backprops, *product.geometry.arguments()

    return make


def linear(t: int, d: int, p: int) -> Callable[[torch.dtype, str], tuple]:
    def make(dtype: torch.dtype, memory: str) -> tuple:
        product = linear_product(t, d, p, dtype)
        return lying(product.activations, memory), lying(product.backprops, memory)

    return make


OPERANDS = {
    ("linear", "1 position"): linear(1, 300, 40),
    ("linear", "37 positions"): linear(37, 19, 33),
    ("linear", "200 positions"): linear(200, 16, 24),
    **{("conv", name): conv(name) for name in ("1-d", "decoder", "dilated", "grouped", "1x1", "3-d")},
}
RANDOM = torch.Generator().manual_seed(5)
OTHERS = {
    "grad_sample_norm_sq": (torch.randn(4, 30, 70, generator=RANDOM),),
    "kept_weighted_sum": (torch.randn(4, 2100, generator=RANDOM), torch.tensor([0.5, 0.0, 1.0, 0.25])),
    "group_norm_grad_sample": (*(torch.randn(3, 12, 70, generator=RANDOM) for _ in range(2)), 4, 1e-5),
    "layer_norm_grad_sample": (*(torch.randn(3, 40, 70, generator=RANDOM) for _ in range(2)), False, 1e-5),
    "embedding_norm_sq": (torch.randint(5, (3, 40), generator=RANDOM), torch.randn(3, 40, 17, generator=RANDOM), 2),
}


def assert_near(found: Tensor, exact: Tensor, precision: str) -> None:
    """Float32 sums of these lengths; with TF32, operands of 11 bits."""
    assert bool((found.cpu().double() - exact).norm() <= {"ieee": 1e-5, "tf32": 2e-3}[precision] * exact.norm())


def assert_bounded(norm_sq: Tensor, error: Tensor, exact: Tensor) -> None:
    """The bound holds, and is of use: operands of 11 bits, at the worst, in eight places."""
    norm_sq, error = norm_sq.cpu().double(), error.cpu().double()
    assert bool((norm_sq + error >= exact).all()) and bool((norm_sq - error <= exact).all())
    assert bool((error <= 0.05 * exact + 1e-20).all())


def check(name: str, backend: str, arguments: tuple, device: str, precision: str) -> None:
    exact = _op.OPS[name].reference(*moved(arguments, "cpu", torch.float64))
    found = run(name, backend, moved(arguments, device))
    parts = found if isinstance(found, tuple) else (found,)
    assert all(part.device.type == device for part in parts)
    if name.endswith("kept"):
        assert_near(found[0], exact[0], precision)
        assert_bounded(*found[1:], squares(found[0].cpu()))
        if precision == "ieee":
            torch.testing.assert_close(found[1].cpu().double(), exact[1], rtol=1e-4, atol=0)
    elif name.endswith("norm_sq"):
        assert_bounded(*found, exact[0])
    else:
        for one, other in zip(parts, exact if isinstance(exact, tuple) else (exact,), strict=True):
            assert_near(one, other, precision)


@pytest.mark.parametrize("dtype, memory", FORMS, ids=str)
@pytest.mark.parametrize("operands", OPERANDS, ids="-".join)
@pytest.mark.parametrize("device, backend", PLACES)
def test_products(device, backend, operands, dtype, memory, precision):
    if precision == "tf32" and (device == "cpu" or dtype != torch.float32):
        pytest.skip("TF32 is of float32 on a GPU")
    arguments, ran = OPERANDS[operands](dtype, memory), []
    for how in ("norm_sq", "direct_norm_sq", "kept"):
        name = f"{operands[0]}_{how}"
        if not _op.OPS[name]._gap(backend, device, moved(arguments, device)):
            check(name, backend, arguments, device, precision)
            ran.append(how)
    weights = torch.linspace(0, 1, len(arguments[0]))
    name = f"{operands[0]}_weighted_sum"
    weighted = (*arguments[:2], weights, *arguments[2:])
    if not _op.OPS[name]._gap(backend, device, moved(weighted, device)):
        check(name, backend, weighted, device, precision)
        ran.append("weighted_sum")
    if not ran:
        pytest.skip(f"{backend} takes none of them")


@pytest.mark.parametrize("dtype, memory", FORMS, ids=str)
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("device, backend", PLACES)
def test_other_ops(device, backend, name, dtype, memory):
    first, *rest = moved(OTHERS[name], "cpu", dtype)
    rest = [lying(x, memory) if isinstance(x, Tensor) and x.dim() > 1 else x for x in rest]
    if name == "kept_weighted_sum":
        if dtype != torch.float32:
            pytest.skip("gradients are kept in float32")
    check(name, backend, (lying(first, memory), *rest), device, "ieee")


@pytest.mark.parametrize("op, more", [("clip_factors", ()), ("normalize_factors", (0.01,))])
@pytest.mark.parametrize("layers, records", [(1, 1), (5, 0), (40, 1000)])
@pytest.mark.parametrize("device, backend", PLACES)
def test_factors_never_exceed_the_exact_ones(device, backend, layers, records, op, more):
    generator = torch.Generator().manual_seed(1)
    norm_sq = torch.rand(records, layers, generator=generator).mT * torch.logspace(-6, 6, records)
    error = norm_sq * 1e-6
    if records > 5:
        norm_sq[0, :3] = torch.tensor([float("nan"), float("inf"), 3e38])
    found = run(op, backend, (norm_sq.to(device), error.to(device), BOUND, *more)).cpu()
    exact = getattr(ops, op).reference(norm_sq.double(), error.double(), BOUND, *more)
    assert bool((found.double() <= exact).all())
    torch.testing.assert_close(found[3:].double(), exact[3:], rtol=1e-4, atol=0)
    assert not found[:2].any() or records <= 5


# --- noise ------------------------------------------------------------------------------------------------------------


def key_and_step(device: str, step: int = STEP) -> tuple[Tensor, Tensor]:
    return KEY.to(device), torch.tensor(step, device=device)


@pytest.mark.parametrize("n", [0, 1, 17, 2049, 70_001])
@pytest.mark.parametrize("device, backend", PLACES)
def test_words_are_the_references(device, backend, n):
    how = (2**30 - 1, noise.COINS, 2**32 - 1, n)
    found = run("random_words", backend, (*key_and_step(device, 2**32 - 1), *how))
    assert same_bits(found.cpu(), noise.random_words(*key_and_step("cpu", 2**32 - 1), *how, backend="reference"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device, backend", PLACES)
def test_noise_is_the_cpus(device, backend, dtype):
    """To the bit where both are kernels, within `MAX_ULP` of the reference anyway."""
    found = some(dtype, 0, device)
    run("add_noise_", backend, (found, *key_and_step(device), 2, INDICES, 1.7))
    expected = some(dtype, 0)
    noise.add_noise_(expected, *key_and_step("cpu"), 2, INDICES, 1.7)
    assert_same(moved(found, "cpu"), expected, backend in TO_THE_BIT and dtype in (torch.float32, torch.float64))
    z = [torch.zeros(5001, device=device)]
    run("add_noise_", backend, (z, *key_and_step(device), 0, [9], 1.0))
    assert ulp_distance(z[0].cpu(), noise.normals(*key_and_step("cpu"), 0, 9, 5001)).max() <= noise.MAX_ULP


def assert_same(found: list[Tensor], expected: list[Tensor], to_the_bit: bool) -> None:
    """To the bit where the CPU's kernels are there too; else up to roundings, normals being of float32 at best."""
    if to_the_bit and _C:
        assert all(same_bits(one, other) for one, other in zip(found, expected, strict=True))
    else:
        narrow = [[x.float() if x.dtype == torch.float64 else x for x in xs] for xs in (found, expected)]
        assert_same_but_for_rounding(*narrow)


@pytest.mark.parametrize("device, backend", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "update, settings",
    [(run_sgd, s) for s in SGD_SETTINGS] + [(run_adam, s) for s in ADAM_SETTINGS],
    ids=lambda x: names(x) if isinstance(x, dict) else "",
)
def test_updates_are_the_cpus(device, backend, dtype, update, settings):
    """Four steps of SGD or Adam with noise; tests/test_noise.py holds the CPU's against torch.optim."""
    tensors = some(dtype, 0, device)
    if gap := ops.add_noise_._gap(backend, device, (tensors, *key_and_step(device), 0, INDICES, 1.0)):
        pytest.skip(gap)
    expected = update(settings, dtype, "cpp" if _C else "reference")
    found = [moved(x, "cpu") for x in update(settings, dtype, backend, device)]
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other, backend in TO_THE_BIT)


@gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_captured_draw_follows_its_step(backend):
    key, step = key_and_step("cuda", 0)
    x = torch.zeros(5001, device="cuda")

    def draw() -> None:
        x.zero_()
        run("add_noise_", backend, ([x], key, step, 0, [4], 1.0))
        step.add_(1)

    draw()  # kernels are loaded, or compiled
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        draw()
    for now in (1, 2, 3):
        graph.replay()
        expected = torch.zeros(5001)
        noise.add_noise_([expected], *key_and_step("cpu", now), 0, [4], 1.0)
        assert ulp_distance(x.cpu(), expected).max() <= noise.MAX_ULP


@gpu
def test_a_step_on_the_host_is_not_captured():
    x = torch.zeros(200, device="cuda")
    arguments = ([x], KEY.cuda(), torch.tensor(3), 0, [0], 1.0)
    run("add_noise_", "cuda", arguments)
    with pytest.raises(RuntimeError, match="every replay of this graph would repeat its noise"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            noise.add_noise_(*arguments, backend="cuda")


# --- streams and devices ----------------------------------------------------------------------------------------------


def calls(device: str | torch.device) -> dict[str, tuple[list[Tensor], Callable[[str, list[Tensor]], Tensor]]]:
    """Of each family one op: tensors, and what it makes of them."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(device)

    def add(backend: str, x: list[Tensor]) -> Tensor:
        out = x[0].clone()
        run("add_noise_", backend, ([out], KEY.to(x[0].device), torch.tensor(STEP, device=x[0].device), 0, [0], 1.0))
        return out

    def op(name: str, *more: Any) -> Callable[[str, list[Tensor]], Tensor]:
        def call(backend: str, x: list[Tensor]) -> Tensor:
            found = run(name, backend, (*x, *more))
            return found[0] if isinstance(found, tuple) else found

        return call

    geometry = ([4, 6, 4, 4], [2, 2], [1, 1], [1, 1], 1, True)
    images = [normal(3, 4, 5, 5), normal(3, 6, 10, 10)]
    return {
        "add_noise_": ([normal(3000)], add),
        "clip_factors": ([normal(3, 50).square(), normal(3, 50).square()], op("clip_factors", BOUND)),
        "linear_norm_sq": ([normal(3, 20, 8), normal(3, 20, 9)], op("linear_norm_sq")),
        "linear_kept": ([normal(3, 20, 8), normal(3, 20, 9)], op("linear_kept")),
        "conv_norm_sq": (images, op("conv_norm_sq", *geometry)),
        "group_norm_grad_sample": ([normal(3, 4, 20), normal(3, 4, 20)], op("group_norm_grad_sample", 2, 1e-5)),
        "linear_weighted_sum": (
            [normal(3, 20, 8), normal(3, 20, 9), normal(3).abs()],
            op("linear_weighted_sum"),
        ),
    }


@pytest.mark.parametrize("name", calls("cpu"))
@pytest.mark.parametrize("device, backend", PLACES)
def test_work_is_put_on_the_current_stream(device, backend, name):
    """On a side stream that is still busy: launched anywhere else, it would read what was there before."""
    tensors, call = calls(device)[name]
    expected = call(backend, tensors)
    late = [torch.zeros_like(x) for x in tensors]
    if device == "cuda":
        torch.cuda.synchronize()
    side = torch.cuda.Stream() if device == "cuda" else None
    with torch.cuda.stream(side) if side else nullcontext():
        if side:
            torch.cuda._sleep(50_000_000)  # some hundredths of a second
        for to, x in zip(late, tensors, strict=True):
            to.copy_(x)
        found = call(backend, late)
    if side:
        side.synchronize()
    assert torch.equal(found, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
@pytest.mark.parametrize("name", calls("cpu"))
@pytest.mark.parametrize("backend", _op.ORDER["cuda"])
def test_work_is_put_on_the_tensors_device(backend, name):
    results = []
    for index in (0, 1):
        tensors, call = calls(torch.device("cuda", index))[name]
        results.append(call(backend, tensors))
        assert torch.cuda.current_device() == 0 and results[-1].device.index == index
    assert torch.equal(results[0].cpu(), results[1].cpu())


# --- whole steps ------------------------------------------------------------------------------------------------------


N = 6


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(4)
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)]
    if kind == "decoder":
        up = [nn.ConvTranspose2d(8, 6, 4, 2, 1), nn.GroupNorm(2, 6), nn.SiLU(), nn.Conv2d(6, 3, 3, padding=1)]
        layers = [nn.Linear(7, 128), nn.Unflatten(1, (8, 4, 4)), *up]
    return nn.Sequential(*layers)


def inputs_of(kind: str) -> Tensor:
    shape = (N, 7) if kind == "decoder" else (N, 3, 8, 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)) * torch.linspace(0.2, 2, N).reshape(
        N, *[1] * (len(shape) - 1)
    )


def truth_of(kind: str, used: Tensor, device: str, half: bool) -> tuple[float, gate.Sum]:
    """The bound, and the sum of clipped gradients of the records in ``used``: float64, record by record, on the CPU;
    beside it what the framework makes of the same weighted losses where and as the step is taken."""
    model, x = model_of(kind), inputs_of(kind)
    rows = grads_one_by_one(model.double(), x.double())
    lengths = {name: g.flatten(1).norm(dim=1) for name, g in rows.items()}
    whole = torch.stack(list(lengths.values())).norm(dim=0)
    bound = float(whole.median())
    factors = (bound / whole).clamp(max=1) * used
    truth = {name: torch.einsum("n,n...->...", factors, g) for name, g in rows.items()}
    model = model_of(kind).to(device)
    with torch.autocast(device, torch.bfloat16, enabled=half):
        losses = record_loss(model(x.to(device)).float())
    found = torch.autograd.grad((losses * factors.float().to(device)).sum(), list(model.parameters()))
    own = {n: float((g.cpu().double() - truth[n]).norm()) for n, g in zip(truth, found, strict=True)}
    return bound, gate.Sum(truth, own, {n: float((factors * ls).sum()) for n, ls in lengths.items()})


def privatized(kind: str, device: str, bound: float, channels_last: bool = False, **options: Any) -> tuple:
    model = model_of(kind).to(device)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    settings = dict(noise_multiplier=0.0, sample_rate=0.1, expected_batch_size=N, loss_reduction="sum")
    optimizer = options.pop("optimizer", lambda p: torch.optim.SGD(p, lr=1.0))(model.parameters())
    return model, *PrivacyEngine(**options.pop("engine", {})).privatize(
        model, optimizer, max_grad_norm=bound, **settings | options
    )


@pytest.mark.parametrize("kind", ["classifier", "decoder"])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bf16 autocast"])
@pytest.mark.parametrize("broken", [False, True], ids=["", "a record of NaN"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["", "channels last"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of the record that is dropped
def test_a_step_releases_the_clipped_sum(device, channels_last, broken, half, kind, precision):
    if precision == "tf32" and (device == "cpu" or half):
        pytest.skip("TF32 is of float32 on a GPU")
    used = torch.ones(N, dtype=torch.float64)
    x = inputs_of(kind)
    if broken:
        used[2], x[2] = 0.0, float("nan")
    bound, truth = truth_of(kind, used, device, half)
    model, private, optimizer = privatized(kind, device, bound, channels_last)
    before = {name: p.detach().cpu().double() for name, p in model.named_parameters()}
    x = x.to(device)
    if channels_last and x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    with torch.autocast(device, torch.bfloat16, enabled=half):
        losses = record_loss(private(x).float())
    losses.sum().backward()
    optimizer.step()
    found = {name: before[name] - p.detach().cpu().double() for name, p in model.named_parameters()}
    verdict = gate.judge(found, truth, floor=gate.HALF if half or precision == "tf32" else gate.ROUNDED_UP)
    assert not verdict.wrong, verdict


@pytest.mark.parametrize("kind", ["classifier", "decoder"])
@pytest.mark.parametrize("device", DEVICES)
def test_two_seeded_runs_are_the_same_to_the_bit(device, kind, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)

    def trained() -> list[Tensor]:
        engine = {"keystream": Keystream.seeded(5)}
        model, private, optimizer = privatized(
            kind, device, 0.5, engine=engine, noise_multiplier=1.0, optimizer=lambda p: torch.optim.Adam(p, lr=0.01)
        )
        for scale in (1.0, 0.5, 2.0):
            optimizer.zero_grad()
            record_loss(private(scale * inputs_of(kind).to(device))).sum().backward()
            optimizer.step()
        return [p.detach().cpu() for p in model.parameters()]

    one, other = trained(), trained()
    assert all(same_bits(a, b) for a, b in zip(one, other, strict=True))
    assert not any(same_bits(a, b.detach()) for a, b in zip(one, model_of(kind).parameters(), strict=True))
