"""Layers, inputs and oracles shared by tests and benchmarks.

A :class:`LayerCase` is one layer with the shape of its input, batch excluded. The two oracles know nothing of the
engine: one differentiates a single record at a time, the other vectorises that with ``vmap(grad)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap


@dataclass(frozen=True)
class LayerCase:
    """``make()`` builds the layer; records have shape ``shape``, or are indices below ``entries``."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    entries: int = 0

    def inputs(self, records: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if self.entries:
            return torch.randint(self.entries, (records, *self.shape), generator=generator)
        return torch.randn(records, *self.shape, generator=generator, dtype=torch.float64).to(dtype)


class BareScale(nn.Module):
    """A layer without a rule: bare parameters and a child."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(features))
        self.shift = nn.Parameter(torch.randn(1))
        self.child = nn.Linear(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.child(torch.tanh(x * self.scale + self.shift))


def _conv_cases() -> list[LayerCase]:
    cases = []
    for name, kwargs, shape in [
        ("plain", dict(in_channels=3, out_channels=5, kernel_size=3), (3, 7)),
        ("strided", dict(in_channels=4, out_channels=6, kernel_size=4, stride=3, padding=2), (4, 11)),
        ("dilated", dict(in_channels=2, out_channels=3, kernel_size=3, dilation=2, padding=3), (2, 9)),
        (
            "grouped",
            dict(in_channels=6, out_channels=4, kernel_size=3, groups=2, stride=2, padding=1),
            (6, 8),
        ),
        (
            "depthwise",
            dict(in_channels=4, out_channels=8, kernel_size=3, groups=4, padding=1, bias=False),
            (4, 6),
        ),
        ("wide stride", dict(in_channels=2, out_channels=3, kernel_size=2, stride=3), (2, 8)),
        (
            "all at once",
            dict(in_channels=4, out_channels=6, kernel_size=3, groups=2, stride=2, padding=3, dilation=3),
            (4, 9),
        ),
    ]:
        channels, size = shape
        for dims, conv, transposed in [
            (1, nn.Conv1d, nn.ConvTranspose1d),
            (2, nn.Conv2d, nn.ConvTranspose2d),
            (3, nn.Conv3d, nn.ConvTranspose3d),
        ]:
            full = (channels, *(size - axis for axis in range(dims)))
            cases.append(LayerCase(f"conv{dims}d {name}", lambda c=conv, k=kwargs: c(**k), full))
            extra = {"output_padding": 1} if kwargs.get("stride", 1) > 1 else {}
            small = (channels, *(max(2, s // 2) for s in full[1:]))
            cases.append(LayerCase(f"convT{dims}d {name}", lambda c=transposed, k=kwargs, e=extra: c(**k, **e), small))
    for mode in ("reflect", "replicate", "circular"):
        cases.append(
            LayerCase(f"conv2d {mode}", lambda m=mode: nn.Conv2d(3, 4, 3, padding=2, padding_mode=m), (3, 6, 5))
        )
    cases += [
        LayerCase("conv1d circular", lambda: nn.Conv1d(3, 4, 3, stride=2, padding=2, padding_mode="circular"), (3, 7)),
        LayerCase("conv3d replicate", lambda: nn.Conv3d(2, 3, 2, padding=1, padding_mode="replicate"), (2, 3, 4, 3)),
        LayerCase(
            "conv2d per axis",
            lambda: nn.Conv2d(4, 2, (3, 2), stride=(1, 3), padding=(2, 0), dilation=(2, 1), groups=2),
            (4, 6, 8),
        ),
        LayerCase(
            "conv2d per axis reflect",
            lambda: nn.Conv2d(2, 3, (2, 3), stride=(2, 1), padding=(1, 3), padding_mode="reflect"),
            (2, 5, 6),
        ),
        LayerCase(
            "convT2d per axis",
            lambda: nn.ConvTranspose2d(
                4, 6, (2, 4), stride=(3, 2), padding=(0, 3), dilation=(2, 1), output_padding=(1, 0), groups=2
            ),
            (4, 3, 5),
        ),
        LayerCase("convT1d one position", lambda: nn.ConvTranspose1d(3, 4, 5), (3, 1)),
        LayerCase("convT2d decoder", lambda: nn.ConvTranspose2d(6, 4, 4, stride=2, padding=1), (6, 4, 4)),
        LayerCase(
            "convT3d dilated output padding",
            lambda: nn.ConvTranspose3d(2, 2, 2, dilation=2, output_padding=1),
            (2, 2, 3, 2),
        ),
    ]
    cases.append(LayerCase("conv2d same", lambda: nn.Conv2d(3, 4, (4, 3), padding="same", dilation=(1, 2)), (3, 7, 8)))
    cases.append(
        LayerCase("conv1d same reflect", lambda: nn.Conv1d(3, 4, 4, padding="same", padding_mode="reflect"), (3, 9))
    )
    cases.append(LayerCase("conv2d valid", lambda: nn.Conv2d(3, 4, 3, padding="valid"), (3, 5, 5)))
    cases.append(LayerCase("conv2d 1x1", lambda: nn.Conv2d(5, 3, 1), (5, 4, 4)))
    cases.append(LayerCase("conv2d one position", lambda: nn.Conv2d(3, 4, 4), (3, 4, 4)))
    return cases


LAYER_CASES = [
    LayerCase("linear", lambda: nn.Linear(7, 5), (7,)),
    LayerCase("linear no bias", lambda: nn.Linear(7, 5, bias=False), (7,)),
    LayerCase("linear sequence", lambda: nn.Linear(6, 4), (11, 6)),
    LayerCase("linear 4-d", lambda: nn.Linear(5, 3), (2, 3, 5)),
    LayerCase("linear one position", lambda: nn.Linear(6, 4), (1, 6)),
    LayerCase("linear one feature", lambda: nn.Linear(1, 1), (17, 1)),
    *_conv_cases(),
    LayerCase("group norm", lambda: nn.GroupNorm(3, 6), (6, 5, 4)),
    LayerCase("group norm flat", lambda: nn.GroupNorm(2, 6), (6,)),
    LayerCase("group norm 3d", lambda: nn.GroupNorm(1, 4, eps=1e-2), (4, 2, 3, 2)),
    LayerCase("group norm each channel", lambda: nn.GroupNorm(4, 4), (4, 7)),
    LayerCase("layer norm", lambda: nn.LayerNorm(6), (5, 6)),
    LayerCase("layer norm two axes", lambda: nn.LayerNorm((4, 5)), (3, 4, 5)),
    LayerCase("layer norm no bias", lambda: nn.LayerNorm(6, bias=False), (6,)),
    LayerCase("rms norm", lambda: nn.RMSNorm(6), (5, 6)),
    LayerCase("rms norm one position", lambda: nn.RMSNorm(6, eps=None), (6,)),
    LayerCase("rms norm two axes", lambda: nn.RMSNorm((4, 5), eps=1e-3), (4, 5)),
    LayerCase("instance norm 1d", lambda: nn.InstanceNorm1d(4, affine=True), (4, 6)),
    LayerCase("instance norm 2d", lambda: nn.InstanceNorm2d(4, affine=True), (4, 6, 5)),
    LayerCase("instance norm 3d", lambda: nn.InstanceNorm3d(2, affine=True), (2, 3, 4, 2)),
    LayerCase("embedding", lambda: nn.Embedding(4, 3), (9,), entries=4),
    LayerCase("embedding padded", lambda: nn.Embedding(5, 3, padding_idx=2), (3, 4), entries=5),
    LayerCase("embedding one index", lambda: nn.Embedding(5, 3), (), entries=5),
    LayerCase("embedding 3-d", lambda: nn.Embedding(3, 2, padding_idx=-1), (2, 3, 2), entries=3),
    LayerCase("prelu (no rule)", lambda: nn.PReLU(4), (4, 5)),
    LayerCase("bare parameters (no rule)", lambda: BareScale(6), (6,)),
]


def lying(x: Tensor, memory: str) -> Tensor:
    """The same values: "contiguous", "channels last", or "strided", with NaN between them."""
    if memory == "channels last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if memory == "strided":
        between = torch.full_like(x, torch.nan) if x.is_floating_point() else torch.zeros_like(x)
        return torch.stack([x, between], -1)[..., 0]
    return x


def record_loss(output: Tensor) -> Tensor:
    """A loss of each record, [N], whose output gradient differs at every position."""
    weights = torch.linspace(0.5, 1.5, output.shape[1:].numel(), dtype=output.dtype, device=output.device)
    weights = weights.reshape(output.shape[1:])
    return (weights * output.sin() + 0.1 * output.square()).flatten(1).sum(1)


def grads_one_by_one(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """First oracle: one record, one ordinary backward, N times. ``{name: [N, *shape]}``."""
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows: dict[str, list[Tensor]] = {name: [] for name in params}
    for n in range(inputs.shape[0]):
        loss = record_loss(model(inputs[n : n + 1])).sum()
        for (name, p), g in zip(
            params.items(), torch.autograd.grad(loss, list(params.values()), allow_unused=True), strict=True
        ):
            rows[name].append(torch.zeros_like(p) if g is None else g)
    return {name: torch.stack(r) for name, r in rows.items()}


def grads_by_vmap(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """Second oracle: the same under ``vmap(grad)``."""
    params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def one(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return record_loss(functional_call(model, params, (x.unsqueeze(0),))).sum()

    return vmap(grad(one), in_dims=(None, 0))(params, inputs)
