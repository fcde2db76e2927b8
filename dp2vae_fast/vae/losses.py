"""Losses of one record each, ``[N]``: what DP-SGD clips the gradients of. Nothing here mixes records."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def reconstruction(output: Tensor, images: Tensor, likelihood: str) -> Tensor:
    """Negative log-likelihood of the images, summed over pixels, up to a constant.

    ``bernoulli``: cross-entropy of the logits ``output`` with grey levels in [0, 1]; ``gaussian``: half the squared
    error (unit variance). Shapes: output, images ``[N, C, H, W]`` -> ``[N]``.
    """
    if likelihood == "bernoulli":
        pixels = F.binary_cross_entropy_with_logits(output, images, reduction="none")
    else:
        pixels = 0.5 * (output - images).square()
    return pixels.flatten(1).sum(1)


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence from N(mean, diag exp(log_variance)) to the prior N(0, I): ``[N, L], [N, L] -> [N]``."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)


def negative_elbo(
    output: Tensor, images: Tensor, mean: Tensor, log_variance: Tensor, *, likelihood: str, beta: float = 1.0
) -> Tensor:
    """Reconstruction plus beta times the KL divergence: the beta-VAE's loss (beta = 1: the VAE's). ``[N]``."""
    return reconstruction(output, images, likelihood) + beta * gaussian_kl(mean, log_variance)


def negative_iwae(reconstructions: Tensor, z: Tensor, mean: Tensor, log_variance: Tensor, beta: float = 1.0) -> Tensor:
    """The importance-weighted bound of K samples (Burda, Grosse and Salakhutdinov 2016), negated.

    ``-log (1/K) sum_k exp(-reconstructions_k + beta (log p(z_k) - log q(z_k | x)))``; K = 1 and beta = 1 give a
    one-sample estimate of the ELBO.

    Shapes: reconstructions ``[N, K]``; z ``[N, K, L]``; mean, log_variance ``[N, L]`` -> ``[N]``.
    """
    mean, log_variance = mean.unsqueeze(1), log_variance.unsqueeze(1)
    log_ratio = 0.5 * ((z - mean).square() / log_variance.exp() + log_variance - z.square()).sum(2)
    weights = -reconstructions + beta * log_ratio
    return math.log(weights.shape[1]) - torch.logsumexp(weights, dim=1)
