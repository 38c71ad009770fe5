"""Training of diffusion transformers.

Names are imported on first use: settings are checked without torch.
"""

from typing import TYPE_CHECKING

from mhla_gen.lazy import names_from

if TYPE_CHECKING:
    from mhla_gen.training.build import build_task
    from mhla_gen.training.dit import build_model
    from mhla_gen.training.initialization import disable_label_dropout, initialize_dit
    from mhla_gen.training.loop import train
    from mhla_gen.training.optim import build_optimizer, keep_mixing_in_range, parameter_groups
    from mhla_gen.training.rehearsal import rehearse
    from mhla_gen.training.task import Task

_HOMES = {
    "Task": "task",
    "build_model": "dit",
    "build_optimizer": "optim",
    "build_task": "build",
    "disable_label_dropout": "initialization",
    "initialize_dit": "initialization",
    "keep_mixing_in_range": "optim",
    "parameter_groups": "optim",
    "rehearse": "rehearsal",
    "train": "loop",
}

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

__getattr__ = names_from(__name__, _HOMES)
