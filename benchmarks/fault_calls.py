"""Scenarios: how a model calls its layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from fault_harness import Run, Scenario, judged, one_step, randn
from fault_models import RECORDS, Model, frozen, vectors, words
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def by_keyword() -> nn.Module:
    return Model(
        lambda m, x: m["second"](input=m["first"](input=x).tanh()), first=nn.Linear(4, 5), second=nn.Linear(5, 3)
    )


def checkpointed(reentrant: bool) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
        return Model(
            lambda m, x: checkpoint(m["body"], m["first"](x).tanh(), use_reentrant=reentrant),
            first=nn.Linear(4, 4),
            body=body,
        )

    return make


def in_place() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))


def folded() -> nn.Module:
    return Model(
        lambda m, x: m["second"](m["first"](x.flatten(0, 1)).tanh()).reshape(*x.shape[:2], 3),
        first=nn.Linear(4, 5),
        second=nn.Linear(5, 3),
    )


def reordered() -> nn.Module:
    return Model(
        lambda m, x: m["second"](m["first"](x).tanh().roll(1, 0)), first=nn.Linear(4, 5), second=nn.Linear(5, 3)
    )


def normalised() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 3))


def evaluated(run: Run, batch: Tensor) -> None:
    run.module.eval()
    one_step(run, batch)


class Scaled(nn.Module):
    """A bare parameter beside a child."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.child = nn.Parameter(torch.randn(4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.child((self.scale * x).tanh())


def positions() -> nn.Module:
    return Model(
        lambda m, x: m["words"](x) + m["places"](torch.arange(x.shape[1])),
        words=nn.Embedding(6, 3),
        places=nn.Embedding(RECORDS, 3),
    )


def routed() -> nn.Module:
    """An expert for the records that want one."""

    def forward(m: nn.ModuleDict, x: Tensor) -> Tensor:
        h, wants = m["shared"](x), x[:, :1] > 0
        expert = h.new_zeros(h.shape).masked_scatter(wants.expand_as(h), m["expert"](x[wants[:, 0]]))
        return h.tanh() + expert

    return Model(forward, shared=nn.Linear(4, 3), expert=nn.Linear(4, 3))


def two_inputs() -> nn.Module:
    return Model(lambda m, x: m["product"](x, x.cos()), product=nn.Bilinear(4, 4, 3))


def decoder() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.ConvTranspose2d(4, 3, 3, stride=2), nn.Conv2d(3, 2, 3)
    )


def channels_last(run: Run, batch: Tensor) -> None:
    one_step(run, batch.contiguous(memory_format=torch.channels_last))


def compiled_before() -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(frozen("none")(), backend="aot_eager")  # type: ignore[return-value]


def compiled(run: Run, batch: Tensor) -> None:
    torch._dynamo.reset()
    run.module = torch.compile(run.module, backend="aot_eager")  # type: ignore[assignment]
    one_step(run, batch)


SCENARIOS = [
    Scenario("layers called with keyword arguments", "layer(input=x).", judged(by_keyword, vectors())),
    Scenario(
        "activation checkpointing, non-reentrant", "PyTorch's recommended kind.", judged(checkpointed(False), vectors())
    ),
    Scenario("activation checkpointing, reentrant", "The older kind.", judged(checkpointed(True), vectors())),
    Scenario(
        "in-place activation after a layer", "nn.ReLU(inplace=True), as in torchvision.", judged(in_place, vectors())
    ),
    Scenario("a layer of two inputs", "nn.Bilinear.", judged(two_inputs, vectors())),
    Scenario(
        "convolutions, norm and activation in channels-last",
        "The layout spreads from the input through the whole network.",
        judged(decoder, randn(RECORDS, 2, 5, 6), loop=channels_last),
    ),
    Scenario("a bare nn.Parameter beside layers", "Scales, class tokens.", judged(Scaled, vectors())),
    Scenario(
        "positions embedded once for all records",
        "The layer's input has no batch axis: the sum over records is all that ever existed.",
        judged(positions, words()),
        ours="refused",
    ),
    Scenario(
        "positions embedded once, as many as there are records",
        "Position i is taken for record i.",
        judged(positions, words(length=RECORDS), contributions="unknown"),
        ours="refused",
    ),
    Scenario(
        "an expert that sees some of the records",
        "Row i of its input is of another record than row i of the batch.",
        judged(routed, vectors()),
        ours="refused",
    ),
    Scenario(
        "positions folded into the batch axis",
        "Every position is taken for a record of its own, and clipped to C.",
        judged(folded, randn(RECORDS, 6, 4), tightness=0.1),
        ours="refused",
    ),
    Scenario(
        "rows reordered between two layers",
        "The norm of a record is put together from the gradients of two.",
        judged(reordered, vectors()),
        ours="refused",
    ),
    Scenario(
        "weight_norm", "The layer's weight is made of other parameters.", judged(normalised, vectors()), ours="refused"
    ),
    Scenario(
        "model in eval mode",
        "To switch dropout off, say.",
        judged(frozen("none"), vectors(), loop=evaluated),
        ours="refused",
    ),
    Scenario(
        "torch.compile before make_private",
        "Dynamo and AOTAutograd, no code generation.",
        judged(compiled_before, vectors(), reference=frozen("none"), contributions="unknown"),
        ours="refused",
    ),
    Scenario(
        "torch.compile of the private model",
        "Dynamo and AOTAutograd, no code generation.",
        judged(frozen("none"), vectors(), loop=compiled, contributions="unknown"),
    ),
]
