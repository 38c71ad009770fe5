"""Settings of training any other transformer of text to image or text to video."""

from dataclasses import dataclass, field
from typing import Any

from mhla_gen.config.checks import is_mapping
from mhla_gen.config.fields import NotNegative
from mhla_gen.config.lora import LoraSettings
from mhla_gen.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(LoraSettings, prefix="transformer."):
    """A transformer of diffusers for captioned images or clips, and what of it is trained.

    Raises:
        ValueError: If values are out of range or do not fit together.
    """

    name: str | None = None
    """Class of a new model in diffusers, such as SD3Transformer2DModel; None takes that of
    model.pretrained."""
    sizes: Any = field(default_factory=dict[str, Any])
    """Arguments of a new model: those of its class in diffusers. Channels of the data and of
    embedded captions must be those of the cache."""
    guidance: NotNegative | None = None
    """What a model that was distilled to follow guidance is told in training; None takes the
    default of its pipeline, 3.5 for FLUX.1."""
    save_text_encoder: bool = False
    """Save the text encoders of the cache with the pipeline. Without them samples are made from
    embedded prompts."""

    def __post_init__(self):
        super().__post_init__()
        if not is_mapping(self.sizes):
            raise UserError(f"transformer.sizes must be arguments by name, found {self.sizes!r}")
        if self.sizes and self.name is None:
            raise UserError("transformer.sizes are for a new model; give transformer.name, too")
