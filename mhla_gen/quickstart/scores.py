"""Do the samples show their class, are they new, and how far is their distribution?"""

from dataclasses import dataclass

import numpy as np
from sklearn.model_selection import LeaveOneOut, cross_val_score
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from mhla_gen.data import ArrayImages
from mhla_gen.evaluation.frechet import FeatureStatistics, frechet_distance

FEATURE_SPACE = "raw pixels in [0, 1]"
NUM_NEIGHBOURS = 5


def pixel_features(images: np.ndarray) -> np.ndarray:
    """uint8 images `[images, height, width, channels]` as float64 rows in [0, 1]."""
    return images.reshape(len(images), -1) / 255.0


@dataclass(frozen=True)
class Scores:
    """What is measured of a set of labelled images against the real ones."""

    class_accuracy: float
    """Share of images whose 5 nearest real images vote for their label."""
    copy_share: float
    """Share of images nearer to a real one than any two real images of that class are."""
    frechet_distance: float
    """To the real images, in the feature space of raw pixels."""


def score(images: np.ndarray, labels: np.ndarray, real: ArrayImages) -> Scores:
    """Compare generated images with the real ones.

    Args:
        images: uint8 `[images, height, width, channels]`.
        labels: The class that each was asked to show.
        real: The real images.
    """
    features, real_features = pixel_features(images), pixel_features(real.images)
    judge = KNeighborsClassifier(NUM_NEIGHBOURS).fit(real_features, real.labels)
    nearest, _ = NearestNeighbors(n_neighbors=1).fit(real_features).kneighbors(features)
    closest = closest_pairs(real)
    return Scores(
        class_accuracy=float((judge.predict(features) == labels).mean()),
        copy_share=float((nearest[:, 0] < closest[labels]).mean()),
        frechet_distance=_distance(features, real_features),
    )


def closest_pairs(real: ArrayImages) -> np.ndarray:
    """Distance of the two nearest distinct images of each class `[classes]`."""
    features = pixel_features(real.images)
    distances = []
    for label in range(len(real.class_names)):
        # Equal images are one image: distance 0 would call nothing a copy.
        distinct = np.unique(features[real.labels == label], axis=0)
        pairs, _ = NearestNeighbors(n_neighbors=2).fit(distinct).kneighbors(distinct)
        distances.append(pairs[:, 1].min())
    return np.array(distances)


def score_real(real: ArrayImages, samples_per_class: int, seed: int) -> dict[str, float]:
    """The same numbers for real images: what perfect samples would get.

    Args:
        real: The real images.
        samples_per_class: Size of the small set; the distance grows as sets shrink.
        seed: Fixes which images are in which part.

    Returns:
        `class_accuracy`, each image judged by the others; `frechet_distance_halves`, between two
        random halves; `frechet_distance_same_size`, from as many real images as there are samples
        to the rest.
    """
    features = pixel_features(real.images)
    order = np.random.default_rng(seed).permutation(len(real))
    half = len(order) // 2
    small = np.concatenate(
        [order[real.labels[order] == c][:samples_per_class] for c in range(len(real.class_names))]
    )
    rest = np.setdiff1d(order, small)
    judge = KNeighborsClassifier(NUM_NEIGHBOURS)
    votes = cross_val_score(judge, features, real.labels, cv=LeaveOneOut())
    return {
        "class_accuracy": float(votes.mean()),
        "frechet_distance_halves": _distance(features[order[:half]], features[order[half:]]),
        "frechet_distance_same_size": _distance(features[small], features[rest]),
    }


def _distance(first: np.ndarray, second: np.ndarray) -> float:
    return frechet_distance(
        FeatureStatistics.from_features(first), FeatureStatistics.from_features(second)
    )
