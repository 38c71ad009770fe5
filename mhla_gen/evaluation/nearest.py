"""What the nearest images of a labelled reference say of samples: their class, and copies."""

from typing import Any, cast

import numpy as np
from sklearn import neighbors  # pyright: ignore[reportMissingTypeStubs]
from torch import Tensor

NUM_NEIGHBOURS = 5

# scikit-learn states no types.
_neighbors = cast(Any, neighbors)


def class_accuracy(
    samples: Tensor, labels: np.ndarray, reference: Tensor, reference_labels: np.ndarray
) -> float:
    """Share of samples whose 5 nearest reference images vote for the class they were asked for.

    Args:
        samples: Features [count, dim].
        labels: The class that each was asked to show.
        reference: Features [count, dim].
        reference_labels: The class of each.
    """
    judge = _neighbors.KNeighborsClassifier(min(NUM_NEIGHBOURS, len(reference)))
    judge.fit(reference.double().numpy(), reference_labels)
    return float((judge.predict(samples.double().numpy()) == labels).mean())


def copy_share(
    samples: Tensor, labels: np.ndarray, reference: Tensor, reference_labels: np.ndarray
) -> float:
    """Share of samples nearer to a reference image than any two of those of their class are.

    Arguments are those of `class_accuracy`.
    """
    found = _neighbors.NearestNeighbors(n_neighbors=1).fit(reference.double().numpy())
    nearest: np.ndarray = found.kneighbors(samples.double().numpy())[0][:, 0]
    closest = closest_pairs(reference, reference_labels)
    return float((nearest < [closest.get(label, 0.0) for label in labels.tolist()]).mean())


def closest_pairs(reference: Tensor, labels: np.ndarray) -> dict[int, float]:
    """Distance of the two nearest distinct images of each class that has two."""
    distances: dict[int, float] = {}
    for label in np.unique(labels).tolist():
        # Equal images are one image: distance 0 would call nothing a copy.
        distinct = np.unique(reference.double().numpy()[labels == label], axis=0)
        if len(distinct) > 1:
            pairs = _neighbors.NearestNeighbors(n_neighbors=2).fit(distinct).kneighbors(distinct)[0]
            distances[label] = float(pairs[:, 1].min())
    return distances
