import numpy as np
import pytest
import torch

from mhla_gen.evaluation.errors import EvaluationError
from mhla_gen.evaluation.frechet import (
    FeatureStatistics,
    FeatureSums,
    FewSamplesWarning,
    frechet_distance,
)


def gaussian(mean, covariance, count=None):
    return FeatureStatistics(np.asarray(mean, float), np.asarray(covariance, float), count)


def features(count, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) @ shape + 1


def random_covariance(dim, rng):
    root = rng.normal(size=(dim, dim))
    return root @ root.T


def test_commuting_covariances_have_a_closed_form():
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(40, 40)))
    variances_a, variances_b = rng.uniform(0.1, 3, 40), rng.uniform(0.1, 3, 40)
    mean_a, mean_b = rng.normal(size=40), rng.normal(size=40)
    expected = ((mean_a - mean_b) ** 2).sum()
    expected += ((np.sqrt(variances_a) - np.sqrt(variances_b)) ** 2).sum()
    found = frechet_distance(
        gaussian(mean_a, basis @ np.diag(variances_a) @ basis.T),
        gaussian(mean_b, basis @ np.diag(variances_b) @ basis.T),
    )
    assert found == pytest.approx(expected, rel=1e-12)


def test_two_by_two_non_commuting_covariances_have_a_closed_form():
    # For 2×2 matrices tr sqrt(AB) = sqrt(tr(AB) + 2 sqrt(det(AB))).
    rng = np.random.default_rng(1)
    a, b = random_covariance(2, rng), random_covariance(2, rng)
    cross = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a) * np.linalg.det(b)))
    expected = np.trace(a) + np.trace(b) - 2 * cross
    found = frechet_distance(gaussian([0, 0], a), gaussian([0, 0], b))
    assert found == pytest.approx(expected, rel=1e-10)


def test_distance_to_a_transported_gaussian():
    # T symmetric positive definite is the optimal map from N(0, A) to N(0, TAT):
    # the distance is tr((I - T) A (I - T)).
    rng = np.random.default_rng(2)
    a, transport = random_covariance(30, rng), random_covariance(30, rng) / 30
    rest = np.eye(30) - transport
    found = frechet_distance(
        gaussian(np.zeros(30), a), gaussian(np.zeros(30), transport @ a @ transport)
    )
    assert found == pytest.approx(np.trace(rest @ a @ rest), rel=1e-9)


@pytest.mark.parametrize("count", [2, 20, 64, 65, 500])
@pytest.mark.filterwarnings("ignore::mhla_gen.evaluation.frechet.FewSamplesWarning")
def test_distance_to_itself_is_zero(count):
    statistics = FeatureStatistics.from_features(features(count, 64))
    scale = np.trace(statistics.covariance)
    assert abs(frechet_distance(statistics, statistics)) < 1e-12 * scale


def test_distance_is_symmetric_and_unchanged_by_rotation():
    a, b = features(200, 32, seed=1), features(150, 32, seed=2)
    rotation, _ = torch.linalg.qr(features(32, 32, seed=3))
    distance = frechet_distance(*map(FeatureStatistics.from_features, (a, b)))
    swapped = frechet_distance(*map(FeatureStatistics.from_features, (b, a)))
    rotated = frechet_distance(*map(FeatureStatistics.from_features, (a @ rotation, b @ rotation)))
    assert swapped == pytest.approx(distance, rel=1e-12)
    assert rotated == pytest.approx(distance, rel=1e-10)


@pytest.mark.parametrize("count_a, count_b", [(30, 50), (10, 900), (2, 3), (512, 513)])
def test_fewer_samples_than_dimensions_is_exact(count_a, count_b):
    dim = 512
    a, b = features(count_a, dim, seed=1), features(count_b, dim, seed=2)
    with pytest.warns(FewSamplesWarning, match="use more samples"):
        found = frechet_distance(*map(FeatureStatistics.from_features, (a, b)))
    # Centred samples are factors of their covariance: no covariance, no eigenvalue.
    centred = [(x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b)]
    expected = (a.mean(0) - b.mean(0)).square().sum() + sum(x.square().sum() for x in centred)
    expected -= 2 * torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    assert found == pytest.approx(expected.item(), rel=1e-9)


def test_singular_covariance_without_a_count():
    # The same subspace, known only from the covariance.
    x = features(20, 64)
    known = FeatureStatistics.from_features(x)
    unknown = FeatureStatistics(known.mean, known.covariance, None)
    assert abs(frechet_distance(unknown, unknown)) < 1e-10 * np.trace(known.covariance)


def test_streaming_equals_one_pass():
    x = features(1000, 24)
    whole = FeatureStatistics.from_features(x)
    np.testing.assert_allclose(whole.mean, x.mean(0), rtol=1e-13)
    np.testing.assert_allclose(whole.covariance, np.cov(x.T), rtol=1e-10, atol=1e-10)
    sums = FeatureSums(24)
    for batch in x.split(37):
        sums.add(batch)
    streamed = sums.statistics()
    assert streamed.count == 1000
    np.testing.assert_allclose(streamed.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(streamed.covariance, whole.covariance, rtol=1e-10, atol=1e-10)


def test_a_large_mean_costs_no_digits():
    x = features(300, 8)
    shifted = FeatureStatistics.from_features(x + 1e6)
    np.testing.assert_allclose(
        shifted.covariance, FeatureStatistics.from_features(x).covariance, rtol=1e-7, atol=1e-7
    )


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: FeatureStatistics.from_features(torch.ones(1, 4)), "at least 2 samples, found 1"),
        (lambda: FeatureStatistics.from_features(torch.ones(3)), r"\[count, dim\]"),
        (lambda: FeatureStatistics.from_features(torch.full((3, 2), torch.nan)), "3 of 3 features"),
        (lambda: gaussian([0, 1], np.eye(3)), "covariance"),
        (lambda: gaussian([0, np.nan], np.eye(2)), "NaN"),
        (lambda: frechet_distance(gaussian([0], [[1]]), gaussian([0, 0], np.eye(2))), "1 and 2"),
        (lambda: FeatureSums(3).add(torch.ones(2, 4)), "3 dimensions, found 4"),
    ],
)
def test_unusable_features_and_statistics_are_refused(make, message):
    with pytest.raises(EvaluationError, match=message):
        make()
