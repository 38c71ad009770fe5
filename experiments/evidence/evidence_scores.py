"""Metrics of one arm's samples against all real images."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evidence_data import Real, once
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from mhla_gen.config import FeaturesConfig
from mhla_gen.evaluation import (
    FeatureStatistics,
    build_extractor,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from mhla_gen.evaluation.intervals import jackknife_interval
from mhla_gen.files import written_whole

_BATCH = 256
_JACKKNIFE_GROUPS = 8
_KID_SUBSETS, _KID_SUBSET_SIZE = 50, 1000


class Judge:
    """Measures samples against the real images, on EfficientNet-Lite0 features and on pixels.

    Args:
        real: The real images.
        device: Where features and distances are computed.
        kept: File of their features, which is written if missing.
    """

    def __init__(self, real: Real, device: torch.device, kept: Path):
        self.real, self.device = real, device
        self.extractor = build_extractor(FeaturesConfig(extractor="efficientnet-lite0")).to(device)
        self.features = kept_features(kept, lambda: self.extract(real.images)).to(device)
        self.statistics = FeatureStatistics.from_features(self.features)
        self.classifier = make_pipeline(
            StandardScaler(), LogisticRegression(C=1e-3, max_iter=200)
        ).fit(self.features[: real.num_train].cpu(), real.labels[: real.num_train])
        self.pixels = _pixels(real.training()[0], device)
        nearest = nearest_distances(self.pixels, self.pixels, skip_self=True)
        self.copy_threshold = float(nearest.median())

    def extract(self, images: np.ndarray) -> Tensor:
        """Features `[images, 1280]`, float32, on the device."""
        batches = torch.from_numpy(images).movedim(-1, 1).split(_BATCH)
        return torch.cat([self.extractor(batch.to(self.device))["pool"] for batch in batches])

    def score(self, images: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """All metrics of samples that were drawn for `labels`."""
        features = self.extract(images)
        size = min(_KID_SUBSET_SIZE, len(images) // 2)
        kid = kernel_distance(features, self.features, _KID_SUBSETS, size)
        precision, recall = precision_recall(features, self.features, device=self.device)
        nearest = nearest_distances(_pixels(images, self.device), self.pixels)
        return {
            "samples": len(images),
            **distance_to(self.statistics, features.cpu()),
            "kid": kid.mean,
            "kid_spread": kid.std,
            "precision": precision,
            "recall": recall,
            "recognised": self.recognised(features, labels),
            "copies": float((nearest < self.copy_threshold).float().mean()),
        }

    def score_real(self) -> dict[str, Any]:
        """The same metrics for real images: between two halves, and of the held-out part."""
        images, labels = self.real.held_out()
        return {
            "images": len(self.features),
            "extractor": str(self.extractor.identity),
            "frechet_halves": distance_of_halves(self.features.cpu()),
            "recognised_held_out": self.recognised(self.features[-len(images) :], labels),
            "copy_threshold": self.copy_threshold,
        }

    def recognised(self, features: Tensor, labels: np.ndarray) -> float:
        """Share of images that the classifier of real images assigns to their intended class."""
        return float((self.classifier.predict(features.cpu()) == labels).mean())


def distance_to(real: FeatureStatistics, features: Tensor) -> dict[str, Any]:
    """Fréchet distance of samples to all real ones, and its interval over left-out samples."""
    distance, interval = jackknife_interval(
        features, lambda samples: frechet_distance(samples, real), _JACKKNIFE_GROUPS
    )
    return {"frechet": distance, "frechet_interval": asdict(interval)}


def distance_of_halves(features: Tensor) -> float:
    """Fréchet distance between two random halves of real images."""
    order = np.random.default_rng(0).permutation(len(features))
    halves = [features[torch.from_numpy(half)] for half in np.array_split(order, 2)]
    first, second = map(FeatureStatistics.from_features, halves)
    return frechet_distance(first, second)


def kept_features(path: Path, compute: Callable[[], Tensor]) -> Tensor:
    """Features of a file, on the CPU; the first of several processes computes and writes them."""

    def make() -> None:
        with written_whole(path) as partial:
            torch.save(compute().cpu(), partial)

    once(path, make)
    return torch.load(path, weights_only=True)


def _pixels(images: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(images).to(device).flatten(1).float().div_(255)


def nearest_distances(points: Tensor, others: Tensor, skip_self: bool = False) -> Tensor:
    """Root mean squared pixel difference to the nearest of `others`, in [0, 1].

    Args:
        points: `[count, pixels]`.
        others: `[others, pixels]`.
        skip_self: `points` are `others`: ignore each point itself; equal images count as one.
    """
    nearest = []
    for tile in points.split(1024):
        square = tile.square().sum(1, keepdim=True) + others.square().sum(1) - 2 * tile @ others.T
        distance = (square.clamp_min(0) / points.shape[1]).sqrt()
        if skip_self:
            # Because of rounding, equal images are not exactly 0 apart.
            distance = distance.where(distance > 1e-3, torch.inf)
        nearest.append(distance.amin(dim=1))
    return torch.cat(nearest)
