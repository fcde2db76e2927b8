"""Scenarios: one layer and its options, alone in a model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from fault_harness import Loop, NotPossible, Run, Scenario, judged, one_step, randn
from torch import Tensor, nn

RECORDS = 5


def words(entries: int, *shape: int) -> Tensor:
    return torch.randint(entries, (RECORDS, *shape), generator=torch.Generator().manual_seed(0))


def _paddings() -> list[Scenario]:
    why = "The border that the layer adds is part of its input: a gradient computed with zeros there is another one."
    rooms = [(nn.Conv1d, (3, 7)), (nn.Conv2d, (3, 6, 5)), (nn.Conv3d, (2, 3, 4, 4))]
    return [
        Scenario(
            f"{conv.__name__}, padding_mode {mode}",
            why,
            judged(lambda c=conv, m=mode, s=shape: c(s[0], 4, 3, padding=2, padding_mode=m), randn(RECORDS, *shape)),
        )
        for conv, shape in rooms
        for mode in ("reflect", "replicate", "circular")
    ]


def _convolutions() -> list[Scenario]:
    image = randn(RECORDS, 4, 6, 5)
    transposed = "Has no rule in Opacus, which differentiates the layer record by record instead."
    lopsided = "An even kernel needs one row more of padding on one side than on the other."
    return [
        Scenario(
            "Conv2d, channels-last input",
            "The layout in memory is no part of the computation; the last layers of many networks see it.",
            judged(
                lambda: nn.Conv2d(4, 3, 3, padding=1),
                image,
                loop=lambda run, batch: one_step(run, batch.contiguous(memory_format=torch.channels_last)),
            ),
        ),
        Scenario(
            "Conv2d, groups",
            "Each group has its own block of the gradient.",
            judged(lambda: nn.Conv2d(4, 6, 3, groups=2, stride=2), image),
        ),
        Scenario(
            "Conv2d, depthwise",
            "As many groups as channels.",
            judged(lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1), image),
        ),
        Scenario(
            "Conv2d, padding same",
            lopsided,
            judged(lambda: nn.Conv2d(4, 3, (4, 2), padding="same", dilation=(1, 2)), image),
        ),
        *(
            Scenario(
                conv.__name__,
                transposed,
                judged(lambda c=conv: c(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), randn(*shape)),
            )
            for conv, shape in [
                (nn.ConvTranspose1d, (RECORDS, 4, 5)),
                (nn.ConvTranspose2d, (RECORDS, 4, 3, 4)),
                (nn.ConvTranspose3d, (RECORDS, 4, 2, 3, 2)),
            ]
        ),
    ]


def _others() -> list[Scenario]:
    return [
        Scenario(
            "Embedding, padding_idx",
            "The padding entry has no gradient, and must not count in the norm.",
            judged(lambda: nn.Embedding(5, 3, padding_idx=2), words(5, 6)),
        ),
        Scenario(
            "Embedding, scale_grad_by_freq",
            "Divides by how often a word stands in the batch: a record's gradient depends on the others.",
            judged(lambda: nn.Embedding(5, 3, scale_grad_by_freq=True), words(5, 6)),
            ours="refused",
        ),
        Scenario(
            "Embedding, max_norm",
            "Rewrites, without noise, the entries that the batch has used.",
            judged(lambda: nn.Embedding(5, 3, max_norm=0.5), words(5, 6)),
            ours="refused",
        ),
        Scenario(
            "EmbeddingBag",
            "Sums the entries of each record.",
            judged(lambda: nn.EmbeddingBag(5, 3, mode="sum"), words(5, 6)),
        ),
        Scenario(
            "Linear on 4 axes",
            "Attention heads, windows of patches: every axis between the first and the last is a position.",
            judged(lambda: nn.Linear(5, 3), randn(RECORDS, 2, 3, 5)),
        ),
        Scenario(
            "LayerNorm, bias=False",
            "Of every modern transformer.",
            judged(lambda: nn.LayerNorm(6, bias=False), randn(RECORDS, 4, 6)),
        ),
        Scenario("RMSNorm", "Of the large language models.", judged(lambda: nn.RMSNorm(6), randn(RECORDS, 4, 6))),
    ]


def _empty() -> list[Scenario]:
    def loop(make: Callable[[], nn.Module]) -> Loop:
        def first_empty(run: Run, batch: Tensor) -> None:
            try:
                make()(batch[:0].to(torch.get_default_dtype()) if batch.is_floating_point() else batch[:0])
            except Exception as error:
                raise NotPossible("PyTorch itself refuses it") from error
            one_step(run, batch[:0])
            one_step(run, batch)

        return first_empty

    layers = [
        (lambda: nn.Linear(4, 3), randn(RECORDS, 4)),
        (lambda: nn.Conv1d(3, 4, 3), randn(RECORDS, 3, 6)),
        (lambda: nn.Conv2d(3, 4, 3), randn(RECORDS, 3, 5, 6)),
        (lambda: nn.Conv3d(3, 4, 2), randn(RECORDS, 3, 3, 4, 3)),
        (lambda: nn.ConvTranspose1d(3, 4, 3), randn(RECORDS, 3, 6)),
        (lambda: nn.ConvTranspose2d(3, 4, 3), randn(RECORDS, 3, 4, 3)),
        (lambda: nn.ConvTranspose3d(3, 4, 2), randn(RECORDS, 3, 3, 2, 3)),
        (lambda: nn.GroupNorm(2, 4), randn(RECORDS, 4, 5)),
        (lambda: nn.LayerNorm(6), randn(RECORDS, 4, 6)),
        (lambda: nn.InstanceNorm2d(4, affine=True), randn(RECORDS, 4, 5, 3)),
        (lambda: nn.Embedding(5, 3), words(5, 6)),
    ]
    why = "Poisson sampling draws no record at all now and then: a step like any other, and the next one is not harmed."
    return [
        Scenario(
            f"empty batch, {type(make()).__name__}",
            why,
            judged(make, records, loop=loop(make)),
            ours="not possible" if isinstance(make(), nn.InstanceNorm2d) else "correct",
        )
        for make, records in layers
    ]


SCENARIOS = [*_paddings(), *_convolutions(), *_others(), *_empty()]
