"""MHLA for diffusers' SANA-Video, whose own self-attention is linear, with one block."""

from diffusers.models.transformers.transformer_sana_video import (
    SanaLinearAttnProcessor3_0,
    SanaVideoTransformer3DModel,
    WanRotaryPosEmbed,
)

from mhla_gen.models.families.wan import MHLAWanAttnProcessor
from mhla_gen.models.family import Family
from mhla_gen.models.processors import DropsGrid, PatchGridCarrier
from mhla_gen.models.transformer import MHLATransformerMixin


class GridSanaRotaryPosEmbed(PatchGridCarrier, WanRotaryPosEmbed):
    """SANA-Video's rotary embedding that also passes its grid to the attention layers."""


class StockSanaVideoAttnProcessor(DropsGrid, SanaLinearAttnProcessor3_0):
    """The model's own linear attention, for layers that keep it."""


class SanaVideoFamily(Family):
    """SANA-Video: grids of frames, height and width; `attn2` reads the text and stays softmax."""

    base_class = SanaVideoTransformer3DModel
    rank = 3
    layers = ("transformer_blocks.*.attn1",)
    # 81 frames at 480×832 after Wan's VAE (4×8×8) and patches (1×2×2): the size it was trained at.
    native = (21, 30, 52)
    stock_processor = SanaLinearAttnProcessor3_0
    mhla_processor = MHLAWanAttnProcessor
    unconverted_processor = StockSanaVideoAttnProcessor
    stock_kind = "linear"
    replaced_modules = {"rope": (WanRotaryPosEmbed, GridSanaRotaryPosEmbed)}  # noqa: RUF012


class MHLASanaVideoTransformer3DModel(MHLATransformerMixin, SanaVideoTransformer3DModel):
    """`SanaVideoTransformer3DModel` with MHLA layers.

    Takes the arguments of its base class and `mhla`, an `MHLAConfig` or a dict of its values.
    """

    family = SanaVideoFamily()
    _repeated_blocks = ["SanaVideoTransformerBlock"]  # noqa: RUF012
