"""Conversion of a pretrained softmax model: distillation of layers and of outputs."""

from mhla_gen.distillation.layers import LayerErrors, relative_error
from mhla_gen.distillation.teacher import (
    mhla_attentions,
    softmax_twin,
    train_only,
    trained_names,
)

__all__ = [
    "LayerErrors",
    "mhla_attentions",
    "relative_error",
    "softmax_twin",
    "train_only",
    "trained_names",
]
