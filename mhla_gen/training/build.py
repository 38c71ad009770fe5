"""From settings and data to a model, and to what it learns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from mhla_gen.config import ModelConfig, TrainConfig
from mhla_gen.data import TrainingData
from mhla_gen.models import MHLADiTTransformer2DModel
from mhla_gen.sampling.pipeline import ClassConditionalPipeline
from mhla_gen.training.conditioning import ClassLabels, Conditioning
from mhla_gen.training.initialization import initialize_dit
from mhla_gen.training.objectives import Objective, build_objective
from mhla_gen.training.step import Losses, ObjectiveLosses


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


@dataclass(frozen=True, eq=False)
class Task:
    """What is trained: everything that the loop needs to know of a family of models."""

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
    losses: Losses | None = None
    """What a step minimises; None is the loss of the objective."""

    @property
    def step_losses(self) -> Losses:
        """What a step minimises."""
        return self.losses or ObjectiveLosses(self.objective, self.conditioning)


def build_task(config: TrainConfig, data: TrainingData) -> Task:
    """The model that a config describes, for data of this kind.

    Raises:
        ValueError: If model and data do not fit together.
    """
    if data.class_names is None:
        raise ValueError("the data have no class labels, which a class-conditional model needs")
    return _class_conditional(config, data, data.class_names)


def _class_conditional(config: TrainConfig, data: TrainingData, class_names: Sequence[str]) -> Task:
    objective = build_objective(config.objective)
    shape = data.sample_shapes[0]

    def pipeline(model: Any) -> ClassConditionalPipeline:
        return ClassConditionalPipeline(
            transformer=model,
            scheduler=objective.scheduler(),
            class_names=class_names,
            prediction_type=objective.prediction_type,
        )

    return Task(
        model=build_model(config.model, shape, len(class_names)),
        objective=objective,
        conditioning=ClassLabels(len(class_names)),
        pipeline=pipeline,
        summary=f"{len(data)} images of {len(class_names)} classes, {list(shape)}",
    )
