"""Which class each sample of a set shows."""

import difflib
from collections.abc import Sequence
from typing import Any

import numpy as np

# Names that a message about an unknown one lists.
_SHOWN = 5


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


def class_numbers(classes: Any, class_names: Sequence[str]) -> Any:
    """Classes with numbers in place of names; "all" as it is.

    A name means the class of that name; case does not count, and of names with commas, as ImageNet
    has them, one part is enough.

    Args:
        classes: "all", or class numbers and names.
        class_names: Names of all classes that the model has.

    Raises:
        ValueError: If a name is unknown.
    """
    if isinstance(classes, str) and classes == "all":
        return classes
    by_name: dict[str, int] = {}
    for number, name in reversed(list(enumerate(class_names))):
        by_name |= {part.strip().casefold(): number for part in name.split(",")}
    by_name |= {name.casefold(): number for number, name in enumerate(class_names)}
    return tuple(_number_of(c, by_name) if isinstance(c, str) else c for c in classes)


def _number_of(name: str, by_name: dict[str, int]) -> int:
    if name.casefold() not in by_name:
        close = difflib.get_close_matches(name.casefold(), by_name, n=1)
        some = ", ".join(sorted(by_name)[:_SHOWN])
        hint = f"did you mean {close[0]!r}?" if close else f"among its classes are {some}"
        raise ValueError(f"the model has no class {name!r}; {hint}")
    return by_name[name.casefold()]


def _checked(classes: Any, num_classes: int) -> np.ndarray:
    everything = isinstance(classes, str) and classes == "all"
    chosen: Any = range(num_classes) if everything else classes
    for number in chosen:
        if not 0 <= number < num_classes:
            raise ValueError(
                f"the model has classes 0…{num_classes - 1}, found {number} in classes"
            )
    return np.asarray(chosen, dtype=np.int64)
