"""How diffusers' pipelines call their transformers: what training, caches and inspection need.

A family is a table of what differs; a new one is a class of a few lines in `images.py`
or `videos.py`, found by the transformer that it names.
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
    """How a transformer, converted or not, or its class is called.

    Raises:
        ValueError: If nobody wrote it down.
    """
    kind = model if isinstance(model, type) else type(model)
    for call in CALLS:
        if issubclass(kind, call.base_class):
            return call
    names = ", ".join(call.base_class.__name__ for call in CALLS)
    raise UserError(f"nobody has said how a {kind.__name__} is called; known are {names}")


def call_class_of_pipeline(name: str | None) -> type[Call] | None:
    """How the transformer of a pipeline of this class is called; None if nobody wrote it down."""
    return next((call for call in CALLS if name is not None and call.pipeline == name), None)
