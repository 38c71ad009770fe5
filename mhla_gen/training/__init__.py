"""Training of diffusion transformers."""

from mhla_gen.training.build import build_model, build_task
from mhla_gen.training.initialization import disable_label_dropout, initialize_dit
from mhla_gen.training.loop import train
from mhla_gen.training.optim import build_optimizer, keep_mixing_in_range, parameter_groups
from mhla_gen.training.rehearsal import rehearse
from mhla_gen.training.task import Task

__all__ = [
    "Task",
    "build_model",
    "build_optimizer",
    "build_task",
    "disable_label_dropout",
    "initialize_dit",
    "keep_mixing_in_range",
    "parameter_groups",
    "rehearse",
    "train",
]
