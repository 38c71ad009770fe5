"""MHLA for diffusers' Wan video transformer (2.1 and 2.2)."""

from typing import Any

from diffusers.configuration_utils import register_to_config
from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    WanAttnProcessor,
    WanRotaryPosEmbed,
    WanTransformer3DModel,
)
from torch import Tensor

from mhla_gen.config import MHLAConfig
from mhla_gen.models.family import Family
from mhla_gen.models.parallel import sequence_group
from mhla_gen.models.projection import (
    PatchGridCarrier,
    mhla_attention,
    refuse_mask_and_other_keys,
)
from mhla_gen.models.transformer import MHLATransformerMixin, accepts_mhla

# 81 frames at 480×832 after Wan's VAE (4×8×8) and patches (1×2×2): the size it was trained at.
_NATIVE_GRID = (21, 30, 52)

TEXT_LENGTH_WITH_IMAGE = 512
"""Tokens of a caption for a model that reads an image, too: diffusers' attention to both takes all
that precedes this many for the image's, whatever the caption's length is."""


class GridRotaryPosEmbed(PatchGridCarrier, WanRotaryPosEmbed):
    """Wan's rotary embedding, which also tells its grid to the attention layers."""


class SoftmaxWanAttnProcessor(WanAttnProcessor):
    """Stock attention for the softmax layers of a hybrid: drops the grid carrier."""

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, ...] | None = None,
    ) -> Tensor:
        """As `WanAttnProcessor`."""
        pair = None if rotary_emb is None else (rotary_emb[0], rotary_emb[1])
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, pair)


class MHLAWanAttnProcessor:
    """Runs the `mhla` child of a `WanAttention` layer on the grid that the carrier tells."""

    # diffusers skips, without a word, processors that lack these two.
    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, ...] | None = None,
    ) -> Tensor:
        """Project, attend, project; `[batch, seq_len, hidden_size]` in and out.

        Raises:
            ValueError: If a mask or other keys are given, or the grid is missing.
        """
        refuse_mask_and_other_keys(attention_mask, encoder_hidden_states)
        if rotary_emb is None or len(rotary_emb) != 3:
            raise ValueError("MHLA layers of Wan need (cos, sin, grid) from GridRotaryPosEmbed")
        cos, sin, carrier = rotary_emb
        # diffusers repeats every angle for the two channels of its pair.
        rotary = (cos[0, :, 0, 0::2], sin[0, :, 0, 1::2])
        grid = tuple(carrier.shape[:3])
        group = sequence_group(self._parallel_config)
        return mhla_attention(
            attn, hidden_states, grid, rotary, norm_across_heads=True, group=group
        )


class WanFamily(Family):
    """Wan: grids of frames, height and width; rotary embedding over all three."""

    base_class = WanTransformer3DModel
    rank = 3
    shares_sequences = True
    stock_processor = WanAttnProcessor
    mhla_processor = MHLAWanAttnProcessor
    unconverted_processor = SoftmaxWanAttnProcessor
    replaced_modules = {"rope": (WanRotaryPosEmbed, GridRotaryPosEmbed)}  # noqa: RUF012

    def attentions(self, model: Any) -> list[tuple[str, Any]]:
        """`attn1` of every block; `attn2` reads text and image tokens and stays as it is."""
        return [(f"blocks.{i}.attn1", block.attn1) for i, block in enumerate(model.blocks)]

    def sizes(self, model: Any) -> tuple[int, int, int]:
        """Heads, channels of a head, channels of the layer's input."""
        num_heads, head_dim = model.config.num_attention_heads, model.config.attention_head_dim
        return num_heads, head_dim, num_heads * head_dim

    def native_grid(self, model: Any) -> tuple[int, ...]:
        """81 frames at 480×832, whatever the model: Wan takes any size."""
        return _NATIVE_GRID


class MHLAWanTransformer3DModel(MHLATransformerMixin, WanTransformer3DModel):
    """`WanTransformer3DModel` with MHLA layers.

    Takes the arguments of its base class and `mhla`, an `MHLAConfig` or a dict of its values.
    """

    # A saved pipeline names this module; diffusers looks there for the class and for ModelMixin.
    __module__ = "mhla_gen"

    family = WanFamily()
    _keep_in_fp32_modules = [*WanTransformer3DModel._keep_in_fp32_modules, "mixing"]  # noqa: RUF012
    _skip_layerwise_casting_patterns = [  # noqa: RUF012
        *WanTransformer3DModel._skip_layerwise_casting_patterns,
        "mhla",
    ]

    @register_to_config
    @accepts_mhla(WanTransformer3DModel)
    def __init__(self, mhla: MHLAConfig | dict[str, Any] | None = None, **base: Any):
        super().__init__(**base)
        self.convert_new(mhla)
