"""What the step is measured on: models with their data, made by name, the same ones in every process.

A workload's name is a preset (``W2-decoder``), a preset with another batch (``W2-decoder@16``), or a member of the
decoder family, whose parts are all optional (``family:size=64,width=32,depth=1@64``). ``-decoder`` trains a decoder
on latents that are given, ``-vae`` encoder and decoder together on noise that is given, so that every variant
computes the same.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RecordLoss(nn.Module):
    """``loss(output, *targets) -> [N]``, one number a record; their sum where ``reduction`` is "sum".

    Opacus' ghost clipping takes a criterion with this attribute and sets it to "none".
    """

    def __init__(self, of_records: Callable[..., Tensor], reduction: str = "sum") -> None:
        super().__init__()
        self.of_records, self.reduction = of_records, reduction

    def forward(self, output: Tensor | tuple[Tensor, ...], *targets: Tensor) -> Tensor:
        losses = self.of_records(output, *targets)
        return losses if self.reduction == "none" else losses.sum()


@dataclass(frozen=True)
class Problem:
    """``model(*inputs)`` against ``targets``, all with the batch as their first axis."""

    name: str
    model: nn.Module
    inputs: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]
    loss: RecordLoss

    @property
    def batch(self) -> int:
        return len(self.targets[0])

    @property
    def device(self) -> torch.device:
        return self.targets[0].device

    def losses(self, model: Callable[..., Tensor] | None = None) -> Tensor:
        """Per-sample losses [N] of ``model``, the problem's own unless given."""
        call = self.model if model is None else model
        return self.loss.of_records(call(*self.inputs), *self.targets)

    def to(self, device: str) -> Problem:
        """The same there; the model itself is moved."""
        inputs, targets = (tuple(x.to(device) for x in xs) for xs in (self.inputs, self.targets))
        return replace(self, model=self.model.to(device), inputs=inputs, targets=targets)

    def parts(self, count: int) -> list[Problem]:
        """The same of ``count`` parts of its records."""
        columns = zip(*(x.chunk(count) for x in (*self.inputs, *self.targets)), strict=True)
        split = len(self.inputs)
        return [replace(self, inputs=part[:split], targets=part[split:]) for part in columns]


class VAE(nn.Module):
    """Encoder and decoder in one module: ``(images, noise) -> (reconstruction, mu, log_var)``."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mu, log_var = self.encoder(images).chunk(2, dim=1)
        return self.decoder(mu + noise * (0.5 * log_var).exp()), mu, log_var


class UpBlock(nn.Module):
    """Residual block that doubles the resolution: GroupNorm, SiLU, 3x3 convolution, twice."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, channels), nn.Conv2d(channels, out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, out), nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.interpolate(F.silu(self.norm1(x)), scale_factor=2.0))
        return self.conv2(F.silu(self.norm2(h))) + self.skip(F.interpolate(x, scale_factor=2.0))


class Attention(nn.Module):
    """Multi-head self-attention out of plain Linear layers, which every engine has a rule for."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class ViT(nn.Module):
    """Small vision transformer. What some engine has no rule for is written as what all have one for: patches are cut
    from the images and go through a Linear, positions are an Embedding, tokens are averaged."""

    def __init__(self, size: int = 32, patch: int = 4, width: int = 192, depth: int = 4, heads: int = 3) -> None:
        super().__init__()
        self.patch, self.patches = patch, nn.Linear(3 * patch**2, width)
        self.positions = nn.Embedding((size // patch) ** 2, width)
        self.blocks = nn.Sequential(*(_TransformerBlock(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        cut = images.unflatten(3, (-1, self.patch)).unflatten(2, (-1, self.patch)).permute(0, 2, 4, 1, 3, 5)
        x = self.patches(cut.flatten(3).flatten(1, 2))
        x = x + self.positions(torch.arange(x.shape[1], device=x.device).repeat(len(x), 1))
        return self.head(self.norm(self.blocks(x)).mean(1))


class _TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def _up(channels: int, out: int, norm: bool = True) -> list[nn.Module]:
    """Transposed 4x4 convolution that doubles the resolution, after a norm and an activation."""
    before: list[nn.Module] = [nn.GroupNorm(8, channels), nn.ReLU()] if norm else [nn.ReLU()]
    return [*before, nn.ConvTranspose2d(channels, out, 4, 2, 1)]


def _down(channels: int, out: int, norm: bool = True) -> list[nn.Module]:
    after: list[nn.Module] = [nn.GroupNorm(8, out)] if norm else []
    return [nn.Conv2d(channels, out, 4, 2, 1), *after, nn.LeakyReLU(0.2)]


def _w1() -> tuple[nn.Module, nn.Module]:
    down = [*_down(1, 32, norm=False), *_down(32, 64, norm=False), nn.Flatten(), nn.Linear(3136, 128)]
    up = [nn.Linear(64, 3136), nn.Unflatten(1, (64, 7, 7)), *_up(64, 32, norm=False), *_up(32, 1, norm=False)]
    return nn.Sequential(*down), nn.Sequential(*up)


def _w2() -> tuple[nn.Module, nn.Module]:
    down = [*_down(3, 64, norm=False), *_down(64, 128), *_down(128, 256), *_down(256, 512)]
    up = [*_up(512, 256), *_up(256, 128), *_up(128, 64), *_up(64, 3)]
    encoder = nn.Sequential(*down, nn.Flatten(), nn.Linear(512 * 16, 256))
    return encoder, nn.Sequential(nn.Linear(128, 512 * 16), nn.Unflatten(1, (512, 4, 4)), *up)


def _w3() -> tuple[nn.Module, nn.Module]:
    down = [nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 128)]
    up = [nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 784)]
    return nn.Sequential(*down), nn.Sequential(*up)


def _w4() -> tuple[nn.Module, nn.Module]:
    down = [*_down(3, 64, norm=False), *_down(64, 128), *_down(128, 256), nn.Flatten(), nn.Linear(256 * 64, 256)]
    head = [nn.GroupNorm(8, 64), nn.SiLU(), nn.Conv2d(64, 3, 3, padding=1)]
    up = [UpBlock(256, 128), UpBlock(128, 64), UpBlock(64, 64)]
    return nn.Sequential(*down), nn.Sequential(nn.Linear(128, 256 * 64), nn.Unflatten(1, (256, 8, 8)), *up, *head)


def _cnn() -> nn.Module:
    layers: list[nn.Module] = []
    for channels, out, stride in [(3, 64, 1), (64, 64, 2), (64, 128, 2), (128, 256, 2)]:
        layers += [nn.Conv2d(channels, out, 3, stride, 1), nn.GroupNorm(8, out), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))


def _family(size: int = 32, width: int = 32, depth: int = 1) -> nn.Module:
    """DCGAN-like decoder from 4x4 to ``size``; ``width`` channels before the last layer, twice as many at each level
    below; at each level ``depth - 1`` 3x3 convolutions more."""
    levels = int(math.log2(size)) - 2
    channels = [min(width * 2 ** (levels - 1 - i), 16 * width) for i in range(levels)]
    layers: list[nn.Module] = [nn.Linear(64, channels[0] * 16), nn.Unflatten(1, (channels[0], 4, 4))]
    for here, out in zip(channels, [*channels[1:], 3], strict=True):
        for _ in range(depth - 1):
            layers += [nn.GroupNorm(8, here), nn.ReLU(), nn.Conv2d(here, here, 3, padding=1)]
        layers += _up(here, out)
    return nn.Sequential(*layers)


PAIRS = {"W1": _w1, "W2": _w2, "W3": _w3, "W4": _w4}
BATCH = {"W1": 256, "W2": 64, "W3": 512, "W4": 32, "cnn": 128, "vit": 64, "family": 64}
GPU_BATCH = {"W1": 2048, "W2": 512, "W3": 4096, "W4": 256, "cnn": 1024, "vit": 512, "family": 128}
SHAPE = {"W1": (1, 28, 28), "W2": (3, 64, 64), "W3": (784,), "W4": (3, 64, 64), "cnn": (3, 32, 32), "vit": (3, 32, 32)}
LATENTS = {"W1": 64, "W2": 128, "W3": 64, "W4": 128, "family": 64}
BINARY = ("W1", "W3")
PRESETS = [*(f"{pair}-{part}" for pair in PAIRS for part in ("decoder", "vae")), "cnn", "vit"]
# With a GPU's batches, the most telling first.
ON_GPU = [f"W{n}-decoder@{GPU_BATCH[f'W{n}']}" for n in (2, 4, 1, 3)]
ON_GPU += ["family:size=128,width=32@128", "family:size=256,width=16@64"]
ON_GPU += [f"W{n}-vae@{GPU_BATCH[f'W{n}']}" for n in (2, 4, 1, 3)] + ["cnn@1024", "vit@512"]


def _binary(output: Tensor, images: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(output, images, reduction="none").flatten(1).sum(1)


def _gaussian(output: Tensor, images: Tensor) -> Tensor:
    return 0.5 * (output - images).square().flatten(1).sum(1)


def _labels(output: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(output, labels, reduction="none")


def _elbo(reconstruct: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def losses(output: tuple[Tensor, Tensor, Tensor], images: Tensor) -> Tensor:
        out, mu, log_var = output
        return reconstruct(out, images) + 0.5 * (mu.square() + log_var.exp() - 1 - log_var).sum(1)

    return losses


def _images(batch: int, shape: tuple[int, ...], binary: bool, generator: torch.Generator) -> Tensor:
    """Smooth pictures: blots, in black and white or in three colours of one drawing."""
    side = 28 if len(shape) == 1 else shape[-1]
    blots = F.interpolate(torch.rand(batch, 1, 8, 8, generator=generator), size=(side, side), mode="bilinear")
    if binary:
        return (blots > 0.5).float().reshape(batch, *shape)
    return torch.cat([blots, blots.flip(2), 1 - blots], 1) * 2 - 1


def make(name: str, batch: int | None = None) -> Problem:
    """The problem of that name, of its own batch size unless ``batch`` or the name says otherwise.

    Raises:
        ValueError: there is none.
    """
    base, _, given = name.partition("@")
    kind, _, settings = base.partition(":")
    kind, _, part = kind.partition("-")
    if not (base in PRESETS or (kind == "family" and not part)):
        raise ValueError(f"workload {name!r} is unknown: choose among {', '.join(PRESETS)}, family:size=..,width=..")
    options = {key: int(value) for key, value in (s.split("=") for s in settings.split(",") if s)}
    batch = batch or int(given or BATCH[kind])
    shape = SHAPE.get(kind, (3, options.get("size", 32), options.get("size", 32)))
    generator = torch.Generator().manual_seed(zlib.crc32(base.encode()))
    images = _images(batch, shape, kind in BINARY, generator)
    torch.manual_seed(1)
    if kind in ("cnn", "vit"):
        labels = torch.randint(10, (batch,), generator=generator)
        return Problem(name, _cnn() if kind == "cnn" else ViT(), (images,), (labels,), RecordLoss(_labels))
    latents = torch.randn(batch, LATENTS[kind], generator=generator)
    reconstruct = _binary if kind in BINARY else _gaussian
    encoder, decoder = PAIRS[kind]() if kind in PAIRS else (nn.Identity(), _family(**options))
    if part == "vae":
        return Problem(name, VAE(encoder, decoder), (images, latents), (images,), RecordLoss(_elbo(reconstruct)))
    return Problem(name, decoder, (latents,), (images,), RecordLoss(reconstruct))
