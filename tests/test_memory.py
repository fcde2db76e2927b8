"""What a model remembers beside what the optimizer releases: no call in training mode may change it, nor anybody until
the step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import record_loss
from loops import privatize
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dp2vae_fast import PrivacyEngine
from dp2vae_fast.engine.capture.capture import Capture

Update = Callable[["Remembers", Tensor], None]


class Statistics(nn.Module):
    """A buffer that nobody's forward belongs to."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))


class Remembers(nn.Module):
    """A layer, things that last beyond a call, and what its forward does to them in training mode."""

    mean: Tensor

    def __init__(self, update: Update = lambda m, h: None) -> None:
        super().__init__()
        self.linear, self.child, self.update = nn.Linear(4, 4), Statistics(), update
        self.register_buffer("mean", torch.zeros(4))
        self.frozen = nn.Parameter(torch.zeros(4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.update(self, x.mean(0))
        return self.linear(x - self.mean)


def rebind(m: Remembers, h: Tensor) -> None:
    m.mean = 0.9 * m.mean + 0.1 * h


def point_elsewhere(m: Remembers, h: Tensor) -> None:
    m.mean.data = m.mean + h


UPDATES: dict[str, tuple[Update, str]] = {
    "in place": (lambda m, h: m.mean.lerp_(h, 0.1), "layer '0' (Remembers) updates its buffer 'mean'"),
    "another tensor": (rebind, "layer '0' (Remembers) updates its buffer 'mean'"),
    "in place, by way of data": (lambda m, h: m.mean.data.mul_(0.9).add_(h), "buffer 'mean'"),
    "other data": (point_elsewhere, "buffer 'mean'"),
    "a child's": (lambda m, h: m.child.mean.add_(h), "layer '0.child' (Statistics) updates its buffer 'mean'"),
    "a frozen parameter": (lambda m, h: m.frozen.add_(h), "layer '0' (Remembers) updates its parameter 'frozen'"),
    "a frozen parameter, by way of data": (lambda m, h: m.frozen.data.add_(h), "parameter 'frozen'"),
    "a trained parameter, by way of data": (lambda m, h: m.linear.bias.data.add_(h), "parameter 'bias'"),
    "a new buffer": (lambda m, h: m.register_buffer("seen", h), "buffer 'seen'"),
    "a new frozen parameter": (
        lambda m, h: m.register_parameter("seen", nn.Parameter(h, requires_grad=False)),
        "parameter 'seen'",
    ),
    "one taken away": (lambda m, h: m.child.register_buffer("mean", None), "buffer 'mean'"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", UPDATES)
def test_what_a_call_changes_is_refused(name: str):
    update, message = UPDATES[name]
    model = nn.Sequential(Remembers(update), nn.Tanh())
    capture = Capture(model, verify=False)
    model.eval()(torch.randn(3, 4))
    model.train()
    with pytest.raises(NotImplementedError) as refused:
        model(torch.randn(3, 4))
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert capture.records is None


@pytest.mark.parametrize("step", [0, 3])
def test_updates_that_begin_later_are_refused_while_the_check_waits_and_afterwards_by_version(step: int):
    def update(m: Remembers, h: Tensor) -> None:
        if begun:
            (m.mean if step else m.mean.data).add_(h)

    model = nn.Sequential(Remembers(update), nn.Tanh())
    model, optimizer = privatize(model, noise_multiplier=1.0, expected_batch_size=40)
    begun = False
    for _ in range(step):
        record_loss(model(torch.randn(40, 4))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    begun = True
    with pytest.raises(NotImplementedError, match="buffer 'mean'"):
        model(torch.randn(40, 4))


class Plain(nn.Module):
    """Two layers, a buffer that others write, and a hook on what is between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.later = nn.Linear(4, 4), nn.Linear(4, 2), None
        self.register_buffer("most", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.later is not None:
            h.register_hook(lambda gradient: self.later(x))
        return self.second(h)


def root_hook_before(m: Plain, write: Callable[[Tensor], None]) -> None:
    m.register_forward_pre_hook(lambda _, args: write(args[0]))


def root_hook_after(m: Plain, write: Callable[[Tensor], None]) -> None:
    m.register_forward_hook(lambda _, args, output: write(args[0]))


def in_the_backward_pass(m: Plain, write: Callable[[Tensor], None]) -> None:
    m.later = write


def full_backward_hook(m: Plain, write: Callable[[Tensor], None]) -> None:
    m.first.register_full_backward_hook(lambda _, before, after: write(after[0]))


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize(("by_data", "proved"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("place", [root_hook_before, root_hook_after, in_the_backward_pass, full_backward_hook])
def test_hooks_that_remember_records(place: Callable, by_data: bool, proved: bool):
    def write(x: Tensor) -> None:
        if begun:
            (model.most.data if by_data else model.most).copy_(x.detach().amax(0))

    model, begun = Plain(), not proved
    if place is root_hook_before:
        place(model, write)
    private, optimizer = privatize(model, noise_multiplier=1.0, expected_batch_size=40)
    if place is not root_hook_before:
        place(model, write)
    for _ in range(3 * proved):
        record_loss(private(torch.randn(40, 4))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    begun, before = True, model.first.weight.detach().clone()
    with pytest.raises(NotImplementedError, match=r"buffer 'most'.*without noise.* after step\(\)$"):
        record_loss(private(torch.randn(40, 4))).sum().backward()
        optimizer.step()
    assert torch.equal(before, model.first.weight) and not optimizer.capture.holds(optimizer.params)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_part_does_not_hide_what_the_backward_pass_changed_before(reentrant: bool):
    def write(x: Tensor) -> None:
        tail.most.copy_(x.detach().amax(0))

    body, tail = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), Plain()
    model = nn.ModuleDict({"body": body, "tail": tail})
    tail.later = write
    _, optimizer = privatize(model)
    h = checkpoint(body, torch.randn(8, 4).requires_grad_(), use_reentrant=reentrant)
    record_loss(tail(h)).sum().backward()
    with pytest.raises(NotImplementedError, match="buffer 'most'"):
        optimizer.step()


@pytest.mark.filterwarnings("error")
def test_several_optimizers_averages_and_buffers_that_change_after_a_step():
    model = nn.ModuleDict({"one": Plain(), "other": Plain(), "average": Plain().requires_grad_(False)})
    engine = PrivacyEngine()
    private, optimizers = model, []
    for part in ("one", "other"):
        optimizer = torch.optim.SGD(model[part].parameters(), lr=0.1)
        private, optimizer = privatize(private, optimizer, engine=engine, expected_batch_size=40)
        optimizers.append(optimizer)

    def after_a_step() -> None:
        for average, p in zip(model["average"].parameters(), model["one"].parameters(), strict=True):
            average.data.lerp_(p.data, 0.1)
            average.mul_(0.9)
        model["one"].most.add_(1.0)

    for _ in range(6):
        (
            record_loss(model["one"](torch.randn(40, 4))) + record_loss(model["other"](torch.randn(40, 4)))
        ).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            after_a_step()
        model["one"](torch.randn(40, 4)).sum().backward()
        for optimizer in optimizers:
            optimizer.zero_grad()  # and no step
        after_a_step()
    assert not optimizers[0].capture.first_batch.waiting


@pytest.mark.parametrize("part", ["bare", "linear"])
def test_parts_called_one_by_one(part: str):
    """The root is never called; a part that has buffers alone, and a mere layer."""

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            self.mean.data.add_(x.mean(0))
            return x

    class Layer(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            model["bare"].mean.data.add_(x.mean(0))
            return super().forward(x)

    model = nn.ModuleDict({"bare": Bare(), "linear": Layer(4, 4)})
    Capture(model)
    with pytest.raises(NotImplementedError, match=r"layer 'bare' \(Bare\) updates its buffer 'mean'"):
        model[part](torch.randn(3, 4))


def test_a_large_frozen_table_is_known_by_some_of_its_values():
    def update(m: Remembers, h: Tensor) -> None:
        m.table.data[5:9] += h

    body = Remembers(update)
    body.register_buffer("table", torch.zeros(200_000, 4))
    Capture(nn.Sequential(body))
    with pytest.raises(NotImplementedError, match="buffer 'table'"):
        body(torch.randn(3, 4))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("reentrant", [False, True])
def test_what_stays_is_not_refused(reentrant: bool):
    """Constants of all kinds, frozen statistics in eval mode, a recomputed part, and what changes between calls."""
    body = Remembers()
    body.register_buffer("none", None)
    body.register_buffer("empty", torch.zeros(0))
    body.register_buffer("nan", torch.tensor([torch.nan, torch.inf]))
    body.register_buffer("turned", torch.randn(3, 5).T)
    body.register_buffer("sparse", torch.eye(3).to_sparse())
    body.register_buffer("nowhere", torch.zeros(3, device="meta"))
    body.register_buffer("whether", torch.tensor(True))
    with torch.inference_mode():
        body.register_buffer("inferred", torch.zeros(3))
    norm = nn.BatchNorm1d(4).eval().requires_grad_(False)
    model = nn.ModuleDict({"norm": norm, "body": body, "head": nn.Linear(4, 2)})
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    _, optimizer = privatize(model, optimizer, noise_multiplier=1.0, expected_batch_size=40)
    for _ in range(4):
        h = checkpoint(body, norm(torch.randn(40, 4)).requires_grad_(), use_reentrant=reentrant)
        record_loss(model["head"](h)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        body.frozen.data.add_(1.0)


def test_an_interrupted_call_is_no_change():
    class Interrupted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if interrupt:
                raise KeyboardInterrupt
            return super().forward(x)

    interrupt = True
    model = nn.Sequential(Remembers(), Interrupted(4, 4))
    Capture(model)
    with pytest.raises(KeyboardInterrupt):
        model(torch.randn(3, 4))
    interrupt = False
    model(torch.randn(3, 4)).sum().backward()


def test_what_changes_between_two_calls_of_one_step_is_refused():
    """As an average of what the first one returned does, and is released."""
    model = Plain()
    private, optimizer = privatize(model, noise_multiplier=1.0, expected_batch_size=40)
    with torch.no_grad():
        private(torch.randn(40, 4))  # of which no gradient comes
    model.most.add_(1.0)
    output = private(torch.randn(40, 4))
    model.most[:2].copy_(output.detach().amax(0))
    (record_loss(output) + record_loss(private(torch.randn(40, 4)))).sum().backward()
    with pytest.raises(NotImplementedError, match=r"buffer 'most'.*without noise"):
        optimizer.step()
