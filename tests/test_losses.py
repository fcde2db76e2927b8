"""Losses against torch.distributions, and the bounds that tie them together."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence

from dp2vae_fast.vae.losses import gaussian_kl, negative_elbo, negative_iwae, reconstruction


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_reconstruction_is_the_negative_log_likelihood_of_each_record():
    output, binary = random(3, 2, 4, 4), (random(3, 2, 4, 4, seed=1) > 0).double()
    expected = -Bernoulli(logits=output).log_prob(binary).flatten(1).sum(1)
    torch.testing.assert_close(reconstruction(output, binary, "bernoulli"), expected)
    grey = random(3, 2, 4, 4, seed=2)
    constant = 32 * 0.5 * math.log(2 * math.pi)
    expected = -Normal(output, 1.0).log_prob(grey).flatten(1).sum(1) - constant
    torch.testing.assert_close(reconstruction(output, grey, "gaussian"), expected)


def test_kl_is_that_of_diagonal_gaussians():
    mean, log_variance = random(5, 3), random(5, 3, seed=1)
    posterior = Normal(mean, (0.5 * log_variance).exp())
    expected = kl_divergence(posterior, Normal(torch.zeros(()).double(), 1.0)).sum(1)
    torch.testing.assert_close(gaussian_kl(mean, log_variance), expected)


def test_beta_weighs_the_kl_divergence():
    output, images, mean, log_variance = (
        random(3, 1, 2, 2),
        random(3, 1, 2, 2, seed=1),
        random(3, 2),
        random(3, 2, seed=2),
    )
    losses = [
        negative_elbo(output, images, mean, log_variance, likelihood="gaussian", beta=beta) for beta in (0.0, 1.0, 3.0)
    ]
    torch.testing.assert_close(losses[0], reconstruction(output, images, "gaussian"))
    torch.testing.assert_close(losses[2] - losses[0], 3 * (losses[1] - losses[0]))


@pytest.mark.parametrize("k", [1, 7])
def test_iwae_is_the_log_mean_of_importance_weights(k):
    mean, log_variance = random(4, 3), 0.3 * random(4, 3, seed=1)
    posterior = Normal(mean.unsqueeze(1), (0.5 * log_variance).exp().unsqueeze(1))
    z = posterior.mean + posterior.stddev * random(4, k, 3, seed=2)
    missed = random(4, k, seed=3).square()
    prior = Normal(torch.zeros(()).double(), 1.0)
    weights = (-missed + (prior.log_prob(z) - posterior.log_prob(z)).sum(2)).exp()
    torch.testing.assert_close(negative_iwae(missed, z, mean, log_variance), -weights.mean(1).log())


def test_more_samples_tighten_the_bound_on_average():
    mean, log_variance = torch.zeros(1, 2).double(), torch.zeros(1, 2).double() - 1
    z = mean.unsqueeze(1) + (0.5 * log_variance).exp().unsqueeze(1) * random(20000, 8, 2)
    missed = 2 * (z - 1).square().sum(2)
    posterior = (mean.expand(20000, 2), log_variance.expand(20000, 2))
    one = negative_iwae(missed[:, :1], z[:, :1], *posterior).mean()
    eight = negative_iwae(missed, z, *posterior).mean()
    exact = -torch.tensor(math.log(0.2) - 2 * 2 / 5 * 1.0)  # log of the integral of exp(-2 (z - 1)^2) N(z; 0, 1), twice
    assert one > eight > exact - 0.05
