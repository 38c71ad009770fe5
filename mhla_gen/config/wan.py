"""Settings of training Wan's video transformers."""

from dataclasses import dataclass
from typing import Annotated, Literal

from mhla_gen.config.checks import check_choice
from mhla_gen.config.fields import Count, Depth, Range
from mhla_gen.config.model import LoraSettings
from mhla_gen.errors import UserError

WAN_PRESETS: dict[str, dict[str, int]] = {
    name: {
        "num_attention_heads": heads,
        "attention_head_dim": 128,
        "ffn_dim": ffn_dim,
        "num_layers": num_layers,
    }
    for name, heads, ffn_dim, num_layers in (
        ("1.3B", 12, 8960, 30),
        ("5B", 24, 14336, 30),
        ("14B", 40, 13824, 40),
    )
}
"""Sizes of Wan 2.1 (1.3B, 14B) and 2.2 (5B: TI2V; 14B: each of the two experts of A14B).

Source: config.json of the transformers in Wan-AI's repositories in diffusers' format.
"""
_SIZES = ("num_layers", "num_attention_heads", "attention_head_dim", "ffn_dim")


@dataclass(frozen=True, kw_only=True)
class WanConfig(LoraSettings, prefix="wan."):
    """A Wan transformer for clips with captions, and which part is trained.

    Raises:
        ValueError: If values are out of range or do not fit together.
    """

    preset: str = "1.3B"
    """Sizes of a new model, without model.pretrained: 1.3B, 5B or 14B. Channels are those of the
    data."""
    num_layers: Depth | None = None
    """Transformer blocks; None takes the preset's, as for the next three."""
    num_attention_heads: Count | None = None
    """Heads per block; the hidden size is heads × attention_head_dim."""
    attention_head_dim: Count | None = None
    """Channels per head."""
    ffn_dim: Count | None = None
    """Channels inside the feed-forward layers."""
    first_frame: bool = False
    """Image to video: the model is given the first frame of a clip. With times_of_tokens it
    replaces the first latent frame, as in Wan 2.2 TI2V-5B; otherwise it is passed in additional
    channels, as in I2V-A14B, which the cache must have: clips.condition=true. A new model also
    reads the embedded first frame, as in Wan 2.1, if the cache has it."""
    times_of_tokens: bool | None = None
    """Give the model one timestep per token, as in TI2V-5B; None takes the pretrained pipeline's
    setting."""
    expert: Literal["high_noise", "low_noise"] | None = None
    """Which of Wan 2.2's two 14B experts is trained, on its noise levels only."""
    boundary: Annotated[float, Range(0, 1, open_low=True, open_high=True)] | None = None
    """Noise level between the experts; None takes that of the pretrained pipeline, or else Wan
    2.2's: 0.875 for text to video, 0.9 for image to video."""
    save_text_encoder: bool = False
    """Save the text encoder of the cache with the pipeline, 11 GB for Wan's. Without it, samples
    need embedded prompts."""

    def __post_init__(self):
        super().__post_init__()
        check_choice("wan.preset", self.preset, tuple(WAN_PRESETS))
        if self.attention_head_dim is not None and self.attention_head_dim % 2:
            raise UserError(
                "wan.attention_head_dim must be even, for the pairs of channels that are rotated, "
                f"found {self.attention_head_dim}"
            )
        if self.boundary is not None and self.expert is None:
            raise UserError("wan.boundary needs wan.expert=high_noise or low_noise")

    @property
    def sizes(self) -> dict[str, int]:
        """Arguments of a new model but channels."""
        given = {name: getattr(self, name) for name in _SIZES}
        return WAN_PRESETS[self.preset] | {k: v for k, v in given.items() if v is not None}

    @property
    def subfolder(self) -> str:
        """Where the trained transformer lies in a pipeline."""
        return "transformer_2" if self.expert == "low_noise" else "transformer"
