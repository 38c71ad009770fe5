"""MHLA for diffusers' LTX-Video."""

import math
from typing import Any

from diffusers.models.transformers.transformer_ltx import (
    LTXVideoAttnProcessor,
    LTXVideoRotaryPosEmbed,
    LTXVideoTransformer3DModel,
)
from torch import Tensor

from mhla_gen.errors import UserError
from mhla_gen.models.family import Family
from mhla_gen.models.processors import DropsGrid, MHLAProcessor
from mhla_gen.models.rotary import pairs
from mhla_gen.models.transformer import MHLATransformerMixin


class GridLTXRotaryPosEmbed(LTXVideoRotaryPosEmbed):
    """LTX-Video's rotary embedding that also passes its grid to the attention layers.

    The grid is passed as the shape `(frames, height, width, 0)` of an empty third tensor.
    """

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        rope_interpolation_scale: tuple[Any, float, float] | None = None,
        video_coords: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`(cos, sin, grid carrier)` for tokens `[batch, seq_len, channels]`.

        Raises:
            ValueError: If num_frames, height and width do not multiply to the number of tokens.
        """
        sizes = given_grid(hidden_states, num_frames, height, width)
        cos, sin = super().forward(
            hidden_states, num_frames, height, width, rope_interpolation_scale, video_coords
        )
        return cos, sin, cos.new_empty((*sizes, 0))


def given_grid(hidden_states: Tensor, *sizes: int | None) -> tuple[int, ...]:
    """The grid of tokens `[batch, seq_len, channels]`: num_frames, height and width.

    Raises:
        ValueError: If they do not multiply to the number of tokens.
    """
    grid, num_tokens = tuple(size or 0 for size in sizes), hidden_states.shape[1]
    if math.prod(grid) != num_tokens:
        raise UserError(
            f"MHLA layers need num_frames, height and width that multiply to the number of "
            f"tokens, {num_tokens}, even with video_coords, found {grid}"
        )
    return grid


class SoftmaxLTXAttnProcessor(DropsGrid, LTXVideoAttnProcessor):
    """Stock attention for the softmax layers of a hybrid."""


class MHLALTXAttnProcessor(MHLAProcessor):
    """MHLA of an `LTXAttention` layer."""

    norm_across_heads = True

    def angles(self, attn: Any, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """From tables `[batch, seq_len, channels]`.

        Frequencies decrease over all channels, not within a head, so each head has its own.
        """
        cos, sin = pairs(cos, sin)
        return cos.unflatten(2, (attn.heads, -1)), sin.unflatten(2, (attn.heads, -1))


class LTXFamily(Family):
    """LTX-Video: grids of frames, height and width; `attn2` reads the text."""

    base_class = LTXVideoTransformer3DModel
    rank = 3
    layers = ("transformer_blocks.*.attn1",)
    # 161 frames at 512×704 after the VAE (8×32×32), the default of its pipeline.
    native = (21, 16, 22)
    stock_processor = LTXVideoAttnProcessor
    mhla_processor = MHLALTXAttnProcessor
    unconverted_processor = SoftmaxLTXAttnProcessor
    replaced_modules = {"rope": (LTXVideoRotaryPosEmbed, GridLTXRotaryPosEmbed)}  # noqa: RUF012


class MHLALTXVideoTransformer3DModel(MHLATransformerMixin, LTXVideoTransformer3DModel):
    """`LTXVideoTransformer3DModel` with MHLA layers.

    Takes the arguments of its base class and `mhla`, an `MHLAConfig` or a dict of its values.
    """

    family = LTXFamily()
