"""Checks and normal forms that several configs share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mhla_gen.errors import UserError


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise UserError(f"{name} must be one of {', '.join(map(str, choices))}, found {value!r}")


def check_share(name: str, share: Any) -> None:
    """Raise unless `share` is true, false or a number from 0 to 1."""
    if not isinstance(share, int | float) or not 0 <= share <= 1:
        raise UserError(f"{name} must be true, false or a number from 0 to 1, found {share!r}")


def check_gate(gate: Any) -> None:
    """Raise unless `gate` is true, false, "head" or a rank."""
    rank = isinstance(gate, int) and gate >= 1
    if not (isinstance(gate, bool) or gate == "head" or rank):
        raise UserError(f"gate must be true, false, head or its rank (at least 1), found {gate!r}")


def normalize_integers(name: str, values: Any, least: int) -> tuple[int, ...]:
    """One to three integers, each at least `least`, as a tuple."""
    integers = isinstance(values, Sequence) and not isinstance(values, str) and 0 < len(values) < 4
    if not integers or any(
        not isinstance(n, int) or isinstance(n, bool) or n < least for n in values
    ):
        raise UserError(
            f"{name} must be 1 to 3 whole numbers of at least {least}, found {values!r}"
        )
    return tuple(values)


def normalize_paths(name: str, paths: Any) -> tuple[str, ...] | None:
    """A path or a list of paths as a tuple of strings."""
    if paths is None:
        return None
    if isinstance(paths, str | Path):
        return (str(paths),)
    if not isinstance(paths, Sequence) or not paths:
        raise UserError(f"{name} must be a path or a list of paths, found {paths!r}")
    return tuple(str(path) for path in paths)


def normalize_layout(layout: Any) -> Any:
    """One to three block counts as a tuple, or "auto" as it is."""
    if isinstance(layout, str) and layout == "auto":
        return layout
    message = f'layout must be "auto" or 1 to 3 positive block counts, found {layout!r}'
    if not isinstance(layout, Sequence) or isinstance(layout, str) or not 1 <= len(layout) <= 3:
        raise UserError(message)
    if any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in layout):
        raise UserError(message)
    return tuple(layout)


def normalize_layers(layers: Any) -> Any:
    """Indices as a sorted tuple; "all", a fraction like "2/3" or a function as it is."""
    if callable(layers):
        return layers
    message = f'layers must be "all", a list of indices or a fraction like "2/3", found {layers!r}'
    if isinstance(layers, str):
        if layers == "all":
            return layers
        part, slash, whole = layers.partition("/")
        if not (slash and part.isdecimal() and whole.isdecimal() and 0 < int(part) <= int(whole)):
            raise UserError(message)
        return layers
    if not isinstance(layers, Sequence):
        raise UserError(message)
    if any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in layers):
        raise UserError(message)
    if not layers or len(set(layers)) != len(layers):
        raise UserError(message + " (empty or with duplicates)")
    return tuple(sorted(layers))


def normalize_classes(classes: Any, names: bool = False) -> Any:
    """Class numbers as a tuple, or "all" as it is; with `names`, names may stand among them."""
    if isinstance(classes, str) and classes == "all":
        return classes
    kinds = (int, str) if names else (int,)
    listed = [classes] if isinstance(classes, kinds) else classes
    allowed = "class numbers and names" if names else "class numbers"
    message = f'classes must be "all" or a list of {allowed}, found {classes!r}'
    if not isinstance(listed, Sequence) or isinstance(listed, str) or not listed:
        raise UserError(message)
    for c in listed:
        if not isinstance(c, kinds) or isinstance(c, bool) or (isinstance(c, int) and c < 0):
            raise UserError(message)
    return tuple(listed)
