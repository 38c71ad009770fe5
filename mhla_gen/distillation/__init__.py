"""Conversion of a pretrained softmax model: distillation of layers and of outputs."""

from mhla_gen.distillation.layers import LayerErrors, relative_error
from mhla_gen.distillation.losses import LayerLosses, OutputLosses
from mhla_gen.distillation.stages import convert, rehearse_conversion, stage_task
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
    "convert",
    "mhla_attentions",
    "rehearse_conversion",
    "relative_error",
    "softmax_twin",
    "stage_task",
    "train_only",
    "trained_names",
]
