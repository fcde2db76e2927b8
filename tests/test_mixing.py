"""Records that are mixed where no gradient passes: seen by what they get when the others are changed, or gone."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import record_loss
from loops import privatize
from torch import Tensor, nn

from dp2vae_fast.engine.capture.capture import Capture

D = torch.float64
Change = Callable[[Tensor], Tensor]


class Between(nn.Module):
    """Two layers, and what is done before and between them."""

    def __init__(self, first: Change = lambda x: x, between: Change = lambda h: h, width: int = 6) -> None:
        super().__init__()
        self.linear, self.head, self.first, self.between = nn.Linear(4, width), nn.Linear(width, 3), first, between

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(torch.tanh(self.linear(self.first(x)))))


def step(model: nn.Module, *inputs: Tensor, autocast: bool = False, **kwargs) -> Capture:
    private, optimizer = privatize(model, noise_multiplier=1.0, **kwargs)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = private(*inputs)
    outputs = output if isinstance(output, tuple) else (output,)
    sum(record_loss(x.float() if autocast else x).sum() for x in outputs).backward()
    optimizer.step()
    return optimizer.capture


FIRST: dict[str, Change] = {
    "normalised over the batch": lambda x: (x - x.mean(0)) / x.std(0),
    "batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
    "scaled by the largest": lambda x: x / x.abs().max(),
    "centred": lambda x: x - x.mean(0),
    "turned": lambda x: x + x.roll(1, 0),
}
BETWEEN: dict[str, Change] = {
    "scaled to a length": lambda h: h / h.detach().norm(),
    "centred": lambda h: h - h.detach().mean(0),
    "next to another": lambda h: h + h.detach().flip(0),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(4)


@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("records", [9, 40])
@pytest.mark.parametrize("where", [*(("first", n) for n in FIRST), *(("between", n) for n in BETWEEN)], ids=" ".join)
def test_what_mixes_records_without_a_gradient_is_refused(where: tuple[str, str], records: int, precision: str):
    part, name = where
    model = Between(FIRST[name]) if part == "first" else Between(between=BETWEEN[name])
    dtype = D if precision == "float64" else torch.float32
    before = [p.detach().clone() for p in model.to(dtype).parameters()]
    with pytest.raises(NotImplementedError, match=r"^the model mixes records: Between returns.*$") as refused:
        step(model, torch.randn(records, 4, dtype=dtype), autocast=precision == "bfloat16")
    assert "\n" not in str(refused.value)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


class Quantised(nn.Module):
    """Per-tensor dynamic quantisation, straight through."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.levels = 2 ** (bits - 1) - 1

    def forward(self, x: Tensor) -> Tensor:
        scale = x.detach().abs().max() / self.levels
        return x + (torch.round(x / scale) * scale - x).detach()


@pytest.mark.parametrize("records", [2, 3, 40])
@pytest.mark.parametrize("bits", [9, 12, 17])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_scale_of_the_batch_that_moves_outputs_by_little(bits: int, dropout: float, records: int):
    quantised = nn.Sequential(
        nn.Linear(4, 32), nn.Dropout(dropout), nn.ReLU(), Quantised(bits), nn.Linear(32, 3), nn.Dropout(dropout)
    )
    with pytest.raises(NotImplementedError, match="the same record when others in the batch are changed"):
        step(quantised, torch.randn(records, 4))


@pytest.mark.parametrize("bits", [9, 12])
def test_inputs_that_must_stay_in_their_range(bits: int):
    """Probabilities that are drawn from, times that become indices, whole numbers that are categories."""

    class Ranges(nn.Module):
        def __init__(self, change: nn.Module) -> None:
            super().__init__()
            self.table, self.linear, self.change = nn.Embedding(10, 4), nn.Linear(5, 3), change
            self.head = nn.Linear(3, 2)

        def forward(self, images: Tensor, times: Tensor, columns: Tensor) -> Tensor:
            drawn = torch.bernoulli(images) * torch.arange(10.0)[(10 * times).long()][:, None]
            taken.append(columns[:, 0])
            h = self.linear(torch.cat([columns[:, 1:], drawn + self.table(columns[:, 0].long())], 1))
            return self.head(self.change(h))

    taken: list[Tensor] = []
    inputs = torch.rand(40, 4), torch.rand(40), torch.cat([torch.arange(40.0)[:, None] % 10, torch.randn(40, 1)], 1)
    step(Ranges(nn.Identity()), *inputs)
    assert all(set(x.tolist()) <= set(range(10)) for x in taken) and len(taken) == 4
    with pytest.raises(NotImplementedError, match="mixes records"):
        step(Ranges(Quantised(bits)), *inputs)


def test_a_model_that_refuses_what_is_far_off_is_shown_other_records():
    def only_small(h: Tensor) -> Tensor:
        if h.abs().max() > 100:
            raise ValueError("too large")
        return h

    step(Between(only_small), torch.randn(40, 4))
    with pytest.raises(NotImplementedError, match="mixes records"):
        step(Between(lambda x: FIRST["scaled by the largest"](only_small(x))), torch.randn(40, 4))


@pytest.mark.parametrize("seed", range(5))
def test_random_numbers_of_which_a_record_draws_as_many_as_its_values_ask_for(seed: int):
    torch.manual_seed(seed)
    gamma = Between(between=lambda h: h * torch.distributions.Gamma(h.exp(), 1.0, validate_args=False).sample())
    step(gamma, torch.randn(40, 4))


def test_a_division_by_the_size_of_the_batch():
    with pytest.raises(NotImplementedError, match="for two records alone"):
        step(Between(lambda x: x / len(x)), torch.randn(40, 4))


def test_an_input_as_long_as_the_batch_is_taken_for_records():
    with pytest.raises(NotImplementedError, match="a mask of positions, looks the same: make it a buffer"):
        step(_how(Among()), torch.randn(7, 4), torch.randn(4), [torch.randn(7, 3)])


@pytest.mark.parametrize("rows", [2, 20])
def test_records_of_several_rows(rows: int):
    inputs = torch.randn(6 * rows, 4)
    step(Between(), inputs, rows_per_record=rows)
    within = Between(lambda x: (x.reshape(-1, rows, 4) - x.reshape(-1, rows, 4).mean(1, True)).reshape(-1, 4))
    step(within, inputs, rows_per_record=rows)
    with pytest.raises(NotImplementedError, match="mixes records"):
        step(Between(FIRST["centred"]), inputs, rows_per_record=rows)


def test_the_batch_as_second_axis():
    for first in (lambda x: x, lambda x: x - x.mean(0)):
        step_second(first)
    with pytest.raises(NotImplementedError, match="mixes records"):
        step_second(lambda x: x - x.mean(1, keepdim=True))


def step_second(first: Change) -> None:
    model = Between(first)
    capture = Capture(model, batch_first=False)
    record_loss(model(torch.randn(5, 8, 4))).sum().backward()
    capture.take(list(model.parameters()))
    capture.check_first_batch()
    assert capture.first_batch.proved


class Among(nn.Module):
    """A call with things that are no records: a constant, a table and a word."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor, shift: Tensor, tables: list[Tensor], *, how: str) -> tuple[Tensor, Tensor]:
        h = self.linear(x + shift)
        return h, (h @ tables[0].T).softmax(1)


class Padded(nn.Module):
    """Sequences, as long as the longest of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        longest = int(lengths.max())
        return self.linear(x[:, :longest]) * (torch.arange(longest) < lengths[:, None])[..., None]


def no_reason() -> dict[str, Callable[[], Capture]]:
    x = torch.randn(40, 4)
    among = Among()
    return {
        "plain": lambda: step(Between(), x),
        "bfloat16": lambda: step(Between(width=500), x, autocast=True),
        "half the batch is padding": lambda: step(Between(), torch.cat([x, torch.zeros(40, 4)])),
        "minus infinity": lambda: step(Between(between=lambda h: h.masked_fill(h == h.amax(1, True), -1e30).relu()), x),
        "dropout": lambda: step(nn.Sequential(nn.Linear(4, 6), nn.Dropout(), nn.Linear(6, 3)), x),
        "three records": lambda: step(Between(), x[:3]),
        "one output for all": lambda: step(Between(between=lambda h: 0 * h), x),
        "padded to the longest": lambda: step(Padded(), torch.randn(8, 9, 4), torch.arange(1, 9)),
        "a constant among the inputs": lambda: step(_how(among), x, torch.randn(4), [torch.randn(7, 3)]),
    }


def _how(among: Among) -> nn.Module:
    forward = among.forward
    among.forward = lambda *args: forward(*args, how="so")  # type: ignore[method-assign]
    return among


@pytest.mark.parametrize("name", no_reason())
def test_what_is_no_reason_to_refuse(name: str):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert no_reason()[name]().first_batch.proved  # it was looked at
