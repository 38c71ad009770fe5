"""The model to inspect, from a saved model or pipeline, or a run."""

from dataclasses import dataclass
from typing import Any

import diffusers
import torch

from mhla_gen.hub import locate, locate_part, pipeline_index
from mhla_gen.models.families import family_of
from mhla_gen.models.family import Family
from mhla_gen.models.saved_transformer import load_transformer


@dataclass(frozen=True, eq=False)
class Subject:
    """A loaded transformer and what is known about it."""

    model: Any
    family: Family
    place: str
    """Folder of the model or its pipeline, or name on the hub."""
    source: str
    """The same, with the folder of the weights in a pipeline."""
    scheduler: Any | None = None
    """The pipeline's scheduler, which says how noise is added; None where none was saved."""


def load_subject(path: str, component: str, dtype: torch.dtype) -> Subject:
    """Load the transformer of a path or name, on the CPU, in evaluation mode.

    Args:
        path: A model or pipeline that `save_pretrained` wrote, in a folder or on the hub; a run of
            ours, of which the pipeline is taken, or while it lasts that of the newest checkpoint; a
            checkpoint.
        component: Which transformer of a pipeline.
        dtype: Of the weights.

    Raises:
        FileNotFoundError: If there is nothing to load.
        ValueError: If it is no transformer that the toolkit knows.
    """
    place, location = locate_part(locate(path, newest=True), component)
    model = load_transformer(place, component, dtype)
    source = "/".join([place, *location.values()])
    return Subject(model.eval(), family_of(model), place, source, _scheduler(place))


def _scheduler(place: str) -> Any | None:
    _, name = pipeline_index(place).get("scheduler") or (None, None)
    if name is None:
        return None
    return getattr(diffusers, name).from_pretrained(place, subfolder="scheduler")
