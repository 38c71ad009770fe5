"""MHLA for diffusers' class-conditional DiT."""

import math
from typing import Any

from diffusers.configuration_utils import register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import Tensor

from mhla_gen.config import MHLAConfig
from mhla_gen.models.family import Family, MHLATransformerMixin, accepts_mhla


class MHLAAttnProcessor:
    """Runs the `mhla` child of an `Attention` layer on a square token grid."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Project, attend, project; `[batch, seq_len, hidden_size]` in and out.

        Raises:
            ValueError: If a mask or other keys are given, or the tokens do not form a square.
        """
        if attention_mask is not None or encoder_hidden_states is not None:
            raise ValueError("MHLA layers take neither an attention mask nor other keys and values")
        side = math.isqrt(hidden_states.shape[1])
        if side * side != hidden_states.shape[1]:
            raise ValueError(f"DiT's tokens form a square grid, found {hidden_states.shape[1]}")
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = (
                project(hidden_states) for project in (attn.to_q, attn.to_k, attn.to_v)
            )
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        out = attn.mhla(
            query.type_as(value), key.type_as(value), value, hidden_states, (side, side)
        )
        return attn.to_out[1](attn.to_out[0](out))


class DiTFamily(Family):
    """DiT: square image grids, no rotary embedding."""

    base_class = DiTTransformer2DModel
    rank = 2
    stock_processor = AttnProcessor2_0
    mhla_processor = MHLAAttnProcessor
    softmax_processor = AttnProcessor2_0

    def attentions(self, model: Any) -> list[tuple[str, Any]]:
        """`attn1` of every block."""
        return [
            (f"transformer_blocks.{i}.attn1", block.attn1)
            for i, block in enumerate(model.transformer_blocks)
        ]

    def sizes(self, model: Any) -> tuple[int, int, int]:
        """Heads, channels of a head, channels of the layer's input."""
        config = model.config
        return config.num_attention_heads, config.attention_head_dim, model.inner_dim

    def native_grid(self, model: Any) -> tuple[int, ...]:
        """Patches along both sides at the model's own resolution."""
        side = model.config.sample_size // model.config.patch_size
        return side, side


class MHLADiTTransformer2DModel(
    MHLATransformerMixin, DiTTransformer2DModel, PeftAdapterMixin, AttentionMixin
):
    """`DiTTransformer2DModel` with MHLA layers.

    Takes the arguments of its base class and `mhla`, an `MHLAConfig` or a dict of its values.
    """

    # A saved pipeline names this module; diffusers looks there for the class and for ModelMixin.
    __module__ = "mhla_gen"

    family = DiTFamily()
    _repeated_blocks = ["BasicTransformerBlock"]  # noqa: RUF012
    _keep_in_fp32_modules = ["mixing"]  # noqa: RUF012
    _skip_layerwise_casting_patterns = [  # noqa: RUF012
        *DiTTransformer2DModel._skip_layerwise_casting_patterns,
        "mhla",
    ]

    @register_to_config
    @accepts_mhla(DiTTransformer2DModel)
    def __init__(self, mhla: MHLAConfig | dict[str, Any] | None = None, **base: Any):
        super().__init__(**base)
        self.convert_new(mhla)
