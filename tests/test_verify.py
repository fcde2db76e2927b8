"""The first batch is checked against autograd: what hooks cannot see is refused, what is right goes through."""

from __future__ import annotations

import copy
import gc
import warnings

import pytest
import torch
from cases import record_loss
from loops import privatize
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dp2vae_fast import PrivacyEngine
from dp2vae_fast.engine.gradients.products import LinearProduct

D = torch.float64


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(D)


class Wrong(nn.Module):
    """Two layers with something between them that the hooks do not see."""

    def __init__(self, between) -> None:
        super().__init__()
        self.first, self.second, self.between = *(layers()[i] for i in (0, 2)), between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(torch.tanh(self.first(x))))


def batch(n: int, seed: int = 1) -> Tensor:
    return torch.randn(n, 4, dtype=D, generator=torch.Generator().manual_seed(seed))


BETWEEN = {
    "rows turned": lambda h: h.roll(1, 0),
    "two rows exchanged": lambda h: torch.cat([h[1:2], h[:1], h[2:]]),
    "centred over the batch": lambda h: h - h.mean(0),
    "attention over the batch": lambda h: (h @ h.T).softmax(1) @ h,
    "one row for all": lambda h: h[:1].expand_as(h),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_what_mixes_or_moves_records_is_refused_before_the_first_step(name: str):
    model = Wrong(BETWEEN[name])
    before = [p.detach().clone() for p in model.parameters()]
    private, optimizer = privatize(model)
    record_loss(private(batch(64))).sum().backward()
    with pytest.raises(NotImplementedError, match=r"'first\.weight' are not autograd's"):
        optimizer.step()
    optimizer.zero_grad()
    record_loss(private(batch(1))).sum().backward()  # on which nothing could be seen
    with pytest.raises(NotImplementedError, match="not autograd's"):  # nor can one go on
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_it_is_on_by_default_and_can_be_turned_off():
    for settings in ({}, {"verify_first_step": True}):
        private, optimizer = privatize(Wrong(BETWEEN["rows turned"]), **settings)
        record_loss(private(batch(64))).sum().backward()
        with pytest.raises(NotImplementedError, match="not autograd's"):
            optimizer.step()
    private, optimizer = privatize(Wrong(BETWEEN["rows turned"]), verify_first_step=False)
    for seed in range(3):
        before = private.first.weight.detach().clone()
        record_loss(private(batch(64, seed))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not torch.equal(private.first.weight, before)


def test_a_layer_on_something_as_long_as_the_batch():
    class Places(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places = nn.Embedding(5, 4, dtype=D)

        def forward(self, x: Tensor) -> Tensor:  # [N, T, 4], and T = N
            return x + self.places(torch.arange(x.shape[1]))

    private, optimizer = privatize(Places())
    record_loss(private(torch.randn(5, 5, 4, dtype=D))).sum().backward()
    with pytest.raises(NotImplementedError, match=r"places\.weight"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [D, torch.float32, torch.bfloat16], ids=str)
def test_dropout_and_every_precision_pass(dtype: torch.dtype):
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 32), nn.GroupNorm(4, 32), nn.Dropout(0.5), nn.Linear(32, 3))
    model = model.to(dtype if dtype == D else torch.float32)
    private, optimizer = privatize(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = private(batch(200).to(model[0].weight.dtype))
        record_loss(output.to(model[0].weight.dtype)).sum().backward()
        optimizer.step()
    assert optimizer.capture.first_batch.proved


def test_what_the_gradients_were_made_from_is_gone_when_the_model_runs_again():
    """The check takes an ordinary step's memory, and not that of the captured gradients with it."""
    model = layers()
    private, optimizer = privatize(model)
    alive = []

    def look(*_) -> None:
        alive.append(sum(type(x) is LinearProduct for x in gc.get_objects()))  # isinstance would ask dead proxies

    model[0].register_forward_hook(look)
    record_loss(private(batch(40))).sum().backward()
    look()
    optimizer.step()
    others = alive[0]
    assert alive == [others, others + 2, *[others] * 5] and optimizer.capture.first_batch.proved


def test_it_leaves_the_users_random_numbers_alone():
    drawn = []
    for verify in (True, False):
        torch.manual_seed(5)
        private, optimizer = privatize(nn.Sequential(nn.Linear(4, 3), nn.Dropout()).to(D), verify_first_step=verify)
        torch.manual_seed(6)
        record_loss(private(batch(9))).sum().backward()
        optimizer.step()
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


def test_a_batch_that_proves_nothing_is_left_to_the_next():
    private, optimizer = privatize(Wrong(BETWEEN["rows turned"]))
    for inputs in (batch(0), batch(8) * float("inf")):
        record_loss(private(inputs)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.capture.first_batch.waiting
    record_loss(private(batch(8))).sum().backward()
    with pytest.raises(NotImplementedError, match="not autograd's"):
        optimizer.step()


def test_random_numbers_of_the_models_own_are_no_reason_to_refuse():
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.generator = nn.Linear(4, 3, dtype=D), torch.Generator().manual_seed(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * torch.rand(3, generator=self.generator, dtype=D)

    private, optimizer = privatize(nn.Sequential(Noisy(), nn.Tanh()))
    record_loss(private(batch(8))).sum().backward()
    with pytest.warns(UserWarning, match="gives something else"):
        optimizer.step()


def test_a_model_that_runs_once_only_is_no_reason_to_refuse():
    class Once(nn.Sequential):
        runs = 0

        def forward(self, x: Tensor) -> Tensor:
            self.runs += 1
            if self.runs == 2:
                raise RuntimeError("once is enough")
            return super().forward(x)

    private, optimizer = privatize(Once(nn.Linear(4, 3), nn.Tanh()).to(D))
    record_loss(private(batch(8))).sum().backward()
    with pytest.warns(UserWarning, match="once is enough"):
        optimizer.step()


@pytest.mark.parametrize("reentrant", [False, True])
def test_parts_of_a_model_called_one_by_one(reentrant: bool):
    """Nobody calls the root: an encoder, then a bare layer, then a checkpointed decoder."""
    model = nn.ModuleDict({"encoder": layers(), "middle": nn.Linear(3, 4), "decoder": layers()}).to(D)
    _, optimizer = privatize(model)
    h = model["middle"](model["encoder"](batch(8)))
    record_loss(checkpoint(model["decoder"], h, use_reentrant=reentrant)).sum().backward()
    optimizer.step()
    assert optimizer.capture.first_batch.proved


def test_a_loss_inside_the_model_is_checked_as_a_total():
    class WithLoss(nn.Module):
        def __init__(self, between) -> None:
            super().__init__()
            self.body = Wrong(between)

        def forward(self, x: Tensor) -> Tensor:
            return record_loss(self.body(x)).sum()

    private, optimizer = privatize(WithLoss(lambda h: h))
    private(batch(8)).backward()
    optimizer.step()
    assert optimizer.capture.first_batch.proved


def test_two_losses_of_one_forward_and_a_frozen_parameter():
    model = layers()
    model[0].weight.requires_grad_(False)
    private, optimizer = privatize(model)
    output = private(batch(8))
    record_loss(output).sum().backward(retain_graph=True)
    output.square().sum().backward()
    optimizer.step()
    assert optimizer.capture.first_batch.proved


def test_gradients_that_one_optimizer_forgot_are_not_missed_by_the_other():
    model = layers()
    engine = PrivacyEngine()
    settings = dict(
        noise_multiplier=0.0, max_grad_norm=1.0, sample_rate=0.1, expected_batch_size=8, loss_reduction="sum"
    )
    private, first = engine.privatize(model, torch.optim.SGD(model[0].parameters(), lr=0.1), **settings)
    _, second = engine.privatize(private, torch.optim.SGD(model[2].parameters(), lr=0.1), **settings)
    record_loss(private(batch(8))).sum().backward()
    first.zero_grad()
    second.step()
    assert second.capture.first_batch.proved


def test_a_copy_of_the_model_is_not_checked():
    private, optimizer = privatize(layers())
    twin = copy.deepcopy(private)._module
    record_loss(twin[2](torch.tanh(twin[0](batch(8))))).sum().backward()
    record_loss(private(batch(8))).sum().backward()
    optimizer.step()
    assert optimizer.capture.first_batch.proved


def test_a_batch_of_one_record_proves_little():
    private, optimizer = privatize(Wrong(BETWEEN["rows turned"]))
    record_loss(private(batch(1))).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    record_loss(private(batch(8))).sum().backward()
    with pytest.raises(NotImplementedError, match="not autograd's"):
        optimizer.step()


@pytest.mark.parametrize("hidden", ["last layer zero", "frozen"])
def test_parameters_without_a_gradient_at_first_are_checked_when_they_have_one(hidden: str):
    model = Wrong(lambda h: h + (h - h.detach()).roll(1, 0))  # nothing of which is seen but by a gradient
    if hidden == "frozen":
        model.first.requires_grad_(False)
    else:
        nn.init.zeros_(model.second.weight)
        nn.init.zeros_(model.second.bias)
    private, optimizer = privatize(model)
    for step in range(3):
        if step == 1:
            model.first.requires_grad_(True)
        record_loss(private(batch(64, seed=step))).sum().backward()
        if step == 2 or (step == 1 and hidden == "last layer zero"):
            with pytest.raises(NotImplementedError, match=r"first\.weight"):
                optimizer.step()
            break
        optimizer.step()
        optimizer.zero_grad()
    else:
        raise AssertionError("never refused")


@pytest.mark.parametrize("seed", range(20))
def test_two_rows_that_change_places_are_always_noticed(seed: int):
    i, j = torch.randperm(64, generator=torch.Generator().manual_seed(seed))[:2].tolist()
    order = torch.arange(64)
    order[[i, j]] = order[[j, i]]
    private, optimizer = privatize(Wrong(lambda h: h[order]))
    record_loss(private(batch(64))).sum().backward()
    with pytest.raises(NotImplementedError, match="not autograd's"):
        optimizer.step()


def test_the_check_ends():
    """A bias before a normalisation never has a gradient: it is not waited for for ever."""
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 3)).to(D)
    nn.init.zeros_(model[2].weight)
    model[2].requires_grad_(False)
    private, optimizer = privatize(model)
    for _ in range(12):
        record_loss(private(batch(64))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not optimizer.capture.first_batch.waiting


def test_a_check_that_never_comes_about_says_so():
    private, optimizer = privatize(Wrong(BETWEEN["rows turned"]))
    with pytest.warns(UserWarning, match="not finite"):
        for seed in range(10):
            inputs = batch(8, seed)
            inputs[0] = float("nan")
            record_loss(private(inputs)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert not optimizer.capture.first_batch.waiting


def test_reentrant_checkpointing_hides_no_parameter_from_the_check():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = layers(), nn.Linear(3, 2, dtype=D)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(checkpoint(self.body, x, use_reentrant=True))

    model = Model()
    private, optimizer = privatize(model)
    record_loss(private(batch(64).requires_grad_())).sum().backward()
    optimizer.step()
    assert len(optimizer.capture.first_batch.proved) == 6
    assert all(p.grad is None for p in model.parameters())


class Prompted(nn.Module):
    """Images, whose features are frozen, against what is trained on the names of classes."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Linear(4, 3, dtype=D)

    def forward(self, images: Tensor, names: Tensor) -> Tensor:
        return images @ self.text(names).T


def test_rows_of_something_else_than_records_are_refused():
    private, optimizer = privatize(Prompted())
    record_loss(private(batch(8)[:, :3], batch(5))).sum().backward()
    with pytest.raises(NotImplementedError, match=r"of shape \(8, 5\), while its layers saw 5 records") as refused:
        optimizer.step()
    assert "\n" not in str(refused.value)
    optimizer.zero_grad()
    record_loss(private(batch(5)[:, :3], batch(5))).sum().backward()
    with pytest.raises(NotImplementedError, match="saw 5 records"):  # nor can one go on
        optimizer.step()


def test_prompts_that_divide_the_batch_are_refused_too():
    private, optimizer = privatize(Prompted())
    record_loss(private(batch(10)[:, :3], batch(5))).sum().backward()
    with pytest.raises(NotImplementedError, match="not autograd's"):
        optimizer.step()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("turned", [False, True])
def test_positions_of_all_records_on_one_axis(turned: bool):
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3, dtype=D)

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x)
            return (h.transpose(0, 1) if turned else h).reshape(-1, 3)

    private, optimizer = privatize(Flat())
    private(batch(40).reshape(8, 5, 4)).square().sum().backward()
    if turned:
        with pytest.raises(NotImplementedError, match="not autograd's"):
            optimizer.step()
    else:
        optimizer.step()
        assert optimizer.capture.first_batch.proved


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("between", ["nothing", "rows turned"])
def test_one_output_for_the_rows_of_a_record(between: str):
    class Best(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Wrong(BETWEEN.get(between, lambda h: h))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x).reshape(-1, 2, 3).logsumexp(1)

    private, optimizer = privatize(Best(), rows_per_record=2)
    record_loss(private(batch(16))).sum().backward()
    if between == "nothing":
        optimizer.step()
        assert optimizer.capture.first_batch.proved
    else:
        with pytest.raises(NotImplementedError, match="not autograd's"):
            optimizer.step()


@pytest.mark.parametrize("between", ["rows turned", "centred over the batch"])
def test_a_loss_that_the_model_keeps_to_itself_is_refused(between: str):
    class Keeps(Wrong):
        def forward(self, x: Tensor) -> float:
            self.loss = record_loss(super().forward(x)).sum()
            return self.loss.item()

    model = Keeps(BETWEEN[between])
    private, optimizer = privatize(model)
    private(batch(64))
    model.loss.backward()
    with pytest.raises(NotImplementedError, match="nothing that the model returned"):
        optimizer.step()


def test_what_is_unfrozen_when_the_attempts_are_used_up_is_checked_too():
    """By a part that is never used, which nothing can prove."""

    class Turned(Wrong):
        def __init__(self) -> None:
            super().__init__(lambda h: h.flip(0))
            self.unused = nn.Linear(1, 1, dtype=D)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flip(0))

    model = Turned()
    model.first.requires_grad_(False)
    private, optimizer = privatize(model)
    for step in range(14):
        if step == 12:
            assert not optimizer.capture.first_batch.waiting
            model.first.requires_grad_(True)
        record_loss(private(batch(64, step))).sum().backward()
        if step < 13:
            optimizer.step()
            optimizer.zero_grad()
    with pytest.raises(NotImplementedError, match=r"'first\.weight' are not autograd's"):
        optimizer.step()
