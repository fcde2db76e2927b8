"""Records that are mixed where no gradient passes: seen by what two of them get without the others."""

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
        "a table as long as the batch": lambda: step(_how(among), x[:7], torch.randn(4), [torch.randn(7, 3)]),
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
