"""The class of each sample of a set."""

from typing import Any

import numpy as np

from mhla_gen.errors import UserError


def class_labels(classes: Any, samples_per_class: int, num_classes: int) -> np.ndarray:
    """One label per sample, class after class; int64.

    Args:
        classes: "all" or class numbers.
        samples_per_class: Samples of each.
        num_classes: Classes that the model has.

    Raises:
        ValueError: If the model has no such class.
    """
    return np.repeat(_checked(classes, num_classes), samples_per_class)


def ordered_labels(
    classes: Any, num_samples: int, order: str, seed: int, num_classes: int
) -> np.ndarray:
    """Labels of a number of samples over all classes; int64.

    Args:
        classes: "all" or class numbers.
        num_samples: How many labels. The first n of them do not depend on it.
        order: balanced (one class after the other, in turn) or random (independent draws).
        seed: Fixes random draws.
        num_classes: Classes that the model has.

    Raises:
        ValueError: If the model has no such class.
    """
    numbers = _checked(classes, num_classes)
    if order == "balanced":
        return np.resize(numbers, num_samples)
    return np.random.default_rng(seed).choice(numbers, num_samples)


def _checked(classes: Any, num_classes: int) -> np.ndarray:
    everything = isinstance(classes, str) and classes == "all"
    chosen: Any = range(num_classes) if everything else classes
    for number in chosen:
        if not 0 <= number < num_classes:
            raise UserError(f"the model has classes 0…{num_classes - 1}, found {number} in classes")
    return np.asarray(chosen, dtype=np.int64)
