"""Scores and intervals against definitions written out here, and the torchmetrics classes."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import torchrun

from mhla_gen.evaluation import (
    FeatureStatistics,
    FrechetDistance,
    InceptionScore,
    KernelDistance,
    PrecisionRecall,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from mhla_gen.evaluation.errors import EvaluationError
from mhla_gen.evaluation.frechet import FewSamplesWarning
from mhla_gen.evaluation.intervals import jackknife_interval, subsampling_interval


def features(count, dim, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator) * scale


def adm_inception_score(logits, split_size):
    """ADM's evaluator: consecutive splits, marginal of each, mean of exponentials."""
    predictions = torch.softmax(logits.double(), dim=1).numpy()
    scores = []
    for start in range(0, len(predictions), split_size):
        part = predictions[start : start + split_size]
        divergence = part * (np.log(part) - np.log(part.mean(0, keepdims=True)))
        scores.append(np.exp(divergence.sum(1).mean()))
    return float(np.mean(scores))


def adm_precision_recall(samples, reference, k=3):
    """ADM's evaluator: squared distances; the k-th neighbour's index counts from the point itself.

    Its float16 rounding is left out, which moves published values in the third decimal.
    """

    def distances(a, b):
        return ((a[:, None] - b[None]) ** 2).sum(-1)

    def radii(x):
        return np.partition(distances(x, x), k, axis=1)[:, k]

    samples, reference = samples.double().numpy(), reference.double().numpy()
    between = distances(samples, reference)
    precision = (between <= radii(reference)[None, :]).any(axis=1).mean()
    recall = (between <= radii(samples)[:, None]).any(axis=0).mean()
    return precision, recall


def test_inception_score_is_adms_order_and_splits():
    logits = features(230, 30, scale=2)
    logits[:115, :5] += 4
    for split_size in (50, 115, 230, 5000):
        assert inception_score(logits, split_size)[0] == pytest.approx(
            adm_inception_score(logits, split_size), rel=1e-9
        )
    shuffled = logits[torch.randperm(230)]
    assert inception_score(shuffled, 115)[0] > 1.02 * inception_score(logits, 115)[0]
    assert inception_score(torch.zeros(8, 5))[0] == pytest.approx(1)
    assert inception_score(torch.eye(5) * 100)[0] == pytest.approx(5)


@pytest.mark.parametrize("samples, reference, dim", [(60, 40, 4), (40, 60, 24), (1100, 30, 3)])
def test_precision_and_recall_are_adms(samples, reference, dim):
    x, y = features(samples, dim, 1, 1.3) + 50, features(reference, dim, 2) + 50
    assert precision_recall(x, y) == pytest.approx(adm_precision_recall(x, y), abs=1e-12)


def test_precision_and_recall_at_their_ends():
    x = features(50, 8)
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x, x + 1000) == (0, 0)
    few = x[:5]
    assert precision_recall(few, x)[0] == 1
    with pytest.raises(EvaluationError, match="more than 3 images, the samples hold 3"):
        precision_recall(x[:3], x)


def test_kernel_distance_is_the_unbiased_estimate():
    x, y = features(12, 4, 1).double(), features(12, 4, 2).double() + 0.5
    found = kernel_distance(x, y, subsets=2, subset_size=12)

    def kernel(a, b):
        return ((a * b).sum() / 4 + 1) ** 3

    pairs = [(i, j) for i in range(12) for j in range(12)]
    within = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs if i != j) / 132
    between = sum(kernel(x[i], y[j]) for i, j in pairs) / 144
    assert found.mean == pytest.approx((within - 2 * between).item(), rel=1e-12)
    assert found.std < 1e-12
    assert subsampling_interval(found, 12) is None
    with pytest.raises(EvaluationError, match="lower kid_subset_size"):
        kernel_distance(x, y)


def test_kernel_distance_of_one_distribution_is_zero_on_average():
    values = [
        kernel_distance(features(60, 8, 2 * i), features(60, 8, 2 * i + 1), 1, 60).mean
        for i in range(200)
    ]
    assert abs(np.mean(values)) < 3 * np.std(values) / 200**0.5


def test_jackknife_intervals_cover_the_distance_at_this_count():
    truth = FeatureStatistics(np.zeros(4), np.eye(4), None)

    def distance(statistics):
        return frechet_distance(statistics, truth)

    draws = [jackknife_interval(features(200, 4, seed) * 1.5, distance) for seed in range(150)]
    expected = np.mean([value for value, _ in draws])
    covered = np.mean([interval.low <= expected <= interval.high for _, interval in draws])
    # 95 % nominal; 150 draws have a standard error of 1.8 points.
    assert 0.88 <= covered <= 1


@pytest.mark.parametrize("count", [190, 200])
def test_a_small_set_is_warned_of_by_its_own_size(count):
    """Without a group, 200 samples are 180 for 192 dimensions; nobody made 180."""
    truth = FeatureStatistics(np.zeros(192), np.eye(192), None)
    with pytest.warns(FewSamplesWarning) as caught:
        jackknife_interval(features(count, 192), lambda s: frechet_distance(s, truth))
    assert [str(each.message).split(":")[0] for each in caught] == [
        f"{count} samples for 192 dimensions"
    ]


def test_subsampling_intervals_cover_the_distance():
    draws = []
    for seed in range(120):
        found = kernel_distance(
            features(400, 4, seed) + 0.5, features(400, 4, seed + 1000), subsets=60, subset_size=100
        )
        draws.append((found.mean, subsampling_interval(found, 400)))
    values = [value for value, _ in draws]
    expected = np.mean(values)
    covered = np.mean([interval.low <= expected <= interval.high for _, interval in draws])
    assert 0.88 <= covered <= 1
    # Of both sides: with one reference for all draws the distance varies less than it says.
    told = np.mean([(interval.high - interval.low) / 2 / 1.96 for _, interval in draws])
    fixed = [
        kernel_distance(features(400, 4, seed) + 0.5, features(400, 4, 1), 60, 100).mean
        for seed in range(1000, 1120)
    ]
    assert told == pytest.approx(np.std(values), rel=0.2) and told > 1.15 * np.std(fixed)


def test_intervals_shrink_with_more_samples():
    truth = FeatureStatistics(np.zeros(4), np.eye(4), None)
    widths = []
    for count in (100, 10_000):
        _, interval = jackknife_interval(
            features(count, 4) * 1.5, lambda s: frechet_distance(s, truth)
        )
        widths.append(interval.high - interval.low)
    assert widths[1] < widths[0] / 4
    with pytest.raises(EvaluationError, match="at least 20 images, found 1"):
        jackknife_interval(features(1, 4), lambda s: frechet_distance(s, truth))


def test_metric_resets_keep_the_reference():
    metric = FrechetDistance(dim=3)
    metric.update(features(20, 3, 1), real=True)
    metric.update(features(20, 3, 2))
    first = metric.compute()
    metric.reset()
    metric.update(features(20, 3, 2))
    assert metric.compute() == first
    fixed = FrechetDistance(dim=3, reference=FeatureStatistics.from_features(features(20, 3, 1)))
    fixed.update(features(20, 3, 2))
    assert fixed.compute().item() == pytest.approx(first.item(), rel=1e-12)
    with pytest.raises(EvaluationError, match="fixed reference"):
        fixed.update(features(2, 3), real=True)


def test_metrics_refuse_nan_and_missing_dimensions():
    with pytest.raises(EvaluationError, match="an extractor, or dim"):
        FrechetDistance()
    with pytest.raises(EvaluationError, match="1 of 2 features are NaN"):
        FrechetDistance(dim=2).update(torch.tensor([[0.0, 1.0], [torch.nan, 0.0]]))


def all_metrics():
    return (
        FrechetDistance(dim=6),
        InceptionScore(split_size=20),
        KernelDistance(subsets=4, subset_size=10),
        PrecisionRecall(),
    )


def filled(metrics, samples, reference):
    distance, score, kernel, manifold = metrics
    score.update(samples)
    for metric in (distance, kernel, manifold):
        metric.update(samples)
        metric.update(reference, real=True)
    return [torch.as_tensor(metric.compute()).double().flatten() for metric in metrics]


def test_metrics_on_two_processes_equal_one(tmp_path):
    torchrun(2, __file__, tmp_path)
    expected = filled(all_metrics(), features(40, 6, 1), features(40, 6, 2))
    for rank in (0, 1):
        for found, value in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
            torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-9)


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    half = slice(rank * 20, rank * 20 + 20)
    found = filled(all_metrics(), features(40, 6, 1)[half], features(40, 6, 2)[half])
    torch.save(found, Path(sys.argv[1], f"{rank}.pt"))
    torch.distributed.destroy_process_group()
