"""The quickstart's scores for real images: what perfect samples would get."""

import numpy as np
from sklearn.model_selection import LeaveOneOut, cross_val_score
from sklearn.neighbors import KNeighborsClassifier

from mhla_gen.data import ArrayImages
from mhla_gen.evaluation.frechet import FeatureStatistics, frechet_distance
from mhla_gen.evaluation.nearest import NUM_NEIGHBOURS


def score_real(real: ArrayImages, samples_per_class: int, seed: int) -> dict[str, float]:
    """Scores of real images, on their pixels in [0, 1].

    Args:
        real: The real images.
        samples_per_class: Size of the small set; the distance grows as sets shrink.
        seed: Fixes which images are in which part.

    Returns:
        `class_accuracy`, each image judged by the others; `frechet_distance_halves`, between two
        random halves; `frechet_distance_same_size`, from as many real images as there are samples
        to the rest.
    """
    features = real.images.reshape(len(real), -1) / 255.0
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
