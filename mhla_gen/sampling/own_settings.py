"""Settings that the user leaves out: from the run that saved a pipeline, or the pipeline itself."""

import inspect
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open

from mhla_gen.config import SampleConfig
from mhla_gen.errors import UserError
from mhla_gen.files.saved import naming_damage, read_json
from mhla_gen.hub import ADAPTER_FOLDER, SAMPLING_NAME, adapter_file

_CALLED_WITH = ("num_inference_steps", "guidance_scale")
_SIZES = ("height", "width", "num_frames")
OWN = (*_CALLED_WITH, *_SIZES, "fps", "dtype")
"""Settings with defaults from the pipeline."""
FREE = ("output_dir", "batch_size", "device", "offload", "card")
"""A set may be resumed with other values of these: they do not change a sample."""
_FPS = 16.0
# safetensors' names of what `dtype` may be; weights of fewer bits are computed with in float32.
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def free_of(config: SampleConfig) -> tuple[str, ...]:
    """`FREE`, and settings left to the pipeline, which are not known before it is loaded."""
    return (*FREE, *(name for name in OWN if getattr(config, name) is None))


def with_own(config: SampleConfig, folder: Path) -> SampleConfig:
    """A config completed with the settings of the run that trained its adapter or pipeline.

    The dtype is that of the pipeline's weights if nothing else sets it.

    Args:
        config: As the user gave it.
        folder: Of the pipeline.

    Raises:
        UserError: If the file beside one of them holds anything else.
    """
    with naming_damage(folder):
        own = {"dtype": _saved_dtype(folder)} | settings_of_run(folder)
    if config.adapter is not None and (file := adapter_file(config.adapter)) is not None:
        own |= settings_of_run(file.parent)
    return _filled(config, own)


def settings_of_run(folder: Path) -> dict[str, Any]:
    """What a training run saved in the folder of its pipeline or adapter; empty without a run.

    Raises:
        UserError: If the file holds anything else.
    """
    path = folder / SAMPLING_NAME
    if not path.is_file() and folder.name == ADAPTER_FOLDER:
        # An adapter of an earlier version lies in the pipeline alone.
        path = folder.parent / SAMPLING_NAME
    remedy = f"set these settings yourself and remove it, or use another folder than {folder}"
    known = read_json(path, remedy) if path.is_file() else {}
    if unknown := sorted(known.keys() - set(OWN)):
        raise UserError(
            f"{path} has the keys {', '.join(unknown)}; known keys are {', '.join(OWN)}"
        )
    return known


def with_defaults(config: SampleConfig, pipeline: Any) -> SampleConfig:
    """A config completed with the defaults of a pipeline.

    Sizes stay out: of these a pipeline knows what it takes for None.
    """
    parameters = inspect.signature(pipeline.__call__).parameters
    defaults = {name: parameters[name].default for name in _CALLED_WITH if name in parameters}
    return _filled(config, {"num_inference_steps": 50, "fps": _FPS} | defaults)


def _filled(config: SampleConfig, values: dict[str, Any]) -> SampleConfig:
    missing = {name: value for name, value in values.items() if getattr(config, name) is None}
    return replace(config, **missing)


def _saved_dtype(folder: Path) -> str:
    """The dtype of most of a transformer's saved weights."""
    sizes: dict[str, int] = {}
    files = [*sorted(folder.glob("transformer/*.safetensors")), *folder.glob("unet/*.safetensors")]
    for path in files[:1]:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                kind = part.get_dtype()
                sizes[kind] = sizes.get(kind, 0) + math.prod(part.get_shape())
    most = max(sizes, key=lambda name: sizes[name], default="F32")
    return _DTYPES.get(most, "float32")
