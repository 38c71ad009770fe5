"""From settings to a model and a pipeline."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)

from mhla_gen.config import ModelConfig
from mhla_gen.models import MHLADiTTransformer2DModel
from mhla_gen.sampling.pipeline import ClassConditionalPipeline
from mhla_gen.training.initialization import initialize_dit


def build_model(
    config: ModelConfig, image_shape: Sequence[int], num_classes: int
) -> DiTTransformer2DModel:
    """A new DiT with softmax, linear or MHLA attention, initialised as DiT is.

    Args:
        config: Sizes and attention.
        image_shape: `(channels, height, width)` of its input.
        num_classes: Classes, not counting "no class".

    Raises:
        ValueError: If patches do not tile the image, or the layout is larger than the token grid.
    """
    channels, height, _ = image_shape
    if height % config.patch_size:
        raise ValueError(
            f"model.patch_size {config.patch_size} does not divide the image size {height}"
        )
    sizes: dict[str, Any] = {
        "num_attention_heads": config.num_attention_heads,
        "attention_head_dim": config.attention_head_dim,
        "in_channels": channels,
        "num_layers": config.num_layers,
        "sample_size": height,
        "patch_size": config.patch_size,
        "num_embeds_ada_norm": num_classes,
    }
    if config.attention == "softmax":
        model = DiTTransformer2DModel(**sizes)
    else:
        one_block = config.attention == "linear"
        mhla = replace(config.mhla, layout=(1, 1)) if one_block else config.mhla
        model = MHLADiTTransformer2DModel(**sizes, mhla=mhla)
    initialize_dit(model)
    return model


def build_pipeline(
    model: DiTTransformer2DModel, class_names: Sequence[str]
) -> ClassConditionalPipeline:
    """The pipeline for a model trained by flow matching on pixels."""
    return ClassConditionalPipeline(
        transformer=model.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        class_names=class_names,
    )
