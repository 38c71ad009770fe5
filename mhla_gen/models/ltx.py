"""MHLA for diffusers' LTX-Video."""

from typing import Any

from diffusers.configuration_utils import register_to_config
from diffusers.models.transformers.transformer_ltx import (
    LTXVideoAttnProcessor,
    LTXVideoRotaryPosEmbed,
    LTXVideoTransformer3DModel,
)
from torch import Tensor

from mhla_gen.config import MHLAConfig
from mhla_gen.models.family import Family
from mhla_gen.models.projection import mhla_attention, refuse_mask_and_other_keys
from mhla_gen.models.transformer import MHLATransformerMixin, accepts_mhla

# 161 frames at 512×704 after the VAE (8×32×32), the default of its pipeline.
_NATIVE_GRID = (21, 16, 22)


class GridLTXRotaryPosEmbed(LTXVideoRotaryPosEmbed):
    """LTX-Video's rotary embedding, which also tells its grid to the attention layers.

    The grid travels as the shape `(frames, height, width, 0)` of an empty third tensor.
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
            ValueError: If the three sizes do not say how the tokens lie.
        """
        sizes = (num_frames or 0, height or 0, width or 0)
        if sizes[0] * sizes[1] * sizes[2] != hidden_states.shape[1]:
            raise ValueError(
                f"MHLA layers need num_frames, height and width that multiply to the number of "
                f"tokens, {hidden_states.shape[1]}, also beside video_coords, found {sizes}"
            )
        cos, sin = super().forward(
            hidden_states, num_frames, height, width, rope_interpolation_scale, video_coords
        )
        return cos, sin, cos.new_empty((*sizes, 0))


class SoftmaxLTXAttnProcessor(LTXVideoAttnProcessor):
    """Stock attention for the softmax layers of a hybrid: drops the grid carrier."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, ...] | None = None,
    ) -> Tensor:
        """As `LTXVideoAttnProcessor`."""
        pair: Any = None if image_rotary_emb is None else image_rotary_emb[:2]
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, pair)


class MHLALTXAttnProcessor:
    """Runs the `mhla` child of an `LTXAttention` layer on the grid that the carrier tells."""

    # diffusers skips, without a word, processors that lack these two.
    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, ...] | None = None,
    ) -> Tensor:
        """Project, attend, project; `[batch, seq_len, hidden_size]` in and out.

        Raises:
            ValueError: If a mask or other keys are given, or the grid is missing.
        """
        refuse_mask_and_other_keys(attention_mask, encoder_hidden_states)
        if image_rotary_emb is None or len(image_rotary_emb) != 3:
            raise ValueError("MHLA layers of LTX need (cos, sin, grid) from GridLTXRotaryPosEmbed")
        cos, sin, carrier = image_rotary_emb
        # Frequencies fall over all channels, not over those of a head, so each head has its own.
        # diffusers repeats every angle for the two channels of its pair.
        rotary = (
            cos[..., 0::2].unflatten(2, (attn.heads, -1)),
            sin[..., 0::2].unflatten(2, (attn.heads, -1)),
        )
        grid = tuple(carrier.shape[:3])
        return mhla_attention(attn, hidden_states, grid, rotary, norm_across_heads=True)


class LTXFamily(Family):
    """LTX-Video: grids of frames, height and width; a rotary embedding that differs by head."""

    base_class = LTXVideoTransformer3DModel
    rank = 3
    stock_processor = LTXVideoAttnProcessor
    mhla_processor = MHLALTXAttnProcessor
    unconverted_processor = SoftmaxLTXAttnProcessor
    replaced_modules = {"rope": (LTXVideoRotaryPosEmbed, GridLTXRotaryPosEmbed)}  # noqa: RUF012

    def attentions(self, model: Any) -> list[tuple[str, Any]]:
        """`attn1` of every block; `attn2` reads the text."""
        return [
            (f"transformer_blocks.{i}.attn1", block.attn1)
            for i, block in enumerate(model.transformer_blocks)
        ]

    def sizes(self, model: Any) -> tuple[int, int, int]:
        """Heads, channels of a head, channels of the layer's input."""
        num_heads, head_dim = model.config.num_attention_heads, model.config.attention_head_dim
        return num_heads, head_dim, num_heads * head_dim

    def native_grid(self, model: Any) -> tuple[int, ...]:
        """161 frames at 512×704, whatever the model: LTX-Video takes any size."""
        return _NATIVE_GRID


class MHLALTXVideoTransformer3DModel(MHLATransformerMixin, LTXVideoTransformer3DModel):
    """`LTXVideoTransformer3DModel` with MHLA layers.

    Takes the arguments of its base class and `mhla`, an `MHLAConfig` or a dict of its values.
    """

    # A saved pipeline names this module; diffusers looks there for the class and for ModelMixin.
    __module__ = "mhla_gen"

    family = LTXFamily()
    _keep_in_fp32_modules = ["mixing"]  # noqa: RUF012
    _skip_layerwise_casting_patterns = [  # noqa: RUF012
        *LTXVideoTransformer3DModel._skip_layerwise_casting_patterns,
        "mhla",
    ]

    @register_to_config
    @accepts_mhla(LTXVideoTransformer3DModel)
    def __init__(self, mhla: MHLAConfig | dict[str, Any] | None = None, **base: Any):
        super().__init__(**base)
        self.convert_new(mhla)
