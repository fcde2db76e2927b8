"""How models use their layers: reuse, tying, freezing, keyword calls, checkpointing, in-place neighbours; and what
must be refused."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from cases import grads_one_by_one, record_loss
from opacus.layers import DPLSTM
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dp2vae_fast.engine.capture.capture import Capture
from dp2vae_fast.engine.gradients.plan import Plan

D = torch.float64


def check(model: nn.Module, inputs: Tensor, run=None, plan: Plan | None = None) -> None:
    """Captured gradients of every trainable parameter against one ordinary backward a record."""
    model = model.to(D)
    want = grads_one_by_one(model, inputs)
    capture = Capture(model, plan=plan)
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
        exact = want[name].reshape(len(inputs), -1).square().sum(1)
        torch.testing.assert_close(norm_sq, exact, rtol=1e-10, atol=1e-14)
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


def test_a_backward_pass_in_eval_mode_is_told_to_train():
    model = nn.Linear(3, 2)
    Capture(model)
    with pytest.raises(NotImplementedError, match=r"Call the layer itself, after model\.train\(\), "):
        model.eval()(torch.randn(4, 3)).sum().backward()


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


def test_a_refused_module_can_be_put_right():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(NotImplementedError, match="normalises over the batch"):
        Capture(model)
    model[1] = nn.LayerNorm(4)
    check(model, torch.randn(5, 4, dtype=D))


def test_inputs_without_a_batch_axis_are_refused():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x.mean(0, keepdim=True))

    model = Mixed()
    Capture(model)
    with pytest.raises(
        ValueError, match=r"^layer 'b' returns \(1, 4\): expected 5 rows along the first axis, one per re"
    ):
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


def test_positions_or_copies_folded_into_the_batch_are_not_records():
    """A record would have as many clipped gradients as it has rows."""

    class Folded(nn.Module):
        def __init__(self, fold) -> None:
            super().__init__()
            self.layer, self.fold = nn.Linear(4, 3), fold

        def forward(self, x: Tensor, step: int = 0) -> Tensor:
            return self.layer(self.fold(x))

    for fold in (lambda x: x.flatten(0, 1), lambda x: torch.cat([x, x + 1]), lambda x: x[:1]):
        model = nn.Sequential(Folded(fold))
        Capture(model)
        with pytest.raises(ValueError, match=r"expected 5 rows along the first axis, one per record$"):
            model(torch.randn(5, 6, 4))
    # Rows of one record side by side are what rows_per_record says, whoever repeats them.
    for inputs in (torch.randn(5, 4), torch.randn(10, 4)):
        model = Folded(lambda x: x.repeat_interleave(10 // len(x), 0))
        capture = Capture(model, rows_per_record=2)
        model(inputs, step=3).sum().backward()
        assert capture.records == 5


class Positions(nn.Module):
    """Tokens and their positions, looked up once for all records."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(9, 4), nn.Embedding(9, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))


def test_what_to_do_about_a_wrong_number_of_rows_is_said():
    cases = [
        (
            Positions(),
            torch.randint(9, (5, 6)),
            {},
            r"one per record. There is one per position: .*arange\(T\).expand\(N, T\)",
        ),
        (Turned(), torch.randn(5, 6, 4), {}, "one per record. The second axis has them: see to batch_first"),
        (Turned(), torch.randn(6, 5, 4), dict(batch_first=False), "second axis, one per record. The first axis has"),
        (Turned(), torch.randn(7, 6, 4), dict(rows_per_record=2), "expected 7 or 14 rows .*, with rows_per_record = 2"),
    ]
    for model, inputs, settings, message in cases:
        Capture(model, **settings)
        with pytest.raises(ValueError, match=message) as refused:
            model(inputs)
        assert "\n" not in str(refused.value)


class Turned(nn.Module):
    """Calls its layer with the batch as second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(0, 1))


def test_a_bare_parameter_beside_layers_is_said_to_be_slow():
    class ViT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pos, self.layer = nn.Parameter(torch.zeros(4)), nn.Linear(4, 3)

    message = "parameter 'pos' belongs to ViT itself, .*: move it into a small module of its own to be fast"
    with pytest.warns(UserWarning, match=message) as said:
        Capture(nn.Sequential(ViT(), nn.Linear(3, 2)))
    assert len(said) == 1
    model = ViT()
    model.pos.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Capture(model)
        Capture(nn.Sequential(nn.PReLU(), nn.Bilinear(2, 2, 2)))  # small, whatever rules there are


def test_a_layer_that_adds_up_the_batch_is_refused():
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.scale).square().mean()

    model = Loss()
    Capture(model)
    with pytest.raises(ValueError, match=r"expected 5 rows along the first axis, one per record$"):
        model(torch.randn(5, 4))


def test_what_a_layer_keeps_to_itself_is_refused():
    """A penalty on a bare parameter, left in an attribute for the loss: its gradient would be lost."""

    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            self.penalty = (x * self.scale).square().sum()
            return x * self.scale

    for with_output in (1.0, 0.0):
        model = Keeping()
        Capture(model)
        with pytest.raises(NotImplementedError, match="not in the tensors that it returns"):
            (with_output * model(torch.randn(5, 4)).sum() + model.penalty).backward()


def test_a_constant_as_long_as_the_batch_is_no_batch():
    """In any batch, not only the first."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return (mask @ x) * self.scale

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.masked = Masked()

        def forward(self, x: Tensor) -> Tensor:
            return self.masked(x, torch.ones(6, 6, dtype=x.dtype).tril())

    check(Model(), x(5, 6, 4))
    model = Model().to(D)
    capture = Capture(model)
    model(x(5, 6, 4)).sum().backward()
    capture.clear()
    with pytest.raises(NotImplementedError, match="independently"):
        model(x(6, 6, 4)).square().sum().backward()


def test_a_gradient_of_nothing_but_rounding_is_no_reason_to_refuse():
    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.randn(4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.shift

    model = nn.Sequential(Shift(), nn.InstanceNorm2d(4), nn.Conv2d(4, 2, 3))  # takes the shift away again
    capture = Capture(model)
    record_loss(model(3 + torch.randn(50, 4, 9, 9))).sum().backward()
    capture.take(list(model.parameters()))
    capture.check_first_batch()
    assert capture.first_batch.proved == set(model[2].parameters())


def test_layers_inside_a_layer_that_names_their_parameters():
    """DPLSTM lists its cells' weights as its own, as nn.LSTM has them."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = DPLSTM(4, 3, num_layers=2, batch_first=True), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x)[0])

    check(Recurrent(), x(5, 6, 4))


def test_outputs_that_are_not_differentiable():
    class Quantize(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.codes = nn.Parameter(torch.randn(7, 4))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            nearest = torch.cdist(x, self.codes).argmin(1)
            return x + self.codes[nearest], nearest

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.quantize = nn.Linear(4, 4), Quantize()

        def forward(self, x: Tensor) -> Tensor:
            return self.quantize(self.linear(x))[0]

    check(Model(), x(5, 4))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_two_batched_inputs_of_a_layer_without_a_rule():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.product = nn.Linear(4, 3), nn.Bilinear(3, 4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.product(self.linear(x), input2=x.cos())

    check(Model(), x(5, 4))


def test_an_input_overwritten_before_the_step_raises_instead_of_lying():
    model = nn.Linear(4, 3, bias=False)
    capture = Capture(model)
    buffer = torch.randn(5, 4)
    model(buffer).sum().backward()
    buffer.copy_(torch.randn(5, 4))
    with pytest.raises(RuntimeError, match="between the backward pass and the step"):
        capture.take([model.weight])
    model(buffer).sum().backward()
    buffer.copy_(torch.randn(5, 4))
    capture.drop([model.weight])  # as zero_grad() does: no gradient is wanted
    model(buffer).sum().backward()
    assert capture.take([model.weight]) != [None]


def test_an_interrupted_forward_leaves_no_stand_in_behind():
    class Interrupted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.interrupt = nn.Parameter(torch.ones(4)), True

        def forward(self, x: Tensor) -> Tensor:
            if self.interrupt:
                raise KeyboardInterrupt
            return x * self.scale

    model = nn.Sequential(Interrupted())
    layer, scale = model[0], model[0].scale
    capture = Capture(model)

    def interrupt() -> None:
        layer.interrupt = True
        with pytest.raises(KeyboardInterrupt):
            model.train()(torch.randn(3, 4))
        layer.interrupt = False
        assert layer.scale is not scale

    interrupt()
    model(torch.randn(5, 4)).sum().backward()
    assert layer.scale is scale and capture.take([scale])[0] is not None
    interrupt()
    model.eval()(torch.randn(5, 4))
    assert layer.scale is scale
    interrupt()
    capture.remove()
    assert layer.scale is scale


def test_parameters_unfrozen_later_are_watched_from_the_next_step_on():
    model = nn.Linear(3, 2)
    model.weight.requires_grad_(False)
    capture = Capture(model)
    model.weight.requires_grad_(True)
    capture.take([model.weight])  # as step() and zero_grad() do
    with pytest.raises(NotImplementedError, match=r"weight.*outside its own layer"):
        (model(torch.randn(4, 3)).sum() + model.weight.square().sum()).backward()


def test_a_layer_without_a_rule_under_autocast():
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight)

    model = nn.Sequential(nn.Linear(4, 4), Product())
    capture = Capture(model)
    inputs = torch.randn(50, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(inputs)
    record_loss(out.float()).sum().backward()
    (gradient,) = capture.take([model[1].weight])
    capture.remove()
    assert gradient is not None
    want = grads_one_by_one(model, inputs)["1.weight"]
    assert gradient.grad_sample().dtype == torch.float32
    assert (gradient.grad_sample() - want).norm() < 0.05 * want.norm()


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


def test_hooks_of_the_user_come_after_the_tap():
    """A forward hook that changes the output, an input hook, and a forward replaced on the object itself."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3))
    model[0].register_forward_hook(lambda layer, args, output: 2 * output)
    model[2].register_forward_pre_hook(lambda layer, args: (3 * args[0],))
    last = model[3]
    last.forward = lambda x: 0.5 * F.linear(x, last.weight, last.bias)  # type: ignore[method-assign]
    check(model, x(5, 4))


def test_in_place_activations_around_every_kind_of_layer():
    check(
        nn.Sequential(
            nn.Conv2d(2, 4, 3),
            nn.SiLU(inplace=True),
            nn.GroupNorm(2, 4),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(4, 2, 3, stride=2, output_padding=1, groups=2),
            nn.LeakyReLU(inplace=True),
            nn.PReLU(),
            nn.ELU(inplace=True),
        ),
        x(4, 2, 6, 6),
    )


def test_outputs_in_a_tuple_may_be_changed_in_place():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * self.scale, x + self.scale

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = Pair()

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.pair(x)
            return a.relu_() + F.silu(b, inplace=True)

    check(Model(), x(5, 4))


@pytest.mark.parametrize("method", ["gram", "kept"])
def test_output_size_overrides_output_padding(method):
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.ConvTranspose2d(3, 2, 3, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x, output_size=[2 * x.shape[2] + 2] * 2)

    check(Sized(), x(4, 3, 5, 5), plan=Plan(forced={"conv.weight": method}))


def test_a_gradient_of_the_input_enters_no_book():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))

    def run(inputs: Tensor) -> Tensor:
        inputs = inputs.clone().requires_grad_()
        output = model(inputs)
        torch.autograd.grad(output.sum(), inputs, retain_graph=True)
        return output

    check(model, x(5, 4), run)


def test_second_derivatives_are_refused():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    Capture(model)
    inputs = torch.randn(5, 4, requires_grad=True)
    with pytest.raises(NotImplementedError, match="create_graph"):
        torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)


class WithBare(nn.Module):
    """A linear layer and a bare parameter; ``wrap`` makes the output."""

    def __init__(self, wrap) -> None:
        super().__init__()
        self.linear, self.log_scale, self.wrap = nn.Linear(4, 3), nn.Parameter(torch.zeros(3)), wrap

    def forward(self, x: Tensor):
        return self.wrap(self.linear(x), self.log_scale.exp())


def test_outputs_that_cannot_be_watched_are_refused():
    def normal(mean: Tensor, scale: Tensor):
        return torch.distributions.Normal(mean, scale, validate_args=False)

    for wrap in (normal, lambda a, b: (a * b, normal(a, b)), torch.complex):
        model = WithBare(wrap)
        Capture(model)
        with pytest.raises(NotImplementedError, match=r"layer '' .*returns a"):
            model(torch.randn(3, 4))
    frozen = WithBare(normal)
    frozen.log_scale.requires_grad_(False)  # the linear layer has a tap of its own
    capture = Capture(frozen)
    frozen(torch.randn(5, 4)).log_prob(torch.zeros(3)).sum().backward()
    assert capture.records == 5


def test_reparametrized_weights_are_refused():
    with pytest.warns(FutureWarning):
        old = nn.utils.weight_norm(nn.Linear(4, 3))
    for layer, reason in ((nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), "without a tensor"), (old, "rule")):
        model = nn.Sequential(layer)
        Capture(model)
        with pytest.raises(NotImplementedError, match=reason):
            model(torch.randn(5, 4)).sum().backward()


def test_a_copy_of_a_captured_model_trains_apart():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    capture = Capture(model)
    twin = copy.deepcopy(model)
    twin(torch.randn(3, 4)).sum().backward()
    assert all(isinstance(p, nn.Parameter) and p.grad is not None for p in twin.parameters())
    assert capture.records is None
    Capture(twin)


def test_a_module_is_captured_once():
    model = nn.Sequential(nn.Linear(4, 3))
    capture = Capture(model)
    for part in (nn.Sequential(model), model[0]):
        with pytest.raises(ValueError, match="private already"):
            Capture(part)
    capture.remove()
    Capture(model)


def test_a_convolution_of_no_batch_is_refused():
    model = nn.Conv2d(3, 3, 3, padding=1)
    Capture(model)
    with pytest.raises(ValueError, match="pass it a batch"):
        model(torch.randn(3, 3, 3)).sum().backward()


def test_a_layer_that_calls_itself_is_refused():
    class Recursive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor, depth: int = 2) -> Tensor:
            x = torch.tanh(x * self.scale)
            return self(x, depth - 1) if depth else x

    model = Recursive()
    Capture(model)
    with pytest.raises(NotImplementedError, match="'scale'"):
        model(torch.randn(5, 4)).sum().backward()


def test_a_bare_scalar_on_the_top_module():
    class Tempered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.temperature = nn.Linear(4, 4), nn.Parameter(torch.tensor(1.3))

        def forward(self, x: Tensor) -> Tensor:
            return F.relu_(self.linear(x)) * self.temperature

    check(Tempered(), x(5, 4))


def test_rows_are_counted_against_what_a_batch_of_a_class_of_ones_own_holds():
    @dataclass
    class Batch:
        x: Tensor

    class Folds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, batch: Batch) -> Tensor:
            return self.layer(batch.x.flatten(0, 1))

    model = Folds()
    Capture(model)
    with pytest.raises(ValueError, match="expected 5 rows along the first axis"):
        model(Batch(torch.randn(5, 6, 4)))
