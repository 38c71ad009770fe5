"""Distillation of a pretrained softmax model into MHLA: of its layers, then of its output."""

from mhla_gen.distillation.layers import LayerErrors, relative_error, relative_token_error
from mhla_gen.distillation.losses import LayerLosses, OutputLosses
from mhla_gen.distillation.stages import distill, rehearse_distillation
from mhla_gen.distillation.teacher import (
    mhla_attentions,
    softmax_twin,
    train_only,
    trained_names,
)

__all__ = [
    "LayerErrors",
    "LayerLosses",
    "OutputLosses",
    "distill",
    "mhla_attentions",
    "rehearse_distillation",
    "relative_error",
    "relative_token_error",
    "softmax_twin",
    "train_only",
    "trained_names",
]
