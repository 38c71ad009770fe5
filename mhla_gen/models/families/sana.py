"""MHLA for diffusers' SANA, whose own self-attention is linear: one block, no learned mixing."""

from typing import Any

from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0
from diffusers.models.transformers.sana_transformer import (
    SanaTransformer2DModel,
    SanaTransformerBlock,
)
from torch import Tensor

from mhla_gen.models.family import Family
from mhla_gen.models.processors import MHLAProcessor, Rotary
from mhla_gen.models.transformer import MHLATransformerMixin


class GridSanaTransformerBlock(SanaTransformerBlock):
    """SANA's block, which passes its grid to its self-attention.

    diffusers passes only tokens to the layer. The grid is set right before it is read, in the same
    call, so two sizes can be in use at a time.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Any = None,
        height: Any = None,
        width: Any = None,
    ) -> Tensor:
        """As `SanaTransformerBlock`."""
        attention: Any = self.attn1
        attention.grid = (height, width)
        return super().forward(
            hidden_states,
            attention_mask,
            encoder_hidden_states,
            encoder_attention_mask,
            timestep,
            height,
            width,
        )


class MHLASanaAttnProcessor(MHLAProcessor):
    """MHLA of an `Attention` layer on the grid that its block passes."""

    norm_across_heads = True

    def place(
        self, attn: Any, hidden_states: Tensor, tables: Any
    ) -> tuple[tuple[int, ...], Rotary]:
        """The block's grid; no rotary embedding."""
        return attn.grid, None


class SanaFamily(Family):
    """SANA: image grids of any aspect ratio, no rotary embedding; `attn2` reads the text."""

    base_class = SanaTransformer2DModel
    rank = 2
    layers = ("transformer_blocks.*.attn1",)
    stock_processor = SanaLinearAttnProcessor2_0
    mhla_processor = MHLASanaAttnProcessor
    unconverted_processor = SanaLinearAttnProcessor2_0
    stock_kind = "linear"
    replaced_modules = {  # noqa: RUF012
        "transformer_blocks.*": (SanaTransformerBlock, GridSanaTransformerBlock)
    }


class MHLASanaTransformer2DModel(MHLATransformerMixin, SanaTransformer2DModel):
    """`SanaTransformer2DModel` with MHLA layers.

    Takes the arguments of its base class and `mhla`, an `MHLAConfig` or a dict of its values.
    """

    family = SanaFamily()
    _repeated_blocks = ["GridSanaTransformerBlock"]  # noqa: RUF012
    _no_split_modules = [  # noqa: RUF012
        *(SanaTransformer2DModel._no_split_modules or ()),
        "GridSanaTransformerBlock",
    ]
