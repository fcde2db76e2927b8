"""DP moments: exact sums, sensitivity at most 1 whatever the record, and the linear model they make."""

import math

import pytest
import torch

from dp2vae_fast.engine.keystream import Keystream
from dp2vae_fast.vae.data import load_images
from dp2vae_fast.vae.moments import (
    COUNT_WEIGHT,
    ClassMeans,
    LinearModel,
    class_means,
    covariance,
    enlarge,
    thumbnail_shape,
    thumbnails,
)

CLASSES, CENTER, RADIUS = 3, 0.25, 1.5


@pytest.fixture(scope="module")
def digits():
    return load_images("digits")


class Recorder:
    """Stands in for the noise stream: keeps the exact sum that noise would be added to."""

    def __init__(self):
        self.sums, self.std = [], None

    def add_noise_(self, tensors, std):
        self.sums += [t.clone() for t in tensors]
        self.std = std


def random_records(n, seed=0, shape=(1, 6, 5)):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, *shape), generator=generator, dtype=torch.uint8), torch.randint(
        CLASSES, (n,), generator=generator
    )


def mean_query(images, labels, radius=RADIUS):
    seen = Recorder()
    class_means(images, labels, CLASSES, center=CENTER, radius=radius, noise_multiplier=1.0, stream=seen)
    assert seen.std == 1.0
    return seen.sums[0]


def covariance_query(images, labels, radius=RADIUS):
    """The symmetric sum before noise, in units of the sensitivity: from the result without noise."""
    means = ClassMeans(torch.full((CLASSES, 30), 0.4, dtype=torch.float64), torch.ones(CLASSES, dtype=torch.float64))
    matrix = covariance(images, labels, means, radius=radius, noise_multiplier=0.0, stream=Recorder())
    return matrix * means.counts.sum() / radius**2


EXTREMES = {
    "black": torch.zeros(1, 1, 6, 5, dtype=torch.uint8),
    "white": torch.full((1, 1, 6, 5), 255, dtype=torch.uint8),
    "checkered": (torch.arange(30).reshape(1, 1, 6, 5) % 2 * 255).to(torch.uint8),
    "at the centre": torch.full((1, 1, 6, 5), 64, dtype=torch.uint8),
    "random": random_records(1, seed=9)[0],
}


@pytest.mark.parametrize("query", [mean_query, covariance_query])
@pytest.mark.parametrize("record", EXTREMES)
@pytest.mark.parametrize("radius", [1e-3, 0.5, RADIUS, 50.0])
def test_adding_a_record_moves_the_sum_by_at_most_the_sensitivity(query, record, radius):
    images, labels = random_records(500)
    before = query(images, labels, radius)
    after = query(torch.cat((images, EXTREMES[record])), torch.cat((labels, torch.tensor([1]))), radius)
    assert (after - before).norm() <= 1.0


@pytest.mark.parametrize("query", [mean_query, covariance_query])
def test_sums_are_exact_in_any_order(query):
    images, labels = random_records(5000)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    assert torch.equal(query(images, labels), query(images[order], labels[order]))


def test_means_are_those_of_the_records_where_nothing_is_clipped_or_noised():
    images, labels = random_records(300)
    found = class_means(images, labels, CLASSES, center=CENTER, radius=50.0, noise_multiplier=0.0, stream=Recorder())
    for k in range(CLASSES):
        expected = (images[labels == k].double() / 255).flatten(1).mean(0)
        torch.testing.assert_close(found.means[k], expected, rtol=0, atol=1e-6)
        assert float(found.counts[k]) == pytest.approx(int((labels == k).sum()), abs=1e-6)
    assert float(found.label_weights.sum()) == pytest.approx(1.0)


def test_covariance_is_that_of_the_records_where_nothing_is_clipped_or_noised():
    images, labels = random_records(300)
    means = class_means(images, labels, CLASSES, center=CENTER, radius=50.0, noise_multiplier=0.0, stream=Recorder())
    found = covariance(images, labels, means, radius=50.0, noise_multiplier=0.0, stream=Recorder())
    residuals = (images.double() / 255).flatten(1) - means.means[labels]
    torch.testing.assert_close(found, residuals.T @ residuals / 300, rtol=0, atol=1e-4)


def test_noise_has_the_stated_deviation():
    """The deviation of n draws is within 4 / sqrt(2 n) of the true one, but for one time in 16,000."""
    key, draws = Keystream.seeded(5), 200
    grey = torch.full((4, 1, 6, 5), 64, dtype=torch.uint8)  # its sums are zero: what is found is the noise alone
    query = dict(labels=torch.arange(4) % CLASSES, center=64 / 255, radius=1.0, noise_multiplier=1e-4)
    found = [class_means(grey, num_classes=CLASSES, stream=key.stream(f"m {i}"), **query) for i in range(draws)]
    noise = torch.stack([(f.means - 64 / 255) * f.counts[:, None] for f in found]) * math.sqrt(1 - COUNT_WEIGHT**2)
    assert float(noise.std()) == pytest.approx(1e-4, rel=4 / math.sqrt(2 * noise.numel()))
    images, labels = random_records(4)
    means = ClassMeans(torch.full((CLASSES, 30), 0.4, dtype=torch.float64), torch.full((CLASSES,), 1 / 3).double())
    query = dict(radius=1.0, noise_multiplier=7.0)
    clean = covariance(images, labels, means, radius=1.0, noise_multiplier=0.0, stream=Recorder())
    found = [covariance(images, labels, means, **query, stream=key.stream(f"c {i}")) for i in range(draws)]
    noise = torch.stack(found) - clean
    assert torch.equal(noise, noise.mT)
    above = noise[(slice(None), *torch.triu_indices(30, 30, offset=1))]
    assert float(above.std()) == pytest.approx(7 / math.sqrt(2), rel=4 / math.sqrt(2 * above.numel()))
    diagonal = noise.diagonal(dim1=1, dim2=2)
    assert float(diagonal.std()) == pytest.approx(7, rel=4 / math.sqrt(2 * diagonal.numel()))


def test_unlabelled_records_form_one_class():
    images, _ = random_records(50)
    found = class_means(images, None, 0, center=CENTER, radius=50.0, noise_multiplier=0.0, stream=Recorder())
    assert found.means.shape == (1, 30) and float(found.counts[0]) == pytest.approx(50)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1, 8, 8), (1, 8, 8)),
        ((1, 32, 32), (1, 32, 32)),
        ((1, 64, 64), (1, 32, 32)),
        ((3, 64, 64), (3, 16, 16)),
        ((3, 65, 30), (3, 17, 8)),
    ],
)
def test_thumbnails_are_small_area_means(shape, expected):
    assert thumbnail_shape(shape) == expected
    images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    thumbs = thumbnails(images, expected)
    rows, columns = (
        [slice(i * n // m, -(-(i + 1) * n // m)) for i in range(m)]
        for n, m in zip(shape[1:], expected[1:], strict=True)
    )
    areas = [images[..., row, column].double().mean((2, 3)) for row in rows for column in columns]
    means = torch.stack(areas, 2).flatten(1)
    torch.testing.assert_close(thumbs, means, rtol=0, atol=1e-14)  # means of at most 25 numbers below 1
    assert enlarge(thumbs, expected, shape).shape == images.shape


def test_the_linear_model_inverts_what_it_draws_and_its_posterior_averages_to_the_prior(digits):
    quiet = dict(noise_multiplier=0.0, stream=Recorder())
    means = class_means(digits.images, digits.labels, 10, center=CENTER, radius=10.0, **quiet)
    matrix = covariance(digits.images, digits.labels, means, radius=10.0, **quiet)
    model = LinearModel((1, 8, 8), 12, 10).set_moments(means, matrix)
    mean, log_variance = model(digits.images / 255, digits.labels)
    aggregate = mean.T.double() @ mean.double() / len(mean) + log_variance[0].double().exp().diag()
    torch.testing.assert_close(aggregate, torch.eye(12, dtype=torch.float64), rtol=0, atol=2e-3)
    _, _, images = model.draw(2000, torch.Generator().manual_seed(0))
    assert images.shape == (2000, 1, 8, 8) and 0 <= images.min() and images.max() <= 1
    faint = ClassMeans(0.5 + 0.1 * (means.means - 0.5), means.counts)
    model.set_moments(faint, matrix / 100)  # whose images need no clamping: the posterior mean is z, shrunk
    z, labels, images = model.draw(2000, torch.Generator().manual_seed(0))
    found, log_variance = model(images, labels)
    shrunk = z * (1 - log_variance.exp())
    # Rounded images: 64 pixels by 2^-25, times a column of at most 1 / (2 sqrt(residual)).
    error = 64**0.5 * 2**-25 / (2 * float(model.residual) ** 0.5)
    torch.testing.assert_close(found, shrunk, rtol=0, atol=1.1 * error)
    assert (log_variance < 0).all()


def test_latents_that_explain_nothing_keep_their_prior():
    means = ClassMeans(torch.full((1, 16), 0.5, dtype=torch.float64), torch.tensor([9.0], dtype=torch.float64))
    matrix = torch.diag(torch.tensor([4.0, 2.0] + [1.0] * 14, dtype=torch.float64))
    model = LinearModel((1, 4, 4), 20, 0).set_moments(means, matrix)
    mean, log_variance = model(torch.rand(3, 1, 4, 4))
    assert (mean[:, 2:] == 0).all() and (log_variance[:, 2:] == 0).all()
    assert mean[:, :2].abs().min() > 0 and (log_variance[:, :2] < 0).all()
