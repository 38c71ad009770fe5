"""Loading a pipeline: from a training run, a folder, or the Hugging Face hub."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from mhla_gen.config import SampleConfig
from mhla_gen.errors import MissingError, UserError
from mhla_gen.files.saved import naming_damage, read_json
from mhla_gen.hub import INDEX_NAME, locate
from mhla_gen.models import load_adapter
from mhla_gen.pipelines.class_conditional import ClassConditionalPipeline
from mhla_gen.pipelines.schedulers import prediction_of
from mhla_gen.sampling.own_settings import with_defaults, with_own

# Parts of Wan's pipelines.
_PRECISE = {"vae": torch.float32, "image_encoder": torch.float32}
# Of files on the hub, all that `save_pretrained` writes.
_SAVED = ("*.json", "*.safetensors", "*.txt", "*.model")


def load_pipeline(path: str, dtype: torch.dtype) -> Any:
    """The pipeline of a path or name, on the CPU.

    diffusers' own `DiTPipeline` becomes our class-conditional pipeline, which does more with the
    same parts.

    Args:
        path: Run of `mhla-gen train`, of which the pipeline is taken, or while it lasts that of the
            newest checkpoint; one of its checkpoints; a folder that `save_pretrained` wrote; or a
            name on the hub.
        dtype: Of the models. Wan's VAE and image encoder stay float32, as its makers use them.

    Raises:
        FileNotFoundError: If there is nothing to load.
        ValueError: If what is there is no pipeline of this version of diffusers.
        DamagedFileError: Naming a file that is cut or emptied.
    """
    return _load(_folder_of(path), dtype)


def load_with_settings(config: SampleConfig) -> tuple[SampleConfig, Any]:
    """The pipeline of a config, with its adapter, and all settings to sample from it.

    Returns:
        The config with the settings of the run that saved the pipeline, or the pipeline's own,
        where it gives none; and the pipeline, on the CPU.

    Raises:
        FileNotFoundError: As `load_pipeline`.
        ValueError: As `load_pipeline`, or if the adapter belongs to another model.
    """
    folder = _folder_of(config.pipeline)
    config = with_own(config, folder)
    pipeline = _load(folder, getattr(torch, str(config.dtype)))
    if config.adapter is not None:
        load_adapter(pipeline, config.adapter)
    return with_defaults(config, pipeline), pipeline


def _folder_of(path: str) -> Path:
    """The folder of a pipeline; fetched from the hub if it is there and nowhere else."""
    place = locate(path, newest=True)
    folder = Path(place) if Path(place).is_dir() else _downloaded(place)
    if not (folder / INDEX_NAME).is_file():
        raise MissingError(f"pipeline={path} is only a part of a pipeline, without {INDEX_NAME}")
    return folder


def _load(folder: Path, dtype: torch.dtype) -> Any:
    with naming_damage(folder):
        return _loaded(folder, dtype)


def _loaded(folder: Path, dtype: torch.dtype) -> Any:
    index = read_json(folder / INDEX_NAME, "save or download the pipeline again")
    name = index.get("_class_name", "")
    if name == ClassConditionalPipeline.__name__:
        found = ClassConditionalPipeline
    else:
        found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, DiffusionPipeline)):
        raise UserError(f"{folder}: diffusers {diffusers.__version__} has no pipeline {name!r}")
    # Components that were saved as missing have to be named as missing.
    absent = {key: None for key, value in index.items() if value == [None, None]}
    precise = _PRECISE | {"default": dtype} if name.startswith("Wan") else dtype
    try:
        pipeline = found.from_pretrained(folder, dtype=precise, **absent)
    except (KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{folder} is not a complete {name}: {error}") from error
    if name == "DiTPipeline":
        return class_conditional(pipeline, index.get("id2label") or {})
    return pipeline


def class_conditional(
    pipeline: Any, id2label: Mapping[str, str] | None = None
) -> ClassConditionalPipeline:
    """Our pipeline from the parts of diffusers' `DiTPipeline`.

    Args:
        pipeline: A `DiTPipeline`.
        id2label: Names by class number, which it does not keep in order.
    """
    names = [str(label) for label in range(pipeline.transformer.config.num_embeds_ada_norm)]
    for number, text in (id2label or {}).items():
        names[int(number)] = text
    return ClassConditionalPipeline(
        pipeline.transformer,
        pipeline.scheduler,
        vae=pipeline.vae,
        class_names=names,
        prediction_type=prediction_of(pipeline.scheduler),
    )


def _downloaded(name: str) -> Path:
    """A folder with a pipeline of the hub, fetched unless it is in the cache.

    Raises:
        FileNotFoundError: If the hub has none of this name, or cannot be reached.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        index = json.loads(Path(hf_hub_download(name, INDEX_NAME)).read_bytes())
        libraries = {value[0] for value in index.values() if isinstance(value, list)}
        if libraries <= {"diffusers", "transformers", None}:
            return Path(DiffusionPipeline.download(name))
        # diffusers refuses to fetch components of other packages, such as our transformers.
        return Path(snapshot_download(name, allow_patterns=list(_SAVED)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MissingError(
            f"pipeline={name} is not a folder here, and the hub has no such pipeline: {reason}"
        ) from error
