"""Scenarios: parameters that are shared, frozen or unused, and low precision."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from fault_harness import Outcome, Run, Scenario, judged, one_step, randn
from torch import Tensor, nn

RECORDS = 5


class Model(nn.Module):
    """Layers by name, and what is done with them: ``forward(layers, input)``."""

    def __init__(self, forward: Callable[[nn.ModuleDict, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.run = nn.ModuleDict(layers), forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.layers, x)


def vectors(size: int = 4) -> Tensor:
    return randn(RECORDS, size)


def words(length: int = 4) -> Tensor:
    return torch.randint(6, (RECORDS, length), generator=torch.Generator().manual_seed(0))


# Shared parameters ---------------------------------------------------------------------------------------------------


def tied_by_function() -> nn.Module:
    return Model(lambda m, x: F.linear(m["embedding"](x), m["embedding"].weight), embedding=nn.Embedding(6, 3))


def used_by_function() -> nn.Module:
    return Model(lambda m, x: F.linear(m["first"](x), m["first"].weight), first=nn.Linear(4, 4))


def tied_modules() -> nn.Module:
    embedding, head = nn.Embedding(6, 3), nn.Linear(3, 6, bias=False)
    head.weight = embedding.weight
    return nn.Sequential(embedding, nn.Tanh(), head)


def two_of_a_kind() -> nn.Module:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second)


def standardised() -> nn.Module:
    def forward(m: nn.ModuleDict, x: Tensor) -> Tensor:
        weight = m["conv"].weight
        return F.conv1d(x, weight - weight.mean((1, 2), keepdim=True), m["conv"].bias)

    return Model(forward, conv=nn.Conv1d(2, 3, 3))


def used_twice(layer: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Model(lambda m, x: m["layer"](m["layer"](x).tanh()), layer=layer())


SHARED = [
    Scenario(
        "weight tying by F.linear(x, embedding.weight)",
        "The second use of the weight passes no hook; its gradient would be neither clipped nor noised.",
        judged(tied_by_function, words(), tightness=0.3),
        ours="refused",
    ),
    Scenario(
        "a Linear's weight used again by F.linear",
        "Within one model or between two layers.",
        judged(used_by_function, vectors(), tightness=0.3),
        ours="refused",
    ),
    Scenario(
        "weight standardisation by F.conv1d",
        "The layer itself is never called.",
        judged(standardised, randn(RECORDS, 2, 6)),
        ours="refused",
    ),
    Scenario("Embedding and Linear share a weight", "Tied language models.", judged(tied_modules, words())),
    Scenario(
        "two Linear layers share a weight",
        "The two gradients add up before the norm.",
        judged(two_of_a_kind, vectors()),
    ),
    Scenario(
        "one Linear used twice", "Recurrence, siamese branches.", judged(used_twice(lambda: nn.Linear(4, 4)), vectors())
    ),
    Scenario(
        "one Conv1d used twice",
        "The gradients of both uses add up before the norm.",
        judged(used_twice(lambda: nn.Conv1d(2, 2, 3, padding=1)), randn(RECORDS, 2, 6)),
    ),
]

# Which parameters are trained ----------------------------------------------------------------------------------------


def unused() -> nn.Module:
    return Model(lambda m, x: m["used"](x), used=nn.Linear(4, 3), unused=nn.Linear(4, 3))


def frozen(*names: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = nn.Sequential(
            nn.Linear(4, 6), nn.Tanh(), nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 3, 2), nn.Flatten(), nn.Linear(6, 3)
        )
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.endswith(names))
        return model

    return make


def adapted() -> nn.Module:
    """LoRA: a frozen base and a trainable product of two thin layers beside it."""

    def forward(m: nn.ModuleDict, x: Tensor) -> Tensor:
        h = (m["base"](x) + m["up"](m["down"](x))).tanh()
        return m["head"](h) + m["head_up"](m["head_down"](h))

    bases = dict(base=nn.Linear(4, 6).requires_grad_(False), head=nn.Linear(6, 3).requires_grad_(False))
    thin = dict(down=(4, 2), up=(2, 6), head_down=(6, 2), head_up=(2, 3))
    return Model(forward, **bases, **{name: nn.Linear(*shape, bias=False) for name, shape in thin.items()})


def unfrozen_later(run: Run, batch: Tensor) -> None:
    run.module.requires_grad_(True)
    one_step(run, batch)


TRAINED = [
    Scenario(
        "parameters that the loss does not use", "A branch not taken: its gradient is zero.", judged(unused, vectors())
    ),
    Scenario("first layer frozen", "Fine-tuning.", judged(frozen("0.weight", "0.bias"), vectors())),
    Scenario("middle layer frozen", "Fine-tuning.", judged(frozen("3.weight", "3.bias"), vectors())),
    Scenario(
        "layer unfrozen after make_private",
        "Gradual unfreezing.",
        judged(frozen("3.weight", "3.bias"), vectors(), loop=unfrozen_later, reference=frozen("none")),
    ),
    Scenario("only biases trained", "BitFit.", judged(frozen("weight"), vectors())),
    Scenario("low-rank adapters beside a frozen base", "LoRA.", judged(adapted, vectors())),
]

# Low precision -------------------------------------------------------------------------------------------------------


def autocast(run: Run, batch: Tensor) -> None:
    run.optimizer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = run.module(batch)
    run.criterion(output.float()).backward()
    run.optimizer.step()


def in_bfloat16(make: Callable[[], nn.Module], *shape: int) -> Callable[[str], Outcome]:
    return judged(make, randn(24, *shape), loop=autocast, dtype=torch.float32, tolerance=0.05, contributions="alone")


def low_precision() -> list[Scenario]:
    why = "Norms computed in bfloat16 are off by 0.4 %: what is scaled to C comes out above it."

    def mlp() -> nn.Module:
        return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8))

    def conv() -> nn.Module:
        return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 3))

    return [
        Scenario("bfloat16 autocast, Linear", why, in_bfloat16(mlp, 16)),
        Scenario("bfloat16 autocast, Conv2d", why, in_bfloat16(conv, 2, 6, 6)),
    ]


SCENARIOS = [*SHARED, *TRAINED, *low_precision()]
