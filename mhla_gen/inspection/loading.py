"""Find the model in a folder: a saved model, a saved pipeline, or one of our runs."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file

from mhla_gen.config import ConfigError, TrainConfig, load_config
from mhla_gen.data import load_data
from mhla_gen.files import CONFIG_NAME
from mhla_gen.models.family import Family
from mhla_gen.models.injection import MHLA_CLASSES
from mhla_gen.training.build import build_task
from mhla_gen.training.checkpoints import checkpoints

_CLASSES: dict[str, Any] = {c.__name__: c for pair in MHLA_CLASSES.items() for c in pair}


@dataclass(frozen=True, eq=False)
class Subject:
    """A loaded transformer and what is known about it."""

    model: Any
    family: Family
    source: Path
    """Folder that the weights came from."""
    note: str = ""
    """What a reader should know about the weights."""
    scheduler: Any | None = None
    """The pipeline's scheduler, which says how noise is added; None where none was saved."""


def load_subject(folder: str | Path, component: str, dtype: torch.dtype) -> Subject:
    """Load the transformer that a folder holds, on the CPU, in evaluation mode.

    Args:
        folder: A model or pipeline that `save_pretrained` wrote; a run of train or quickstart,
            of which the pipeline is taken, or while it lasts the newest checkpoint; a checkpoint.
        component: Which transformer of a pipeline.
        dtype: Of the weights.

    Returns:
        The model with its family.

    Raises:
        FileNotFoundError: If there is no such folder, or nothing in it to load.
        ValueError: If what it holds is no transformer that the toolkit knows.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder; give one that save_pretrained wrote, or a run of train"
        )
    if (folder / "model_index.json").is_file():
        return _load_pipeline(folder, component, dtype)
    if (folder / "config.json").is_file():
        return _load_model(folder, dtype)
    if (folder / "pipeline" / "model_index.json").is_file():
        return _load_pipeline(folder / "pipeline", component, dtype)
    found = list(checkpoints(folder).values()) or [folder]
    if (found[-1] / "model.safetensors").is_file() and (found[-1] / CONFIG_NAME).is_file():
        return _load_checkpoint(found[-1], dtype)
    raise FileNotFoundError(
        f"{folder} holds neither a saved model (config.json), a saved pipeline (model_index.json), "
        "nor a run of ours with a pipeline or a checkpoint in one file"
    )


def family_of(model: Any) -> Family:
    """The family of a transformer, converted or not.

    Raises:
        ValueError: If it has none.
    """
    for base, mhla_class in MHLA_CLASSES.items():
        if isinstance(model, base):
            known: Any = mhla_class
            return known.family
    raise ValueError(f"inspect knows {', '.join(_CLASSES)}; found a {type(model).__name__}")


def _load_pipeline(folder: Path, component: str, dtype: torch.dtype) -> Subject:
    index = json.loads((folder / "model_index.json").read_text())
    if not (folder / component / "config.json").is_file():
        names = [k for k, v in index.items() if "transformer" in k and isinstance(v, list)]
        raise ValueError(
            f"the pipeline {folder} has no component {component!r}; "
            f"its transformers: {', '.join(names) or 'none'}"
        )
    subject = _load_model(folder / component, dtype)
    _, name = index.get("scheduler") or (None, None)
    if name is None:
        return subject
    scheduler = getattr(diffusers, name).from_pretrained(folder, subfolder="scheduler")
    return replace(subject, scheduler=scheduler)


def _load_model(folder: Path, dtype: torch.dtype) -> Subject:
    name = json.loads((folder / "config.json").read_text()).get("_class_name")
    if name not in _CLASSES:
        raise ValueError(f"{folder} holds a {name}; inspect knows {', '.join(_CLASSES)}")
    model = _CLASSES[name].from_pretrained(folder, torch_dtype=dtype)
    return Subject(model.eval(), family_of(model), folder)


def _load_checkpoint(folder: Path, dtype: torch.dtype) -> Subject:
    try:
        config = load_config(folder / CONFIG_NAME, schema=TrainConfig)
    except ConfigError as error:
        raise ValueError(f"{folder} was not written by `mhla-gen train`: {error}") from error
    task = build_task(config.without_stages, load_data(config.data))
    model: Any = task.model
    model.load_state_dict(load_file(folder / "model.safetensors"))
    scheduler = task.objective.scheduler()
    note = "weights of the last optimizer step, not their average"
    return Subject(model.to(dtype).eval(), family_of(model), folder, note, scheduler)
