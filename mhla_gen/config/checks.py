"""Checks and normal forms that several configs share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard, cast

from mhla_gen.errors import UserError

LARGEST = 2**31 - 1
"""Larger whole numbers fit no dimension, and no C integer of the libraries that they reach."""


def elements(values: Any) -> tuple[Any, ...] | None:
    """The elements of a list or tuple; None for anything else, text included."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        return None
    return tuple(cast("Sequence[Any]", values))


def is_mapping(value: Any) -> TypeGuard[dict[str, Any]]:
    """Whether this is a mapping, as YAML and JSON have them."""
    return isinstance(value, dict)


def is_list(value: Any) -> TypeGuard[list[Any]]:
    """Whether this is a list, as YAML and JSON have them."""
    return isinstance(value, list)


def plain(value: Any) -> Any:
    """A value with lists for tuples, as JSON holds it."""
    listed = elements(value)
    return value if listed is None else [plain(each) for each in listed]


def is_whole(value: Any, least: int) -> bool:
    """Whether this is a whole number from `least` to `LARGEST`. True and false are none."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= LARGEST


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise UserError(f"{name} must be one of {', '.join(map(str, choices))}, found {value!r}")


def check_checkpointing(name: str, value: Any) -> None:
    """Raise unless `value` is true, false, selective or a number from 0 to 1."""
    if value != "selective" and not (isinstance(value, int | float) and 0 <= value <= 1):
        raise UserError(
            f"{name} must be true, false, selective or a number from 0 to 1, found {value!r}"
        )


def check_gate(name: str, gate: Any) -> None:
    """Raise unless `gate` is true, false, "head" or a rank."""
    if not (isinstance(gate, bool) or gate == "head" or is_whole(gate, 1)):
        raise UserError(
            f"{name} must be true, false, head or its rank (at least 1), found {gate!r}"
        )


def check_odd(name: str, number: int) -> None:
    """Raise unless `number` is odd."""
    if number % 2 == 0:
        raise UserError(f"{name} must be odd and positive, found {number}")


def normalize_integers(name: str, values: Any, least: int) -> tuple[int, ...]:
    """One to three integers, each at least `least`, as a tuple; raises for anything else."""
    integers = elements(values)
    if not integers or len(integers) > 3 or not all(is_whole(n, least) for n in integers):
        raise UserError(
            f"{name} must be 1 to 3 whole numbers of at least {least}, found {values!r}"
        )
    return integers


def normalize_paths(name: str, paths: Any) -> tuple[str, ...] | None:
    """A path or a list of paths as a tuple of strings; raises for anything else but None."""
    if paths is None:
        return None
    if isinstance(paths, str | Path):
        return (str(paths),)
    listed = elements(paths)
    if not listed:
        raise UserError(f"{name} must be a path or a list of paths, found {paths!r}")
    return tuple(str(path) for path in listed)


def normalize_layout(name: str, layout: Any) -> Any:
    """One to three block counts as a tuple, or "auto" as it is; raises for anything else."""
    if isinstance(layout, str) and layout == "auto":
        return layout
    counts = elements(layout)
    if not counts or len(counts) > 3 or not all(is_whole(n, 1) for n in counts):
        raise UserError(f'{name} must be "auto" or 1 to 3 positive block counts, found {layout!r}')
    return counts


def normalize_layers(name: str, layers: Any) -> Any:
    """Indices as a sorted tuple; "all", a fraction like "2/3" or a function as it is.

    Raises:
        ValueError: For anything else, and for no index or one twice.
    """
    if callable(layers):
        return layers
    message = f'{name} must be "all", a list of indices or a fraction like "2/3", found {layers!r}'
    if isinstance(layers, str):
        if layers == "all":
            return layers
        part, slash, whole = layers.partition("/")
        if not (slash and part.isdecimal() and whole.isdecimal() and 0 < int(part) <= int(whole)):
            raise UserError(message)
        return layers
    indices = elements(layers)
    if indices is None or not all(is_whole(i, 0) for i in indices):
        raise UserError(message)
    if not indices or len(set(indices)) != len(indices):
        raise UserError(message + " (empty or with duplicates)")
    return tuple(sorted(indices))


def normalize_classes(classes: Any, names: bool = False) -> Any:
    """Class numbers as a tuple, or "all" as it is; with `names`, names may stand among them.

    Raises:
        ValueError: For anything else.
    """
    if isinstance(classes, str) and classes == "all":
        return classes
    kinds = (int, str) if names else (int,)
    listed = (classes,) if isinstance(classes, kinds) else elements(classes)
    allowed = "class numbers and names" if names else "class numbers"
    if not listed or not all(is_whole(c, 0) or (names and isinstance(c, str)) for c in listed):
        raise UserError(f'classes must be "all" or a list of {allowed}, found {classes!r}')
    return listed
