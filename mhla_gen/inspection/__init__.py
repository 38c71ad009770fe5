"""Inspect a model: mixing matrices, induced attention maps, rank and entropy."""

from mhla_gen.inspection.attention_maps import watch
from mhla_gen.inspection.inspection import inspect
from mhla_gen.inspection.statistics import (
    effective_rank,
    head_statistics,
    numerical_rank,
    row_entropy,
)
from mhla_gen.inspection.weights import (
    BothHalves,
    ExactAttention,
    LayerAttention,
    MHLAAttention,
    SoftmaxAttention,
)

__all__ = [
    "BothHalves",
    "ExactAttention",
    "LayerAttention",
    "MHLAAttention",
    "SoftmaxAttention",
    "effective_rank",
    "head_statistics",
    "inspect",
    "numerical_rank",
    "row_entropy",
    "watch",
]
