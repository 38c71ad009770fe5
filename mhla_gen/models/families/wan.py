"""MHLA for diffusers' Wan video transformer (2.1 and 2.2)."""

from typing import Any

import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from diffusers.models.transformers.transformer_wan import (
    WanAttnProcessor,
    WanRotaryPosEmbed,
    WanTransformer3DModel,
)
from torch import Tensor

from mhla_gen.models.family import Family
from mhla_gen.models.processors import DropsGrid, MHLAProcessor, PatchGridCarrier
from mhla_gen.models.rotary import pairs
from mhla_gen.models.transformer import MHLATransformerMixin

TEXT_LENGTH_WITH_IMAGE = 512
"""Number of caption tokens for a model that also reads an image: diffusers treats all tokens except
the last this many as the image's, whatever the length of the caption."""


class MovedRotaryPosEmbed(WanRotaryPosEmbed):
    """Wan's rotary embedding of a part of a clip that begins at `first_frame`."""

    first_frame = 0

    def forward(self, hidden_states: Tensor) -> Any:
        """`(cos, sin)` for latents `[batch, channels, frames, height, width]`."""
        tables = super().forward(hidden_states)
        if self.first_frame == 0:
            return tables
        frames, device = hidden_states.shape[2] // self.patch_size[0], hidden_states.device
        first = self.first_frame // self.patch_size[0]
        # Computed rather than looked up, since a clip may be longer than the stored table.
        precise = torch.float32 if device.type == "mps" else torch.float64
        positions: Any = torch.arange(first, first + frames, device=device, dtype=precise)
        times = get_1d_rotary_pos_embed(self.t_dim, positions, use_real=True, freqs_dtype=precise)
        return tuple(
            torch.cat((_of_tokens(time, table), table[..., self.t_dim :]), dim=-1)
            for time, table in zip(times, tables, strict=True)
        )


def _of_tokens(time: Tensor, table: Tensor) -> Tensor:
    """Expand rows per frame `[frames, channels]` to all tokens of `table` `[1, tokens, 1, …]`."""
    rows = time.to(table.dtype).repeat_interleave(table.shape[1] // len(time), dim=0)
    return rows[None, :, None]


class GridRotaryPosEmbed(PatchGridCarrier, MovedRotaryPosEmbed):
    """Wan's rotary embedding that also passes its grid to the attention layers."""


class SoftmaxWanAttnProcessor(DropsGrid, WanAttnProcessor):
    """Stock attention for the softmax layers of a hybrid."""


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
    frame_causal = True
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
