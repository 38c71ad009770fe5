"""Pixels as features, and what the nearest images of a labelled reference say."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mhla_gen.config import EvaluateConfig, FeaturesConfig
from mhla_gen.data.arrays import digits
from mhla_gen.evaluation import (
    FeatureStatistics,
    FrechetDistance,
    build_extractor,
    evaluate,
    frechet_distance,
)
from mhla_gen.evaluation.errors import EvaluationError


@pytest.fixture
def settings(tmp_path):
    real = digits()
    np.savez(tmp_path / "real.npz", arr_0=real.images, labels=real.labels)
    np.savez(tmp_path / "some.npz", arr_0=real.images[::7], labels=real.labels[::7])
    np.savez(tmp_path / "bare.npz", arr_0=real.images[::7])
    return EvaluateConfig(
        samples=str(tmp_path / "some.npz"),
        reference=str(tmp_path / "real.npz"),
        metrics=("fd", "accuracy", "copies"),
        features=FeaturesConfig(extractor="pixels", cache_dir=str(tmp_path / "cache")),
        out=str(tmp_path / "metrics.json"),
    )


def values(config):
    return {result.metric: result.value for result in evaluate(config)}


def test_grey_images_are_as_far_apart_as_their_one_channel_says(settings):
    real = digits().images.reshape(-1, 64) / 255
    sides = (FeatureStatistics.from_features(x) for x in (real[::7], real))
    assert values(settings)["fd"] == pytest.approx(frechet_distance(*sides), rel=1e-4)


def test_copies_and_noise_are_told_from_each_other(settings, tmp_path):
    found = values(settings)
    assert found["copies"] == 1 and found["accuracy"] > 0.95
    shape = digits().images[::7].shape
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.savez(tmp_path / "noise.npz", arr_0=noise, labels=digits().labels[::7])
    found = values(replace(settings, samples=str(tmp_path / "noise.npz")))
    assert found["copies"] == 0 and found["accuracy"] < 0.3


def test_every_seventh_label_shifted_costs_as_much(settings, tmp_path):
    labels = digits().labels[::7].copy()
    right = values(settings)["accuracy"]
    labels[::7] = (labels[::7] + 1) % 10
    np.savez(tmp_path / "wrong.npz", arr_0=digits().images[::7], labels=labels)
    wrong = values(replace(settings, samples=str(tmp_path / "wrong.npz")))["accuracy"]
    assert right - wrong == pytest.approx(len(labels[::7]) / len(labels), abs=0.02)


@pytest.mark.parametrize("side", ["samples", "reference"])
def test_labels_that_are_missing_are_named_before_anything_is_measured(settings, side, tmp_path):
    bare = replace(settings, **{side: str(tmp_path / "bare.npz")})
    with pytest.raises(EvaluationError, match="no labels, which accuracy and copies need"):
        evaluate(bare)
    assert not (tmp_path / "metrics.json").exists()
    assert values(replace(bare, metrics=("fd",)))["fd"] >= 0


def test_labels_that_do_not_fit_are_refused(settings, tmp_path):
    np.savez(tmp_path / "odd.npz", arr_0=digits().images[:9], labels=np.arange(8))
    with pytest.raises(EvaluationError, match="a class number for each of 9 images"):
        evaluate(replace(settings, samples=str(tmp_path / "odd.npz")))


def test_pixels_have_no_weights_and_dimensions_with_the_first_images():
    with pytest.raises(ValueError, match="has no weights"):
        build_extractor(FeaturesConfig(extractor="pixels", weights="a.pth"))
    extractor = build_extractor(FeaturesConfig(extractor="pixels"))
    with pytest.raises(EvaluationError, match="needs an extractor, or dim"):
        FrechetDistance(extractor)
    metric = FrechetDistance(extractor, dim=3 * 4 * 4)
    batch = torch.randint(0, 256, (60, 3, 4, 4), dtype=torch.uint8)
    metric.update(batch)
    metric.update(batch, real=True)
    assert metric.compute() == 0 and extractor.dims == {"pool": 48}
