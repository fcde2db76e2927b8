"""Encoders and decoders, and the presets that pair them.

Everything here treats records independently (GroupNorm, never BatchNorm), so every preset can be trained by DP-SGD.
Images are float ``[N, C, H, W]`` in [0, 1], latents ``[N, latent_dim]``, labels int64 ``[N]``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ModelError(ValueError):
    """A model that cannot be built as asked; the message is one line that names the setting and the way out."""


@dataclass(frozen=True)
class ModelSpec:
    """What a decoder is built from. ``num_classes=0``: not conditional on labels; ``width=None``: the preset's own."""

    preset: str
    image_shape: tuple[int, int, int]
    latent_dim: int
    num_classes: int = 0
    width: int | None = None
    likelihood: str = "bernoulli"


class Decoder(nn.Module):
    """p(image | latent, label): what DP²-VAE releases. Made by :func:`build_decoder`.

    ``forward`` gives logits for a Bernoulli likelihood and means for a Gaussian one; :meth:`mean` gives pixel means.
    ``label_weights [num_classes]`` is the distribution that labels are drawn from where none are asked for.
    """

    label_weights: Tensor

    def __init__(self, spec: ModelSpec, body: nn.Module) -> None:
        super().__init__()
        self.spec = spec
        self.body = body
        classes = max(spec.num_classes, 1)
        self.register_buffer("label_weights", torch.full((classes,), 1 / classes))

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """``[N, latent_dim]`` and labels ``[N]`` (None where the model is not conditional) -> ``[N, C, H, W]``."""
        output = self.body(with_labels(z, labels, self.spec.num_classes))
        return output.reshape(-1, *self.spec.image_shape)

    def mean(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Expected pixels, in [0, 1]."""
        output = self(z, labels)
        return output.sigmoid() if self.spec.likelihood == "bernoulli" else output.clamp(0, 1)

    @torch.no_grad()
    def sample(self, n: int, labels: Tensor | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``n`` images from the prior: the pixel means given z ~ N(0, I), float ``[n, C, H, W]`` in [0, 1].

        Args:
            labels: int64 ``[n]``; drawn from ``label_weights`` where a conditional model is given none.
            generator: a CPU generator; the global one unless given.

        Raises :class:`ModelError`: a negative ``n``, labels of another type or length or out of range, or labels for an
        unconditional model.
        """
        if n < 0:
            raise ModelError(f"n = {n}: give the number of images, 0 or more")
        device = self.label_weights.device
        if labels is None and self.spec.num_classes:
            labels = self.draw_labels(n, generator=generator)
        if labels is not None:
            self._check_labels(labels, n)
            labels = labels.to(device, torch.int64)
        z = torch.randn(n, self.spec.latent_dim, generator=generator).to(device)
        step = max(1, 2**22 // max(1, self.spec.image_shape[1] * self.spec.image_shape[2] * 64))
        parts = [
            self.mean(z[i : i + step], None if labels is None else labels[i : i + step]) for i in range(0, n, step)
        ]
        return torch.cat(parts) if parts else torch.empty(0, *self.spec.image_shape, device=device)

    def draw_labels(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """``n`` labels from ``label_weights``, int64 ``[n]`` on the CPU."""
        if n == 0:
            return torch.empty(0, dtype=torch.int64)
        return torch.multinomial(self.label_weights.cpu(), n, replacement=True, generator=generator)

    def _check_labels(self, labels: Tensor, n: int) -> None:
        classes = self.spec.num_classes
        if not classes:
            raise ModelError("labels were given, but this decoder is not conditional: leave them out")
        if labels.is_floating_point() or labels.is_complex():
            raise ModelError(f"labels are {labels.dtype}: give the numbers of classes, as int64")
        if labels.shape != (n,):
            raise ModelError(f"labels have shape {list(labels.shape)}: give one label for each of the {n} samples")
        wrong = labels[(labels < 0) | (labels >= classes)]
        if len(wrong):
            raise ModelError(f"no class {int(wrong[0])}: labels are 0 to {classes - 1}")


class Encoder(nn.Module):
    """q(latent | image, label) = N(mean, diag exp(log_variance)). Never released."""

    def __init__(self, spec: ModelSpec, trunk: nn.Module, features: int) -> None:
        super().__init__()
        self.num_classes = spec.num_classes
        self.trunk = trunk
        self.head = nn.Linear(features + spec.num_classes, 2 * spec.latent_dim)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``[N, C, H, W]`` -> mean ``[N, latent_dim]``, log-variance ``[N, latent_dim]``."""
        features = self.trunk(images - 0.5).flatten(1)
        mean, log_variance = self.head(with_labels(features, labels, self.num_classes)).chunk(2, dim=1)
        return mean, log_variance


class VAE(nn.Module):
    """Encoder and decoder in one module, for stage 1 modes that train both."""

    def __init__(self, encoder: Encoder, decoder: Decoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def forward(self, images: Tensor, labels: Tensor | None, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Decoder output for ``z = mean + exp(log_variance / 2) * noise``, and the posterior's two parameters."""
        mean, log_variance = self.encoder(images, labels)
        return self.decoder(mean + (0.5 * log_variance).exp() * noise, labels), mean, log_variance


def with_labels(x: Tensor, labels: Tensor | None, num_classes: int) -> Tensor:
    """``x [N, D]`` with the one-hot labels appended where ``num_classes > 0``."""
    if num_classes == 0:
        return x
    if labels is None:
        raise ModelError(f"this model is conditional on {num_classes} classes: give it labels")
    return torch.cat((x, F.one_hot(labels, num_classes).to(x.dtype)), dim=1)


# The presets -----------------------------------------------------------------------------------------------------


def _norm_act(channels: int) -> list[nn.Module]:
    return [nn.GroupNorm(max(1, min(8, channels // 4)), channels), nn.SiLU()]


class ResidualUpBlock(nn.Module):
    """GroupNorm, SiLU, nearest upsampling x2, 3x3 convolution, twice normalised, with a 1x1 shortcut."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            *_norm_act(in_channels), nn.Upsample(scale_factor=2), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        )
        self.second = nn.Sequential(*_norm_act(out_channels), nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in_channels, H, W] -> [N, out_channels, 2H, 2W]``."""
        return self.second(self.first(x)) + F.interpolate(self.shortcut(x), scale_factor=2)


def _mlp_decoder(spec: ModelSpec, width: int) -> nn.Module:
    channels, height, wide = spec.image_shape
    return nn.Sequential(
        nn.Linear(spec.latent_dim + spec.num_classes, width),
        nn.SiLU(),
        nn.Linear(width, width),
        nn.SiLU(),
        nn.Linear(width, channels * height * wide),
    )


def _conv_decoder(spec: ModelSpec, width: int, halvings: int, normalised: bool) -> nn.Module:
    """Transposed convolutions (kernel 4, stride 2, padding 1), the channels halved each time."""
    layers, now = _project(spec, width, halvings)
    for step in reversed(range(halvings)):
        layers += _norm_act(now) if normalised else [nn.SiLU()]
        out = now // 2 if step else spec.image_shape[0]
        layers.append(nn.ConvTranspose2d(now, out, 4, stride=2, padding=1))
        now = out
    return nn.Sequential(*layers)


def _resnet_decoder(spec: ModelSpec, width: int, halvings: int) -> nn.Module:
    layers, now = _project(spec, width, halvings)
    for _ in range(halvings):
        out = max(now // 2, width // 4)
        layers.append(ResidualUpBlock(now, out))
        now = out
    return nn.Sequential(*layers, *_norm_act(now), nn.Conv2d(now, spec.image_shape[0], 3, padding=1))


def _project(spec: ModelSpec, width: int, halvings: int) -> tuple[list[nn.Module], int]:
    _, height, wide = spec.image_shape
    grid = (width, height >> halvings, wide >> halvings)
    project = nn.Linear(spec.latent_dim + spec.num_classes, grid[0] * grid[1] * grid[2])
    return [project, nn.Unflatten(1, grid)], width


def _mlp_trunk(spec: ModelSpec, width: int) -> tuple[nn.Module, int]:
    pixels = spec.image_shape[0] * spec.image_shape[1] * spec.image_shape[2]
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()), width


def _conv_trunk(spec: ModelSpec, width: int, halvings: int) -> tuple[nn.Module, int]:
    """Convolutions (kernel 4, stride 2, padding 1), the channels doubled each time up to ``width``."""
    now, height, wide = spec.image_shape
    layers: list[nn.Module] = []
    for step in range(halvings):
        out = width >> (halvings - 1 - step)
        layers += [nn.Conv2d(now, out, 4, stride=2, padding=1), *(_norm_act(out) if step else [nn.SiLU()])]
        now = out
    return nn.Sequential(*layers), width * (height >> halvings) * (wide >> halvings)


@dataclass(frozen=True)
class _Preset:
    """``halvings``: how often the sides are halved from the image to the smallest grid."""

    width: int
    halvings: int = 0


PRESETS = {
    "mlp": _Preset(width=256),
    "conv28": _Preset(width=64, halvings=2),
    "conv64": _Preset(width=512, halvings=4),
    "resnet64": _Preset(width=256, halvings=3),
}


def _width(spec: ModelSpec) -> int:
    """The width to build with; raises :class:`ModelError` where preset, sides or width do not fit together."""
    preset = PRESETS.get(spec.preset)
    if preset is None:
        raise ModelError(f'preset "{spec.preset}" is not known: choose one of {", ".join(PRESETS)}')
    _, height, wide = spec.image_shape
    step = 2**preset.halvings
    if height % step or wide % step:
        raise ModelError(
            f"preset {spec.preset} needs sides that are multiples of {step}, but the images are {wide}x{height}: "
            f"resize them (image_size), or choose another preset ({', '.join(PRESETS)})"
        )
    width = preset.width if spec.width is None else spec.width
    if width % max(4, step):
        raise ModelError(f"width = {width}: preset {spec.preset} needs a multiple of {max(4, step)}")
    return width


def build_decoder(spec: ModelSpec) -> Decoder:
    """A decoder with PyTorch's default initialisation (from the global generator).

    Raises :class:`ModelError`: unknown preset, or sides or width that it does not allow.
    """
    width, halvings = _width(spec), PRESETS[spec.preset].halvings
    if spec.preset == "mlp":
        body = _mlp_decoder(spec, width)
    elif spec.preset == "resnet64":
        body = _resnet_decoder(spec, width, halvings)
    else:
        body = _conv_decoder(spec, width, halvings, normalised=spec.preset == "conv64")
    return Decoder(spec, body)


def build_encoder(spec: ModelSpec) -> Encoder:
    """The encoder that goes with the preset of ``spec``; errors as :func:`build_decoder`."""
    width, halvings = _width(spec), PRESETS[spec.preset].halvings
    trunk, features = _conv_trunk(spec, width, halvings) if halvings else _mlp_trunk(spec, width)
    return Encoder(spec, trunk, features)
