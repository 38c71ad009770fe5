"""Settings of the model that is trained."""

from dataclasses import dataclass, field
from typing import Literal

from mhla_gen.config.checks import check_at_least, check_choice
from mhla_gen.config.mhla import MHLAConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A class-conditional diffusion transformer (DiT) and the kind of its self-attention."""

    attention: Literal["softmax", "linear", "mhla"] = "mhla"
    """linear is MHLA with one block: the control that has the same convolution and gate."""
    mhla: MHLAConfig = field(default_factory=MHLAConfig)
    """Settings of linear and mhla; linear replaces the layout by one block."""
    patch_size: int = 2
    """Side of a token in pixels."""
    num_layers: int = 12
    """Transformer blocks."""
    num_attention_heads: int = 6
    """Heads per block; the hidden size is heads × attention_head_dim."""
    attention_head_dim: int = 64
    """Channels per head."""

    def __post_init__(self):
        check_choice("model.attention", self.attention, ("softmax", "linear", "mhla"))
        for name in ("patch_size", "num_layers", "num_attention_heads", "attention_head_dim"):
            check_at_least(f"model.{name}", getattr(self, name), 1)
