"""The class of a saved model: whether a folder holds what is asked of it."""

from collections.abc import Iterable, Mapping
from typing import Any

import diffusers

import mhla_gen
from mhla_gen.errors import UserError

# Early DiT and PixArt models were saved under it.
_FORMER_CLASS = "Transformer2DModel"


def check_saved_class(
    wanted: type, place: Any, saved: Mapping[str, Any], variants: Iterable[type] = ()
) -> None:
    """Raise if a folder holds a model of another class, which a library would try to build.

    Args:
        wanted: The class that is asked to load it.
        place: The folder, or name on the hub, for the error.
        saved: Its config.json.
        variants: Further classes whose models it loads, beside those that it inherits from.

    Raises:
        UserError: Naming the class and what loads it.
    """
    name = str(saved.get("_class_name") or next(iter(saved.get("architectures") or ()), ""))
    own = {each.__name__ for each in (*wanted.__mro__, *variants)} | {_FORMER_CLASS}
    ours = hasattr(mhla_gen, name)
    # A class that neither library has may be a user's own, derived from the one wanted.
    if name in own or not (ours or hasattr(diffusers, name)):
        return
    # Not at the top: the families use this file.
    from mhla_gen.models.families import MHLA_CLASSES

    converted = {base.__name__: mhla_class.__name__ for base, mhla_class in MHLA_CLASSES.items()}
    if name in converted:
        remedy = f"convert it with mhla_gen.{converted[name]}.from_base"
    else:
        remedy = f"load it with {'mhla_gen' if ours else 'diffusers'}.{name}.from_pretrained"
    raise UserError(f"{place} holds the class {name}, not {wanted.__name__}; {remedy}")
