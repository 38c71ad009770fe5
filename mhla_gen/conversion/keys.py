"""What all formats share: renaming of weights, and the result of reading a checkpoint."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mhla_gen.errors import UserError

_BLOCK = re.compile(r"(?<=blocks\.)\d+")
_MIXING = ".mhla.mixing"


@dataclass(frozen=True)
class Converted:
    """A model of ours that is equivalent to a checkpoint."""

    model_class: Any
    """A diffusers class or one of ours."""
    arguments: dict[str, Any]
    """What it is built with."""
    state: dict[str, Tensor]
    """Its weights, by our names."""
    source: dict[str, Tensor]
    """The checkpoint's weights, by its names: what writing `state` back must give."""
    differences: tuple[str, ...] = ()
    """Where the model computes something else than the code that made the checkpoint."""


def rename(key: str, names: Mapping[str, str]) -> str | None:
    """Translate the name of a weight.

    Args:
        key: Name of a tensor.
        names: Names of modules or tensors, `{}` in place of a block's number, and what they become.

    Returns:
        The new name, or None if `names` has no entry for it.
    """
    pattern = _BLOCK.sub("{}", key)
    module, _, leaf = pattern.rpartition(".")
    if pattern in names:
        new = names[pattern]
    elif module in names:
        new = f"{names[module]}.{leaf}"
    else:
        return None
    return new.format(*_BLOCK.findall(key))


def translated(
    state: Mapping[str, Tensor], names: Mapping[str, str], kind: str
) -> dict[str, Tensor]:
    """Weights by their new names; in the authors' code a mixing matrix is a 1 × 1 convolution.

    Args:
        state: Weights by their old names.
        names: As for `rename`.
        kind: What the weights should be.

    Raises:
        ValueError: If `names` does not have all of them.
    """
    new_names = {key: rename(key, names) for key in state}
    refuse_unknown([key for key, new in new_names.items() if new is None], kind)
    found: dict[str, Tensor] = {}
    for key, new in new_names.items():
        assert new is not None
        tensor = state[key]
        if new.endswith(_MIXING):
            tensor = tensor[:, :, 0, 0]
        elif key.endswith(_MIXING):
            tensor = tensor[:, :, None, None]
        found[new] = tensor
    return found


def inverse(names: Mapping[str, str]) -> dict[str, str]:
    """The translation back."""
    back = {new: old for old, new in names.items()}
    assert len(back) == len(names)
    return back


def shape(state: Mapping[str, Tensor], key: str, kind: str) -> tuple[int, ...]:
    """Shape of a weight that every checkpoint of a format has.

    Raises:
        ValueError: If it is not there.
    """
    if key not in state:
        raise UserError(f"not {kind}: the weight {key} is missing")
    return tuple(state[key].shape)


def refuse_unknown(keys: Collection[str], kind: str) -> None:
    """Refuse weights that a format does not have.

    Raises:
        ValueError: If there are any; they are named.
    """
    if keys:
        raise UserError(f"not {kind}, which has no {few(keys)}")


def few(keys: Collection[str]) -> str:
    """The first names, and how many more there are."""
    first = ", ".join(sorted(keys)[:3])
    return first + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def refuse_other_settings(found: Mapping[str, Any], needed: Mapping[str, Any], kind: str) -> None:
    """Refuse settings that a format cannot express.

    Raises:
        ValueError: If one differs; the first is named with both values.
    """
    for name, value in needed.items():
        if found[name] != value:
            raise UserError(f"{kind} always has {name}={value}, but the model has {found[name]}")
