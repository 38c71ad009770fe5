"""MHLA for diffusers' SANA-Video, whose own self-attention is linear: one block, not learned."""

from typing import Any

from diffusers.configuration_utils import register_to_config
from diffusers.models.transformers.transformer_sana_video import (
    SanaLinearAttnProcessor3_0,
    SanaVideoTransformer3DModel,
    WanRotaryPosEmbed,
)
from torch import Tensor

from mhla_gen.config import MHLAConfig
from mhla_gen.models.family import Family
from mhla_gen.models.projection import (
    PatchGridCarrier,
    mhla_attention,
    refuse_mask_and_other_keys,
)
from mhla_gen.models.transformer import MHLATransformerMixin, accepts_mhla

# 81 frames at 480×832 after Wan's VAE (4×8×8) and patches (1×2×2): the size it was trained at.
_NATIVE_GRID = (21, 30, 52)


class GridSanaRotaryPosEmbed(PatchGridCarrier, WanRotaryPosEmbed):
    """SANA-Video's rotary embedding, which also tells its grid to the attention layers."""


class StockSanaVideoAttnProcessor(SanaLinearAttnProcessor3_0):
    """The model's own linear attention, for layers that keep it: drops the grid carrier."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, ...] | None = None,
    ) -> Tensor:
        """As `SanaLinearAttnProcessor3_0`."""
        pair: Any = None if rotary_emb is None else (rotary_emb[0], rotary_emb[1])
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, pair)


class MHLASanaVideoAttnProcessor:
    """Runs the `mhla` child of an `Attention` layer on the grid that the carrier tells."""

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
            raise ValueError("MHLA layers need (cos, sin, grid) from GridSanaRotaryPosEmbed")
        cos, sin, carrier = rotary_emb
        # diffusers repeats every angle for the two channels of its pair.
        rotary = (cos[0, :, 0, 0::2], sin[0, :, 0, 1::2])
        grid = tuple(carrier.shape[:3])
        return mhla_attention(attn, hidden_states, grid, rotary, norm_across_heads=True)


class SanaVideoFamily(Family):
    """SANA-Video: grids of frames, height and width; rotary embedding over all three."""

    base_class = SanaVideoTransformer3DModel
    rank = 3
    stock_processor = SanaLinearAttnProcessor3_0
    mhla_processor = MHLASanaVideoAttnProcessor
    unconverted_processor = StockSanaVideoAttnProcessor
    stock_kind = "linear"
    replaced_modules = {"rope": (WanRotaryPosEmbed, GridSanaRotaryPosEmbed)}  # noqa: RUF012

    def attentions(self, model: Any) -> list[tuple[str, Any]]:
        """`attn1` of every block; `attn2` reads the text and stays softmax."""
        return [
            (f"transformer_blocks.{i}.attn1", block.attn1)
            for i, block in enumerate(model.transformer_blocks)
        ]

    def sizes(self, model: Any) -> tuple[int, int, int]:
        """Heads, channels of a head, channels of the layer's input."""
        num_heads, head_dim = model.config.num_attention_heads, model.config.attention_head_dim
        return num_heads, head_dim, num_heads * head_dim

    def native_grid(self, model: Any) -> tuple[int, ...]:
        """81 frames at 480×832, whatever the model: SANA-Video takes any size."""
        return _NATIVE_GRID


class MHLASanaVideoTransformer3DModel(MHLATransformerMixin, SanaVideoTransformer3DModel):
    """`SanaVideoTransformer3DModel` with MHLA layers.

    Takes the arguments of its base class and `mhla`, an `MHLAConfig` or a dict of its values.
    """

    # A saved pipeline names this module; diffusers looks there for the class and for ModelMixin.
    __module__ = "mhla_gen"

    family = SanaVideoFamily()
    _repeated_blocks = ["SanaVideoTransformerBlock"]  # noqa: RUF012
    _keep_in_fp32_modules = ["mixing"]  # noqa: RUF012
    _skip_layerwise_casting_patterns = [  # noqa: RUF012
        *SanaVideoTransformer3DModel._skip_layerwise_casting_patterns,
        "mhla",
    ]

    @register_to_config
    @accepts_mhla(SanaVideoTransformer3DModel)
    def __init__(self, mhla: MHLAConfig | dict[str, Any] | None = None, **base: Any):
        super().__init__(**base)
        self.convert_new(mhla)
