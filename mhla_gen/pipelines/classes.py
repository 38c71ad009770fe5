"""Classes of a model, by their numbers or names."""

import difflib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mhla_gen.errors import UserError

Classes = int | str | Sequence[int | str] | Tensor

# Names that a message about an unknown one lists.
_SHOWN = 5


def label_tensor(classes: Classes, class_names: Sequence[str], num_classes: int) -> Tensor:
    """Labels as a model takes them, int64 `[batch]`.

    Args:
        classes: Class numbers or names, or one of them.
        class_names: Names of all classes that the model has.
        num_classes: How many there are.

    Raises:
        ValueError: If they are no list of classes of the model.
    """
    if isinstance(classes, int | str):
        classes = [classes]
    if not isinstance(classes, Tensor):
        classes = torch.as_tensor(class_numbers(classes, class_names))
    if classes.ndim != 1 or classes.is_floating_point() or not len(classes):
        raise UserError(
            f"class_labels must be a list of class numbers or names, found {classes.tolist()}"
        )
    if classes.min() < 0 or classes.max() >= num_classes:
        raise UserError(
            f"class_labels must be in 0…{num_classes - 1}, found {classes.min()}…{classes.max()}"
        )
    return classes.long()


def class_numbers(classes: Any, class_names: Sequence[str]) -> Any:
    """Class numbers for names; "all" stays as it is.

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
    if not any(isinstance(c, str) for c in classes):
        return tuple(classes)
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
        raise UserError(f"the model has no class {name!r}; {hint}")
    return by_name[name.casefold()]
