"""``torch.compile`` of a private model: one graph, the gradients of the eager model, and the same guards."""

from __future__ import annotations

import copy
import os
import shutil

import pytest
import torch
import torch.nn.functional as F
from cases import grads_one_by_one, record_loss
from opacus.layers import DPLSTM
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.data import DataLoader, TensorDataset

from dp2vae_fast import PrivacyEngine
from dp2vae_fast.engine.capture.capture import Capture
from dp2vae_fast.engine.keystream import Keystream

D = torch.float64
without_compiler = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")
BACKENDS = ["aot_eager", pytest.param("inductor", marks=without_compiler)]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(3)
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module, backend: str = "aot_eager", **options) -> tuple[nn.Module, CompileCounterWithBackend]:
    """The model in one graph, and the counter of graphs."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, backend=counter, **({"fullgraph": True} | options)), counter  # type: ignore[return-value]


def decoder() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 32),
        nn.SiLU(),
        nn.Unflatten(1, (8, 2, 2)),
        nn.ConvTranspose2d(8, 4, 4, 2, 1),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 2, 4, 2, 1),
        nn.Flatten(),
    )


def perceptron() -> nn.Sequential:
    """Layers of one shape, whose memory a compiler uses again."""
    return nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(6, 6), nn.Tanh())])


def check(model: nn.Module, run: nn.Module, capture: Capture, inputs: Tensor) -> None:
    """Captured gradients of ``run``, which is ``model`` compiled, against one ordinary backward a record."""
    want = grads_one_by_one(copy.deepcopy(model), inputs)  # a copy, whose layers the hooks pass over
    record_loss(run(inputs)).sum().backward()
    params = dict(model.named_parameters())
    for name, gradient in zip(want, capture.take([params[n] for n in want]), strict=True):
        assert gradient is not None and params[name].grad is None, name
        torch.testing.assert_close(gradient.grad_sample(), want[name], rtol=1e-8, atol=1e-10)
        exact = want[name].reshape(len(inputs), -1).square().sum(1)
        torch.testing.assert_close(gradient.norm_sq()[0], exact, rtol=1e-8, atol=1e-12)
        weights = torch.arange(1.0, len(inputs) + 1, dtype=D)
        weighted = torch.einsum("n,n...->...", weights, want[name])
        torch.testing.assert_close(gradient.weighted_sum(weights), weighted, rtol=1e-8, atol=1e-10)


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=D)


@pytest.mark.parametrize("make", [decoder, perceptron])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_the_eager_models(backend: str, make):
    model = make().to(D)
    capture = Capture(model, verify=False)
    run, counter = compiled(model, backend)
    for rows in (5, 5, 7, 9, 5):
        check(model, run, capture, x(rows, 6))
    assert counter.frame_count == 2  # one for any number of rows, after the first


def test_a_layer_used_twice():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(torch.tanh(self.a(x)))

    model = Twice().to(D)
    capture = Capture(model, verify=False)
    check(model, compiled(model)[0], capture, x(5, 6))


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_uses_that_are_equal_are_not_merged(backend: str):
    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.a(x)

    model = Same().to(D)
    capture = Capture(model, verify=False)
    check(model, compiled(model, backend)[0], capture, x(5, 6))


def test_one_parameter_in_two_layers():
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).to(D)
    model[2].weight = model[0].weight
    capture = Capture(model, verify=False)
    check(model, compiled(model)[0], capture, x(5, 6))


def test_frozen_and_thawed_parameters():
    model = decoder().to(D)
    capture = Capture(model, verify=False)
    run, _ = compiled(model)
    for trained in (False, True):
        model[0].requires_grad_(trained)
        model[3].bias.requires_grad_(not trained)
        try:
            check(model, run, capture, x(5, 6))
        except RuntimeError as error:  # torch 2.11 keeps the graph in which they were frozen
            assert trained and "frozen or thawed" in str(error)
            capture.clear()
            torch.compiler.reset()
            check(model, run, capture, x(5, 6))


def test_a_graph_of_other_trained_parameters_is_refused():
    """Whether or not the compiler notices."""
    model = decoder().to(D)
    capture = Capture(model, verify=False)
    traced = capture.traced
    before = traced._trained()
    model[0].requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"frozen or thawed .* torch.compiler.reset"):
        traced.begun(0, [x(5, 6)], [], True, before, None)
    assert traced.begun(0, [x(5, 6)], [], True, traced._trained(), None) == 1


def test_several_losses_and_keyword_inputs():
    class Labelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(3, 6), nn.Linear(6, 4)

        def forward(self, z: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"logits": self.head(z + self.embedding(labels)), "z": z}

    model = Labelled().to(D)
    capture = Capture(model)
    run, _ = compiled(model)
    found = []
    for module in (model, run):
        z, labels = torch.ones(40, 6, dtype=D), torch.arange(40) % 3
        logits = module(z, labels=labels)["logits"]
        logits.square().sum().backward(retain_graph=True)
        logits.sin().sum().backward()
        gradients = capture.take(list(model.parameters()))
        found.append([g.grad_sample() for g in gradients if g is not None])
    assert len(found[0]) == 3
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_function_that_calls_the_model_twice(backend: str):
    model = decoder().to(D)
    capture = Capture(model)

    def both(z: Tensor) -> Tensor:
        return model(z) * model(z + 1)

    found = []
    for run in (both, torch.compile(both, backend=backend, fullgraph=True)):
        run(torch.linspace(-1, 1, 240, dtype=D).reshape(40, 6)).sum().backward()
        found.append([g.grad_sample() for g in capture.take(list(model.parameters())) if g is not None])
    assert len(found[0]) == 8
    torch.testing.assert_close(found[1], found[0])


def test_under_autocast():
    model = decoder()
    capture = Capture(model)
    run, _ = compiled(model)
    found = []
    for module in (model, run):
        z = torch.linspace(-1, 1, 240).reshape(40, 6)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = module(z)
        record_loss(output.float()).sum().backward()
        found.append([g.grad_sample() for g in capture.take(list(model.parameters())) if g is not None])
    for compiled_one, eager in zip(*found[::-1], strict=True):  # the same kernels: to one rounding, if any
        assert (compiled_one - eager).norm() <= 2**-8 * eager.norm()


def test_eval_and_no_grad_calls_leave_the_book_alone():
    model = decoder().to(D)
    capture = Capture(model, verify=False)
    run, _ = compiled(model)
    check(model, run, capture, x(5, 6))
    with torch.no_grad():
        run(x(4, 6))
    model.eval()
    with torch.no_grad():
        run(x(3, 6))
    with pytest.raises(NotImplementedError, match="eval mode"):
        run(x(3, 6)).sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in [model[0].weight])
    capture.clear()
    model.zero_grad()
    model.train()
    check(model, run, capture, x(5, 6))


def test_gradients_of_inputs_alone_are_no_batch():
    model = decoder().to(D)
    capture = Capture(model)
    run, _ = compiled(model)
    z = x(5, 6).requires_grad_()
    torch.autograd.grad(run(z).sum(), z)
    assert capture.records is None
    check(model, run, capture, x(5, 6))


# Guards --------------------------------------------------------------------------------------------------------------


def test_functional_tying_is_refused():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(6, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return F.linear(self.embedding(tokens), self.embedding.weight)

    model = Tied()
    Capture(model)
    with pytest.raises(NotImplementedError, match=r"embedding\.weight.*outside its own layer"):
        compiled(model)[0](torch.randint(6, (5, 4))).sum().backward()
    assert model.embedding.weight.grad is None


class Between(nn.Module):
    """Two layers with something between them that the hooks do not see."""

    def __init__(self, between) -> None:
        super().__init__()
        self.first, self.second, self.between = nn.Linear(6, 6), nn.Linear(6, 4), between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(torch.tanh(self.first(x))))


@pytest.mark.parametrize("between", [lambda h: h.roll(1, 0), lambda h: h - h.mean(0), lambda h: h[:1].expand_as(h)])
def test_the_first_batch_is_checked(between):
    model = Between(between).to(D)
    capture = Capture(model)
    record_loss(compiled(model)[0](x(64, 6))).sum().backward()
    capture.take(list(model.parameters()))
    with pytest.raises(NotImplementedError, match=r"'first\.weight' are not autograd's"):
        capture.check_first_batch()


def test_a_right_first_batch_is_proved():
    model = decoder().to(D)
    capture = Capture(model)
    record_loss(compiled(model)[0](x(64, 6))).sum().backward()
    capture.take(list(model.parameters()))
    capture.check_first_batch()
    assert capture.first_batch.proved == set(model.parameters()) and not capture.first_batch.waiting


def test_positions_in_the_batch_axis_are_refused():
    model = Between(lambda h: h.reshape(-1, 6)).to(D)
    Capture(model)
    with pytest.raises(ValueError, match="expected 5 rows along the first axis"):
        compiled(model)[0](x(5, 2, 6)).sum().backward()


def test_a_second_batch_before_the_first_is_taken():
    model = decoder().to(D)
    Capture(model)
    run, counter = compiled(model)
    run(x(5, 6)).sum().backward()
    with pytest.raises(RuntimeError, match="a second batch began"):
        run(x(5, 6))
    assert counter.frame_count == 1


class Remembers(nn.Module):
    """A module with a buffer, and what it does to it."""

    def __init__(self, update=lambda layer, x: None) -> None:
        super().__init__()
        self.inner, self.update = nn.Linear(6, 6), update
        self.register_buffer("seen", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        self.update(self, x.detach().sum(0))
        return self.inner(x + self.seen)


def add(layer, x):
    layer.seen += x


def replace(layer, x):
    layer.seen = x


@pytest.mark.parametrize("update", [add, replace, lambda layer, x: layer.seen.copy_(x)])
def test_an_updated_buffer_is_refused(update):
    model = nn.Sequential(Remembers(update), nn.Tanh(), nn.Linear(6, 4))
    Capture(model)
    with pytest.raises(NotImplementedError, match="updates its buffer 'seen'"):
        compiled(model)[0](torch.randn(5, 6)).sum().backward()


def test_a_buffer_that_stays_is_not():
    model = nn.Sequential(Remembers(), nn.Tanh(), nn.Linear(6, 4)).to(D)
    capture = Capture(model)
    run, counter = compiled(model)
    for _ in range(3):
        check(model, run, capture, x(5, 6))
    assert counter.frame_count == 1


def test_a_layer_that_mixes_records_in_training_mode_is_refused():
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))
    model[1].eval().requires_grad_(False)
    Capture(model)
    model.train()
    with pytest.raises(NotImplementedError, match="GroupNorm"):
        torch.compile(model, backend="aot_eager")(torch.randn(5, 6))


def test_a_report_that_does_not_arrive_is_missed():
    """As where a graph is replayed without Python."""
    model = decoder().to(D)
    capture = Capture(model)
    run, _ = compiled(model)
    run(x(5, 6)).sum().backward()
    capture.taps.arrived -= 1
    with pytest.raises(RuntimeError, match="without the gradients of every layer"):
        capture.take(list(model.parameters()))
    assert capture.records is None


def test_a_layer_without_a_rule_breaks_the_graph_and_is_captured():
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    model = nn.Sequential(nn.Linear(6, 6), Scale(), nn.Tanh(), nn.Linear(6, 4)).to(D)
    capture = Capture(model)
    check(model, compiled(model, fullgraph=False)[0], capture, x(5, 6))
    check(model, compiled(model, fullgraph=False)[0], capture, x(40, 6))


def test_a_recurrent_layer_of_opacus():
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = DPLSTM(4, 3, batch_first=True), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x)[0][:, -1])

    model = Recurrent().to(D)
    capture = Capture(model)
    check(model, compiled(model, fullgraph=False)[0], capture, x(40, 5, 4))


def test_a_part_of_the_model_alone():
    model = nn.Sequential(perceptron(), nn.Linear(6, 3)).to(D)
    capture = Capture(model)
    model[0].compile(backend="aot_eager", fullgraph=True)
    check(model, model, capture, x(40, 6))


def test_what_is_no_longer_private_trains_as_it_is():
    model = decoder().to(D)
    capture = Capture(model, verify=False)
    run, _ = compiled(model)
    check(model, run, capture, x(5, 6))
    capture.remove()
    run(x(5, 6)).sum().backward()
    assert capture.records is None and all(p.grad is not None for p in model.parameters())


def test_a_graph_older_than_its_hooks_is_refused():
    model = decoder().to(D)
    run, _ = compiled(model)
    run(x(5, 6)).sum().backward()
    model.zero_grad()
    Capture(model)
    with pytest.raises(NotImplementedError, match="outside its own layer"):
        run(x(5, 6)).sum().backward()


def test_a_copy_is_not_private():
    model = decoder().to(D)
    capture = Capture(model)
    run, _ = compiled(copy.deepcopy(model))
    run(x(5, 6)).sum().backward()
    assert capture.records is None and all(p.grad is not None for p in run.parameters())


def test_gradients_belong_to_the_draw_of_their_forward():
    draw = ("draw", 0, 0, 5)
    model = decoder().to(D)
    capture = Capture(model, verify=False)
    capture.draws = lambda: {draw}
    run, counter = compiled(model)
    for number in range(3):
        draw = ("draw", 0, number, 5)
        loss, before = run(x(5, 6)).sum(), draw
        draw = ("draw", 0, number + 1, 5)  # fetched ahead
        loss.backward()
        assert {o for o in capture.origins if o[0] == "draw"} == {before}
        capture.take(list(model.parameters()))
    assert counter.frame_count == 1


# The whole step ------------------------------------------------------------------------------------------------------


def train(physical: int | None, compile: bool) -> tuple[list[Tensor], int]:
    """Parameters after two passes, and how many graphs that took."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = decoder()
    z = torch.randn(64, 6)
    private, optimizer, loader = PrivacyEngine(accountant="rdp", keystream=Keystream.seeded(1)).make_private(
        module=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.01),
        data_loader=DataLoader(TensorDataset(z, z.sin()), batch_size=8),
        noise_multiplier=0.5,
        max_grad_norm=1.0,
        loss_reduction="sum",
        physical_batch_size=physical,
    )
    run, counter = compiled(private) if compile else (private, None)
    for _ in range(2):
        for batch, _ in loader:
            optimizer.zero_grad()
            record_loss(run(batch)).sum().backward()
            optimizer.step()
    return [p.detach() for p in model.parameters()], 0 if counter is None else counter.frame_count


def test_batches_are_accumulated_where_that_is_allowed(recwarn):
    found = []
    for compile in (False, True):
        torch.manual_seed(0)
        model = decoder().to(D)
        private, optimizer, _ = PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
            data_loader=DataLoader(TensorDataset(x(8, 6)), batch_size=4),
            noise_multiplier=0.0,
            max_grad_norm=0.5,
            loss_reduction="sum",
            poisson_sampling=False,
        )
        run = compiled(private)[0] if compile else private
        for batch in (x(3, 6), x(4, 6)):
            record_loss(run(batch)).sum().backward()
        optimizer.step()
        found.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*found)
    assert not [w for w in recwarn if "could not be checked" in str(w.message)]


@pytest.mark.parametrize("physical", [None, 6])
def test_a_private_run(physical: int | None):
    eager, _ = train(physical, compile=False)
    found, graphs = train(physical, compile=True)
    # 16 steps about 0.01 long, each to some units of 2^-24.
    torch.testing.assert_close(found, eager, rtol=0, atol=16 * 0.01 * 2**-18)
    assert graphs == 1 if physical else graphs <= 4  # of one row, none, and any other number
