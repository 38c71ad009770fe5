"""How diffusers' pipelines call their transformers, for training, caching and inspection.

Each family has a class that lists what differs between families. To add one, write a class of a few
lines in `images.py` or `videos.py`; it is found by the transformer that it names.
"""

from typing import Any

from mhla_gen.calls import images, ltx, videos, wan
from mhla_gen.calls.call import Call, Embedded
from mhla_gen.errors import UserError

__all__ = ["CALLS", "Call", "Embedded", "call_class", "call_class_of_pipeline"]

CALLS: tuple[type[Call], ...] = (
    *images.CALLS,
    *ltx.CALLS,
    *videos.CALLS,
    *wan.CALLS,
)


def call_class(model: Any) -> type[Call]:
    """The `Call` class of a transformer, converted or not, or of its class.

    Raises:
        ValueError: If the transformer's calls are not described here.
    """
    kind = model if isinstance(model, type) else type(model)
    for call in CALLS:
        if issubclass(kind, call.base_class):
            return call
    names = ", ".join(call.base_class.__name__ for call in CALLS)
    raise UserError(f"calls of a {kind.__name__} are not supported; supported are {names}")


def call_class_of_pipeline(name: str | None) -> type[Call] | None:
    """The `Call` class of a pipeline class's transformer; None if it is not described here."""
    return next((call for call in CALLS if name is not None and call.pipeline == name), None)
