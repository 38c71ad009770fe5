"""Training of class-conditional diffusion transformers."""

from mhla_gen.training.build import build_model, build_pipeline
from mhla_gen.training.initialization import disable_label_dropout, initialize_dit
from mhla_gen.training.loop import rehearse, train
from mhla_gen.training.optim import build_optimizer, keep_mixing_in_range, parameter_groups

__all__ = [
    "build_model",
    "build_optimizer",
    "build_pipeline",
    "disable_label_dropout",
    "initialize_dit",
    "keep_mixing_in_range",
    "parameter_groups",
    "rehearse",
    "train",
]
