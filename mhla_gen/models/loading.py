"""Load a transformer by the class that its config names."""

from typing import Any

from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

from mhla_gen.hub import is_pipeline
from mhla_gen.models.injection import MHLA_CLASSES

_CLASSES: dict[str, Any] = {c.__name__: c for pair in MHLA_CLASSES.items() for c in pair}
# The class that diffusers' own DiTs on the hub were saved with, before they had one of their own.
_FORMER_CLASS = "Transformer2DModel"


def load_transformer(name_or_path: str, subfolder: str = "transformer", **kwargs: Any) -> Any:
    """A transformer of a supported family, converted or not.

    Args:
        name_or_path: Folder that `save_pretrained` wrote, or a name on the Hugging Face hub; of a
            transformer, or of a pipeline.
        subfolder: Which transformer of a pipeline.
        kwargs: Passed to `from_pretrained` of its class (`revision`, `torch_dtype`, …).

    Raises:
        ValueError: If there is none, or it is of a class that the toolkit does not know.
    """
    location = {"subfolder": subfolder} if is_pipeline(name_or_path) else {}
    where = {k: kwargs[k] for k in ("revision", "cache_dir", "token") if k in kwargs}
    known = _saved_class(name_or_path, {**location, **where})
    return known.from_pretrained(name_or_path, **location, **kwargs)


def transformer_class(name_or_path: str, subfolder: str = "transformer") -> Any:
    """The class that `load_transformer` would load.

    Raises:
        ValueError: As `load_transformer`.
    """
    location = {"subfolder": subfolder} if is_pipeline(name_or_path) else {}
    return _saved_class(name_or_path, location)


def _saved_class(name_or_path: str, location: dict[str, Any]) -> Any:
    try:
        config: Any = DiTTransformer2DModel.load_config(name_or_path, **location)
    except OSError as error:
        line = str(error).splitlines()[0]
        raise ValueError(f"{name_or_path} holds no transformer of diffusers: {line}") from error
    name = config.get("_class_name")
    if name == _FORMER_CLASS and config.get("norm_type") == "ada_norm_zero":
        name = DiTTransformer2DModel.__name__
    if name not in _CLASSES:
        raise ValueError(f"{name_or_path} is a {name}; known are {', '.join(sorted(_CLASSES))}")
    return _CLASSES[name]
