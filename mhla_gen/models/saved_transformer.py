"""Load a transformer as the class named in its config."""

from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

from mhla_gen.config.checks import is_mapping
from mhla_gen.errors import MissingError, UserError
from mhla_gen.files.saved import DamagedFileError, naming_damage
from mhla_gen.hub import locate_part
from mhla_gen.models.families import MHLA_CLASSES

_CLASSES: dict[str, Any] = {c.__name__: c for pair in MHLA_CLASSES.items() for c in pair}
# Diffusers' DiTs on the hub were saved as this class, before DiT had a separate class.
_FORMER_CLASS = "Transformer2DModel"


def load_transformer(
    path: str, subfolder: str = "transformer", dtype: torch.dtype = torch.float32
) -> Any:
    """A transformer of a supported family, converted or not.

    Args:
        path: A folder that `save_pretrained` wrote, of a transformer or a pipeline; a training run
            with a pipeline; or a name on the Hugging Face hub.
        subfolder: Name of the transformer in a pipeline.
        dtype: Dtype of its weights.

    Raises:
        FileNotFoundError: If no model is found.
        ValueError: If it is not a transformer, or its class is not supported.
    """
    place, location = locate_part(path, subfolder)
    found = _saved_class(place, location)
    with naming_damage(place):
        return found.from_pretrained(place, torch_dtype=dtype, **location)


def transformer_class(path: str, subfolder: str = "transformer") -> Any:
    """The class that `load_transformer` would load.

    Raises:
        FileNotFoundError: As `load_transformer`.
        ValueError: As `load_transformer`.
    """
    return _saved_class(*locate_part(path, subfolder))


def _saved_class(place: str, location: dict[str, Any]) -> Any:
    try:
        config: Any = DiTTransformer2DModel.load_config(place, **location)
    except OSError as error:
        missing = "is not a folder here, and the hub has no such model, or cannot be reached"
        what = "holds no model" if Path(place).is_dir() else missing
        raise MissingError(f"{place} {what}: {str(error).splitlines()[0]}") from error
    if not is_mapping(config) or "_class_name" not in config:
        file = Path(place, *location.values(), "config.json")
        raise DamagedFileError(file, "it names no class", "save, copy or download the model again")
    name = config.get("_class_name")
    if name == _FORMER_CLASS and config.get("norm_type") == "ada_norm_zero":
        name = DiTTransformer2DModel.__name__
    if name not in _CLASSES:
        raise UserError(f"{place} is a {name}; known are {', '.join(sorted(_CLASSES))}")
    return _CLASSES[name]
