"""How models use their layers: reuse, tying, freezing, keyword calls, checkpointing, in-place neighbours; and what
must be refused."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import grads_one_by_one, record_loss
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dp2vae_fast.engine.capture import Capture

D = torch.float64


def check(model: nn.Module, inputs: Tensor, run=None) -> None:
    """Captured gradients of every trainable parameter against one ordinary backward a record."""
    model = model.to(D)
    want = grads_one_by_one(model, inputs)
    capture = Capture(model)
    record_loss((run or model)(inputs)).sum().backward()
    params = dict(model.named_parameters())
    names = list(want)
    gradients = capture.take([params[n] for n in names])
    capture.remove()
    for name, gradient in zip(names, gradients, strict=True):
        assert gradient is not None, name
        assert params[name].grad is None
        torch.testing.assert_close(gradient.grad_sample(), want[name], rtol=1e-10, atol=1e-12)
        norm_sq, _ = gradient.norm_sq()
        torch.testing.assert_close(norm_sq, want[name].flatten(1).square().sum(1), rtol=1e-10, atol=1e-14)
        weighted = gradient.weighted_sum(torch.ones(len(inputs), dtype=D))
        torch.testing.assert_close(weighted, want[name].sum(0), rtol=1e-10, atol=1e-12)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(3)


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=D)


def test_a_layer_used_twice():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Conv1d(1, 1, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.a(x))
            h = self.b(torch.tanh(self.b(self.a(h).unsqueeze(1)))).squeeze(1)
            return h

    check(Twice(), x(5, 4))


def test_one_parameter_in_two_layers():
    embedding, head = nn.Embedding(6, 3), nn.Linear(3, 6, bias=False)
    head.weight = embedding.weight
    check(nn.Sequential(embedding, nn.Tanh(), head), torch.randint(6, (5, 4)))


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
        model(torch.randint(6, (5, 4))).sum().backward()
    assert model.embedding.weight.grad is None


def test_a_weight_penalty_is_refused():
    model = nn.Linear(3, 2)
    Capture(model)
    with pytest.raises(NotImplementedError, match="weight_decay"):
        (model(torch.randn(4, 3)).sum() + model.weight.square().sum()).backward()


def test_eval_mode_under_gradients_is_refused():
    model = nn.Linear(3, 2)
    Capture(model)
    model.eval()
    with pytest.raises(NotImplementedError, match="eval mode"):
        model(torch.randn(4, 3)).sum().backward()


def test_keyword_calls_and_in_place_neighbours():
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(input=F.relu_(self.a(input=x)))

    check(Keyword(), x(6, 4))


def test_an_activation_overwritten_in_place_raises_instead_of_lying():
    class Overwriting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).tanh()
            y = self.b(h)
            h.mul_(2.0)
            return y

    model = Overwriting()
    Capture(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(torch.randn(3, 4)).sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool):
    body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
    model = nn.Sequential(nn.Linear(4, 4), body)

    def run(inputs: Tensor) -> Tensor:
        return checkpoint(body, model[0](inputs).tanh(), use_reentrant=reentrant)

    class Reference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.body = model[0], body

        def forward(self, inputs: Tensor) -> Tensor:
            return self.body(self.first(inputs).tanh())

    check(Reference(), x(5, 4), run)


def test_frozen_and_unused_parameters():
    class Partial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.a.weight.requires_grad_(False)
            self.b.bias.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).tanh())

    model = Partial().to(D)
    capture = Capture(model)
    inputs = x(5, 4)
    record_loss(model(inputs)).sum().backward()
    taken = capture.take([model.a.bias, model.b.weight, model.unused.weight])
    assert taken[0] is not None and taken[1] is not None and taken[2] is None
    capture.remove()
    want = grads_one_by_one(model, inputs)
    torch.testing.assert_close(taken[0].grad_sample(), want["a.bias"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(taken[1].grad_sample(), want["b.weight"], rtol=1e-10, atol=1e-12)


def test_two_losses_of_one_forward_add():
    model = nn.Linear(4, 3).to(D)
    inputs = x(5, 4)
    capture = Capture(model)
    out = model(inputs)
    out.sin().sum().backward(retain_graph=True)
    out.square().sum().backward()
    (gradient,) = capture.take([model.weight])
    assert gradient is not None
    backprops = out.detach().cos() + 2 * out.detach()
    torch.testing.assert_close(
        gradient.grad_sample(), torch.einsum("np,nd->npd", backprops, inputs), rtol=1e-10, atol=0
    )


def test_forwards_without_a_backward_leave_nothing():
    model = nn.Linear(4, 3)
    capture = Capture(model)
    model(torch.randn(7, 4))
    with torch.no_grad():
        model(torch.randn(2, 4))
    model(torch.randn(5, 4)).sum().backward()
    (gradient,) = capture.take([model.weight])
    assert gradient is not None and gradient.records == 5


def test_parameters_survive_a_failing_forward():
    model = nn.Linear(4, 3)
    weight = model.weight
    Capture(model)
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 5))
    assert model.weight is weight


def test_a_copy_of_a_captured_model_is_a_model():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    Capture(model)
    twin = copy.deepcopy(model).eval()
    inputs = torch.randn(3, 4)
    assert torch.equal(twin(inputs), model(inputs))


def test_layers_that_mix_records_are_refused():
    for layer in (
        nn.BatchNorm2d(3),
        nn.BatchNorm1d(3, affine=False),
        nn.InstanceNorm2d(3, track_running_stats=True),
    ):
        with pytest.raises(NotImplementedError, match=r"layer '1' \("):
            Capture(nn.Sequential(nn.Identity(), layer))
    frozen = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3).eval().requires_grad_(False))
    Capture(frozen)
    frozen(torch.randn(2, 3, 4, 4))
    frozen.train()
    with pytest.raises(NotImplementedError, match="normalises over the batch"):
        frozen(torch.randn(2, 3, 4, 4))


def test_inputs_without_a_batch_axis_are_refused():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x.mean(0, keepdim=True))

    model = Mixed()
    Capture(model)
    with pytest.raises(ValueError, match="batch as its first axis"):
        model(torch.randn(5, 4)).sum().backward()


def test_batch_second():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).to(D)
    inputs = x(6, 5, 4)  # [T, N, D]
    capture = Capture(model, batch_first=False)
    record_loss(model(inputs).transpose(0, 1)).sum().backward()
    params = dict(model.named_parameters())
    gradients = capture.take(list(params.values()))
    capture.remove()
    want = grads_one_by_one(model, inputs.transpose(0, 1))
    for name, gradient in zip(params, gradients, strict=True):
        assert gradient is not None
        torch.testing.assert_close(gradient.grad_sample(), want[name], rtol=1e-10, atol=1e-12)


def test_lower_precision_layers_give_float32_gradients():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    capture = Capture(model)
    inputs = torch.randn(5, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(inputs)
    record_loss(out.float()).sum().backward()
    gradients = capture.take(list(model.parameters()))
    capture.remove()
    want = grads_one_by_one(model, inputs)
    for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True):
        assert gradient is not None
        got = gradient.weighted_sum(torch.ones(5))
        assert got.dtype == torch.float32
        assert (got - want[name].sum(0)).norm() < 0.05 * want[name].sum(0).norm()  # bfloat16 forward: two digits
