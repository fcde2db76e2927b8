"""First and second moments of the records under differential privacy, and the generator they make on their own.

Two Gaussian mechanisms on clipped, publicly centred pixels. Their sums are exact: what a record contributes is rounded
towards zero to a fixed binary grid and added in integers, so no rounding of a sum can enlarge the sensitivity.

The moments define probabilistic PCA (Tipping and Bishop 1999): ``x = mean_y + loadings z + residual`` with z ~ N(0, I).
Its posterior is the encoder of mode ``linear``; its draws, which cost nothing more, give the decoder a warm start.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..engine.keystream import Stream
from .data import to_unit

MAX_PIXELS = 1024
"""Largest number of values a thumbnail may have: the covariance has the square of it."""

COUNT_WEIGHT = 0.3
"""Share (as a sine) of a record's contribution that counts it rather than describes it."""

_SUM_BITS = 40  # grid of the class sums
_PRODUCT_BITS = 20  # grid of the factors of the covariance: products have twice as many bits
_EXACT_ROWS = 4096  # 2^12 products below 2^40 add up exactly in float64's 53 bits, in any order
_MAX_RECORDS = 1 << 22  # and 2^22 of them in int64


@dataclass(frozen=True)
class ClassMeans:
    """Released means: ``means [K, D]`` in [0, 1], ``counts [K]``, at least 1 each. Both are noisy."""

    means: Tensor
    counts: Tensor

    @property
    def label_weights(self) -> Tensor:
        """Share of each class, ``[K]``."""
        return self.counts / self.counts.sum()


def thumbnail_shape(image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """(C, h, w): the public size at which moments are taken, at most :data:`MAX_PIXELS` values, in whole halvings."""
    channels, height, width = image_shape
    while channels * height * width > MAX_PIXELS:
        height, width = -(-height // 2), -(-width // 2)
    return channels, height, width


def thumbnails(images: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Images (float ``[N, C, H, W]`` in [0, 1]) averaged over areas down to ``shape``: float64 ``[N, C h w]``."""
    return F.adaptive_avg_pool2d(images.double(), shape[1:]).flatten(1)


def enlarge(thumbs: Tensor, shape: tuple[int, int, int], image_shape: tuple[int, int, int]) -> Tensor:
    """Thumbnails ``[N, C h w]`` as images float32 ``[N, C, H, W]`` in [0, 1], bilinearly."""
    small = thumbs.reshape(-1, *shape).to(torch.float32)
    if shape != image_shape:
        small = F.interpolate(small, size=image_shape[1:], mode="bilinear")
    return small.clamp(0, 1)


def class_means(
    images: Tensor,
    labels: Tensor | None,
    num_classes: int,
    *,
    center: float,
    radius: float,
    noise_multiplier: float,
    stream: Stream,
) -> ClassMeans:
    """Means and sizes of the classes (of the one class there is, where ``labels`` is None) by one Gaussian mechanism.

    A record adds one vector to the row of its class: its thumbnail less ``center``, clipped to ``radius``, and a
    constant that counts it, together of norm at most 1. Sensitivity 1 under add/remove; the noise has standard
    deviation ``noise_multiplier``.

    Args:
        images: uint8 ``[N, C, H, W]``.
        center: public grey level that pixels are measured from.
        radius: public bound of a thumbnail's Euclidean distance from ``center``.
    """
    shape = thumbnail_shape(_shape(images))
    pixels = math.prod(shape)
    described = math.sqrt(1 - COUNT_WEIGHT**2)
    sums = torch.zeros(max(1, num_classes), pixels + 1, dtype=torch.int64)
    for start, thumbs in _chunks(images, shape):
        rows = torch.full((len(thumbs), pixels + 1), COUNT_WEIGHT, dtype=torch.float64)
        rows[:, :-1] = described * _clipped((thumbs - center) / radius)
        classes = torch.zeros(len(rows), dtype=torch.int64) if labels is None else labels[start : start + len(rows)]
        sums.index_add_(0, classes, (rows * 2.0**_SUM_BITS).trunc().to(torch.int64))
    noisy = sums.double() * 2.0**-_SUM_BITS
    if noise_multiplier > 0:
        stream.add_noise_([noisy], noise_multiplier)
    counts = (noisy[:, -1] / COUNT_WEIGHT).clamp(min=1)
    means = center + radius / described * noisy[:, :-1] / counts.unsqueeze(1)
    return ClassMeans(means.clamp(0, 1), counts)


def covariance(
    images: Tensor,
    labels: Tensor | None,
    means: ClassMeans,
    *,
    radius: float,
    noise_multiplier: float,
    stream: Stream,
) -> Tensor:
    """Covariance within classes, around released means, by one Gaussian mechanism: ``[D, D]``, symmetric.

    A record adds ``r r^T / radius^2`` with r its thumbnail less its class's released mean, clipped to ``radius``:
    Frobenius norm, and so the sensitivity, at most 1. Noise has standard deviation ``noise_multiplier`` on the
    diagonal and 1/sqrt(2) of it off the diagonal, which is one isotropic Gaussian on symmetric matrices.
    """
    shape = thumbnail_shape(_shape(images))
    pixels = math.prod(shape)
    total = torch.zeros(pixels, pixels, dtype=torch.int64)
    for start, thumbs in _chunks(images, shape):
        rows = 0 if labels is None else labels[start : start + len(thumbs)]
        residuals = _clipped((thumbs - means.means[rows]) / radius)
        grid = (residuals * 2.0**_PRODUCT_BITS).trunc()
        total += (grid.T @ grid).to(torch.int64)
    matrix = total.double() * 2.0 ** (-2 * _PRODUCT_BITS)
    if noise_multiplier > 0:
        upper = torch.zeros(pixels * (pixels + 1) // 2, dtype=torch.float64)
        stream.add_noise_([upper], noise_multiplier)
        noise = torch.zeros_like(matrix)
        noise[tuple(torch.triu_indices(pixels, pixels))] = upper / math.sqrt(2)
        matrix += noise + noise.T - (2 - math.sqrt(2)) * noise.diagonal().diag()
    return matrix * radius**2 / means.counts.sum()


class LinearModel(nn.Module):
    """Probabilistic PCA of thumbnails around class means: the encoder of mode ``linear``, and a small generator.

    Made from released moments only, so it is as private as they are. Buffers: ``means [K, D]``, ``loadings [D, L]``,
    ``variances [L]`` (eigenvalues, by latent), ``residual`` (scalar variance), ``label_weights [K]``.
    """

    def __init__(self, image_shape: tuple[int, int, int], latent_dim: int, num_classes: int) -> None:
        super().__init__()
        self.image_shape = image_shape
        self.shape = thumbnail_shape(image_shape)
        self.num_classes = num_classes
        pixels, classes = math.prod(self.shape), max(1, num_classes)
        self.register_buffer("means", torch.zeros(classes, pixels, dtype=torch.float64))
        self.register_buffer("loadings", torch.zeros(pixels, latent_dim, dtype=torch.float64))
        self.register_buffer("variances", torch.ones(latent_dim, dtype=torch.float64))
        self.register_buffer("residual", torch.ones((), dtype=torch.float64))
        self.register_buffer("label_weights", torch.full((classes,), 1 / classes, dtype=torch.float64))

    means: Tensor
    loadings: Tensor
    variances: Tensor
    residual: Tensor
    label_weights: Tensor

    def set_moments(self, means: ClassMeans, matrix: Tensor) -> LinearModel:
        """Take over released moments. Latents beyond the number of pixels, or without variance, stay unused."""
        self.means.copy_(means.means)
        self.label_weights.copy_(means.label_weights)
        values, vectors = torch.linalg.eigh(matrix)
        values, vectors = values.flip(0), vectors.flip(1)
        used = min(self.loadings.shape[1], len(values) - 1)
        self.residual.copy_(values[used:].mean().clamp(min=1e-6))
        self.variances.fill_(1.0)
        self.loadings.zero_()
        explained = (values[:used] - self.residual).clamp(min=0)
        self.variances[:used] = explained + self.residual
        self.loadings[:, :used] = vectors[:, :used] * explained.sqrt()
        return self

    def forward(self, images: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Posterior of the latents: ``[N, C, H, W]`` in [0, 1] -> mean ``[N, L]``, log-variance ``[N, L]``, float32.

        An unused latent has the prior as its posterior.
        """
        deviation = thumbnails(images, self.shape) - self._means_of(labels, len(images))
        explained = self.loadings.square().sum(0)
        mean = deviation @ (self.loadings / self.variances)
        log_variance = torch.where(explained > 0, (self.residual / self.variances).log(), 0.0).expand_as(mean)
        return mean.float(), log_variance.float()

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None, Tensor]:
        """Latents ``[n, L]``, labels ``[n]`` and the images float32 ``[n, C, H, W]`` that the model makes of them."""
        device = self.means.device
        z = torch.randn(n, self.loadings.shape[1], generator=generator, dtype=torch.float64).to(device)
        labels = None
        if self.num_classes:
            weights = self.label_weights.cpu()
            labels = torch.multinomial(weights, n, replacement=True, generator=generator).to(device)
        thumbs = self._means_of(labels, n) + z @ self.loadings.T
        return z.float(), labels, enlarge(thumbs, self.shape, self.image_shape)

    def _means_of(self, labels: Tensor | None, n: int) -> Tensor:
        return self.means[torch.zeros(n, dtype=torch.int64) if labels is None or not self.num_classes else labels]


def _shape(images: Tensor) -> tuple[int, int, int]:
    channels, height, width = images.shape[1:]
    return channels, height, width


def _chunks(images: Tensor, shape: tuple[int, int, int]) -> Iterator[tuple[int, Tensor]]:
    if len(images) > _MAX_RECORDS:
        raise ValueError(f"{len(images)} records: the moments are exact up to {_MAX_RECORDS}; take a public subset")
    for start in range(0, len(images), _EXACT_ROWS):
        yield start, thumbnails(to_unit(images[start : start + _EXACT_ROWS]), shape)


def _clipped(rows: Tensor) -> Tensor:
    """Rows scaled to norm at most 1, the rounding of this very computation included."""
    norms = rows.norm(dim=1, keepdim=True)
    return rows * ((1 - 1e-9) / norms.clamp(min=1e-300)).clamp(max=1.0)
