"""Settings of training any other text-to-image or text-to-video transformer."""

import re
from dataclasses import dataclass, field
from typing import Any

from mhla_gen.config.checks import is_mapping
from mhla_gen.config.fields import DEPTHS, NotNegative
from mhla_gen.config.model import LoraSettings
from mhla_gen.errors import UserError

# How the classes of diffusers call their numbers of blocks.
_DEPTH = re.compile("layers|blocks|depth")


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(LoraSettings, prefix="transformer."):
    """A diffusers transformer for captioned images or clips, and which part is trained.

    Raises:
        ValueError: If values are out of range or do not fit together.
    """

    name: str | None = None
    """Class of a new model in diffusers, such as SD3Transformer2DModel; None takes the class of
    model.pretrained."""
    sizes: dict[str, Any] = field(default_factory=dict[str, Any])
    """Arguments of a new model's class in diffusers. Channels of the data and of embedded captions
    must match the cache."""
    guidance: NotNegative | None = None
    """Guidance scale passed to a guidance-distilled model in training; None takes the default of
    its pipeline, 3.5 for FLUX.1."""
    save_text_encoder: bool = False
    """Save the text encoders of the cache with the pipeline. Without them, samples need embedded
    prompts."""

    def __post_init__(self):
        super().__post_init__()
        if not is_mapping(self.sizes):
            raise UserError(f"transformer.sizes must be arguments by name, found {self.sizes!r}")
        if self.sizes and self.name is None:
            raise UserError("transformer.sizes are for a new model; give transformer.name, too")
        for name, value in self.sizes.items():
            if type(value) is int and _DEPTH.search(name):
                DEPTHS.check(self.key(f"sizes.{name}"), value, whole=True)
