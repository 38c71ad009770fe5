"""What a run trains: the same for every family of models."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from mhla_gen.config import PreviewConfig, TrainConfig
from mhla_gen.data import TrainingData
from mhla_gen.errors import NotFiniteError
from mhla_gen.training.conditioning import Conditioning
from mhla_gen.training.objectives import Objective
from mhla_gen.training.step import Losses, ObjectiveLosses


@dataclass(frozen=True, eq=False)
class Task:
    """Everything that the loop needs to know about a family of models."""

    model: Any
    """The transformer."""
    objective: Objective
    """What it learns to predict."""
    conditioning: Conditioning
    """How it is called."""
    pipeline: Callable[[Any], DiffusionPipeline]
    """The trained transformer → what samples from it and is saved."""
    summary: str
    """The data, for a rehearsal."""
    gathered: tuple[str, ...] = ()
    """Classes of modules, besides the blocks, that are called by themselves: where processes share
    a model, these are gathered by themselves."""
    reused: tuple[str, ...] = ()
    """Names of modules of which a part is called again later: these stay gathered until their
    backward pass."""
    sampler: Callable[[Any, Sequence[int], PreviewConfig], np.ndarray] | None = None
    """Pipeline, numbers of samples and their settings → uint8 `[images, (frames,) height, width,
    channels]`; None for a model that previews show no samples of."""
    samples: str = "images"
    """What the samples are called where they are counted."""
    fps: float = 16.0
    """Frames per second of clips that previews show."""
    losses: Losses | None = None
    """What a step minimises; None is the loss of the objective."""
    any_length: bool = False
    """Whether captions are only as long as the longest of a batch."""
    finished: Callable[[Any], Any] | None = None
    """The trained transformer → the one that is saved; None saves it as it is."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Settings of `mhla-gen sample` that are saved with the pipeline: they hold where a user gives
    nothing else."""
    examples: Callable[[Any, Path], None] | None = None
    """Pipeline and a folder → writes a prompt there for a first sample; see
    `mhla_gen.hub.example_settings`. None for a pipeline that takes no prompts."""

    @property
    def step_losses(self) -> Losses:
        """What a step minimises."""
        return self.losses or ObjectiveLosses(self.objective, self.conditioning)


def preview_pixels(numbers: Sequence[int], images: np.ndarray) -> np.ndarray:
    """Samples in [0, 1] as uint8.

    Args:
        numbers: Of the samples.
        images: `[samples, …]`.

    Raises:
        NotFiniteError: If one is NaN or infinite somewhere.
    """
    for number, image in zip(numbers, images, strict=True):
        if not np.isfinite(image).all():
            raise NotFiniteError(f"sample {number} of the EMA weights is not finite")
    return np.round(images * 255).astype(np.uint8)


def largest_bucket(data: TrainingData) -> int:
    """The bucket with the most samples."""
    return max(range(len(data.buckets)), key=lambda number: len(data.buckets[number]))


def times(shape: Sequence[int]) -> str:
    """A shape in words."""
    return " × ".join(map(str, shape))


BuildTask = Callable[[TrainConfig, TrainingData], Task]
