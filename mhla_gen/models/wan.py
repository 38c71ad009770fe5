"""MHLA for diffusers' Wan video transformer (2.1 and 2.2)."""

from typing import Any

from diffusers.models.transformers.transformer_wan import (
    WanAttnProcessor,
    WanRotaryPosEmbed,
    WanTransformer3DModel,
)
from torch import Tensor

from mhla_gen.models.family import Family
from mhla_gen.models.processors import DropsGrid, MHLAProcessor, PatchGridCarrier, pairs
from mhla_gen.models.transformer import MHLATransformerMixin

TEXT_LENGTH_WITH_IMAGE = 512
"""Tokens of a caption for a model that reads an image, too: diffusers' attention to both takes all
that precedes this many for the image's, whatever the caption's length is."""


class GridRotaryPosEmbed(PatchGridCarrier, WanRotaryPosEmbed):
    """Wan's rotary embedding, which also tells its grid to the attention layers."""


class SoftmaxWanAttnProcessor(DropsGrid, WanAttnProcessor):
    """Stock attention for the softmax layers of a hybrid."""

    rotary_argument = "rotary_emb"


class MHLAWanAttnProcessor(MHLAProcessor):
    """MHLA of a `WanAttention` layer."""

    norm_across_heads = True

    def angles(self, attn: Any, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """From tables `[1, seq_len, 1, head_dim]`."""
        return pairs(cos[0, :, 0], sin[0, :, 0])


class WanFamily(Family):
    """Wan: grids of frames, height and width; `attn2` reads text and image tokens."""

    base_class = WanTransformer3DModel
    rank = 3
    layers = ("blocks.*.attn1",)
    # 81 frames at 480×832 after Wan's VAE (4×8×8) and patches (1×2×2): the size it was trained at.
    native = (21, 30, 52)
    shares_sequences = True
    stock_processor = WanAttnProcessor
    mhla_processor = MHLAWanAttnProcessor
    unconverted_processor = SoftmaxWanAttnProcessor
    replaced_modules = {"rope": (WanRotaryPosEmbed, GridRotaryPosEmbed)}  # noqa: RUF012


class MHLAWanTransformer3DModel(MHLATransformerMixin, WanTransformer3DModel):
    """`WanTransformer3DModel` with MHLA layers.

    Takes the arguments of its base class and `mhla`, an `MHLAConfig` or a dict of its values.
    """

    family = WanFamily()
