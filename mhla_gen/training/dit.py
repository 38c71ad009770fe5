"""A DiT for images of classes: the model, and what it learns."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

from mhla_gen.config import ModelConfig, ObjectiveConfig, PreviewConfig, TrainConfig
from mhla_gen.data import TrainingData
from mhla_gen.data.caching.cached import CachedLatents
from mhla_gen.errors import UserError
from mhla_gen.models.families.dit import disable_label_dropout
from mhla_gen.pipelines.class_conditional import ClassConditionalPipeline
from mhla_gen.pipelines.noise import generator_of, sample_seed
from mhla_gen.training.conditioning import ClassLabels
from mhla_gen.training.ddpm import DDPM
from mhla_gen.training.initialization import initialize_dit
from mhla_gen.training.new_model import new_transformer
from mhla_gen.training.objectives import FlowMatching, Objective
from mhla_gen.training.pretrained import pretrained_dit
from mhla_gen.training.task import Task, preview_pixels


def dit_task(config: TrainConfig, data: TrainingData) -> Task:
    """A DiT for images of classes.

    Args:
        config: Settings.
        data: Images with class labels, or a cache of their latents.

    Raises:
        ValueError: If settings, data and a pretrained model do not fit together.
    """
    class_names = data.class_names
    if class_names is None:
        raise UserError(
            "the data have no class labels, which a DiT needs; a model that learns from captions "
            "has wan or transformer in its config"
        )
    if len(data.sample_shapes[0]) != 3:
        raise UserError(
            f"a DiT learns images, the data are {list(data.sample_shapes[0])}, latents of clips: "
            "cache images with an autoencoder of images"
        )
    objective = build_objective(config.objective)
    shape = data.sample_shapes[0]
    model = build_model(config.model, shape, len(class_names), objective.out_channels(shape[0]))

    # Now rather than at the end: a run whose samples cannot be decoded should not start.
    vae = data.autoencoder() if isinstance(data, CachedLatents) else None

    def pipeline(model: Any) -> ClassConditionalPipeline:
        return ClassConditionalPipeline(
            transformer=model,
            scheduler=objective.scheduler(),
            vae=vae,
            class_names=class_names,
            prediction_type=objective.prediction_type,
        )

    return Task(
        model=model,
        objective=objective,
        conditioning=ClassLabels(len(class_names)),
        pipeline=pipeline,
        sampler=class_samples,
        sampling=config.samples.of_pipeline,
        # The output layer asks the first block's embedder for its condition.
        reused=("transformer_blocks.0",),
        summary=f"{len(data)} images of {len(class_names)} classes, {list(shape)}",
    )


def build_model(
    config: ModelConfig,
    image_shape: Sequence[int],
    num_classes: int,
    out_channels: int | None = None,
) -> DiTTransformer2DModel:
    """A DiT with softmax, linear or MHLA attention: new and initialised as DiT is, or pretrained.

    Args:
        config: Sizes and attention.
        image_shape: `(channels, height, width)` of its input, pixels or latents.
        num_classes: Classes, not counting "no class".
        out_channels: Channels of its output; None takes those of its input.

    Raises:
        ValueError: If patches do not tile the image, the layout is larger than the token grid, or a
            pretrained model does not fit.
    """
    channels, height, width = image_shape
    out_channels = out_channels or channels
    if height != width:
        raise UserError(f"a DiT takes square images, the data are {height} × {width}")
    if config.pretrained is not None:
        model = pretrained_dit(config, tuple(image_shape), num_classes, out_channels)
        disable_label_dropout(model)
        return model
    if height % config.sizes.patch_size:
        raise UserError(
            f"model.patch_size {config.sizes.patch_size} does not divide the image size {height}"
        )
    _, _, num_heads, head_dim = config.sizes
    if num_heads * head_dim % 4:
        raise UserError(
            "model.num_attention_heads × model.attention_head_dim must be a multiple of 4, for "
            f"sines and cosines of two axes, found {num_heads} × {head_dim}"
        )
    sizes: dict[str, Any] = {
        **config.sizes._asdict(),
        "in_channels": channels,
        "out_channels": out_channels,
        "sample_size": height,
        "num_embeds_ada_norm": num_classes,
    }
    model = new_transformer(config, DiTTransformer2DModel, sizes, "the sizes in model")
    initialize_dit(model)
    return model


def build_objective(config: ObjectiveConfig) -> Objective:
    """The objective of a config."""
    if config.name == "ddpm":
        return DDPM(config.prediction, config.learned_variance, config.min_snr_gamma)
    return FlowMatching(config.logit_mean, config.logit_std, config.shift, config.min_snr_gamma)


def class_samples(pipeline: Any, numbers: Sequence[int], config: PreviewConfig) -> np.ndarray:
    """Images of a class-conditional pipeline, class after class; see `Task.sampler`."""
    device = pipeline.transformer.device
    pipeline.to(device)
    generators = [generator_of(sample_seed(config.seed, number)) for number in numbers]
    images = pipeline(
        [number % pipeline.num_classes for number in numbers],
        **config.of_pipeline,
        generator=generators,
        output_type="np",
    ).images
    return preview_pixels(numbers, images)
