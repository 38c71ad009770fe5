"""MHLA for diffusers' HunyuanDiT: text-to-image, any aspect ratio."""

from typing import Any

from diffusers.configuration_utils import register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.attention_processor import HunyuanAttnProcessor2_0
from diffusers.models.transformers.hunyuan_transformer_2d import HunyuanDiT2DModel
from torch import Tensor

from mhla_gen.config import MHLAConfig
from mhla_gen.models.family import Family
from mhla_gen.models.projection import (
    FusesSelfAttention,
    mhla_attention,
    refuse_mask_and_other_keys,
)
from mhla_gen.models.transformer import accepts_mhla


class SoftmaxHunyuanAttnProcessor(HunyuanAttnProcessor2_0):
    """Stock attention, for layers that are handed a grid and do not need it."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        """As `HunyuanAttnProcessor2_0`."""
        pair: Any = None if image_rotary_emb is None else image_rotary_emb[:2]
        return super().__call__(
            attn, hidden_states, encoder_hidden_states, attention_mask, temb, pair
        )


class MHLAHunyuanAttnProcessor:
    """Runs the `mhla` child of an `Attention` layer on the grid that the carrier tells."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        """Project, attend, project; `[batch, seq_len, hidden_size]` in and out.

        Raises:
            ValueError: If a mask or other keys are given, or rotary embedding or grid are missing.
        """
        refuse_mask_and_other_keys(attention_mask, encoder_hidden_states)
        if image_rotary_emb is None or len(image_rotary_emb) != 3:
            raise ValueError("MHLA layers of HunyuanDiT need image_rotary_emb=(cos, sin)")
        cos, sin, carrier = image_rotary_emb
        # diffusers repeats every angle for the two channels of its pair.
        rotary = (cos[:, 0::2].to(hidden_states.device), sin[:, 0::2].to(hidden_states.device))
        return mhla_attention(attn, hidden_states, tuple(carrier.shape[:2]), rotary)


class HunyuanDiTFamily(Family):
    """HunyuanDiT: image grids of any aspect ratio, rotary embedding over both axes."""

    base_class = HunyuanDiT2DModel
    rank = 2
    stock_processor = HunyuanAttnProcessor2_0
    mhla_processor = MHLAHunyuanAttnProcessor
    unconverted_processor = SoftmaxHunyuanAttnProcessor

    def attentions(self, model: Any) -> list[tuple[str, Any]]:
        """`attn1` of every block."""
        return [(f"blocks.{i}.attn1", block.attn1) for i, block in enumerate(model.blocks)]

    def bystanders(self, model: Any) -> list[tuple[str, Any]]:
        """`attn2` of every block: it reads the text and rotates its queries."""
        return [(f"blocks.{i}.attn2", block.attn2) for i, block in enumerate(model.blocks)]

    def sizes(self, model: Any) -> tuple[int, int, int]:
        """Heads, channels of a head, channels of the layer's input."""
        config = model.config
        return config.num_attention_heads, config.attention_head_dim, model.inner_dim

    def native_grid(self, model: Any) -> tuple[int, ...]:
        """Patches along both sides at the model's own resolution."""
        side = model.config.sample_size // model.config.patch_size
        return side, side


class MHLAHunyuanDiT2DModel(FusesSelfAttention, HunyuanDiT2DModel, PeftAdapterMixin):
    """`HunyuanDiT2DModel` with MHLA layers.

    Takes the arguments of its base class and `mhla`, an `MHLAConfig` or a dict of its values.
    """

    # A saved pipeline names this module; diffusers looks there for the class and for ModelMixin.
    __module__ = "mhla_gen"

    family = HunyuanDiTFamily()
    _repeated_blocks = ["HunyuanDiTBlock"]  # noqa: RUF012
    _keep_in_fp32_modules = ["mixing"]  # noqa: RUF012
    _skip_layerwise_casting_patterns = [  # noqa: RUF012
        *HunyuanDiT2DModel._skip_layerwise_casting_patterns,
        "mhla",
    ]

    @register_to_config
    @accepts_mhla(HunyuanDiT2DModel)
    def __init__(self, mhla: MHLAConfig | dict[str, Any] | None = None, **base: Any):
        super().__init__(**base)
        self.convert_new(mhla)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        text_embedding_mask: Tensor | None = None,
        encoder_hidden_states_t5: Tensor | None = None,
        text_embedding_mask_t5: Tensor | None = None,
        image_meta_size: Tensor | None = None,
        style: Tensor | None = None,
        image_rotary_emb: Any = None,
        controlnet_block_samples: Any = None,
        return_dict: bool = True,
    ) -> Any:
        """As `HunyuanDiT2DModel`; the grid travels as the shape of a third tensor beside cos, sin.

        Raises:
            ValueError: If `image_rotary_emb` is missing.
        """
        if image_rotary_emb is None:
            raise ValueError("MHLA layers of HunyuanDiT need image_rotary_emb=(cos, sin)")
        patch = self.pos_embed.patch_size
        grid = (hidden_states.shape[-2] // patch, hidden_states.shape[-1] // patch)
        return super().forward(
            hidden_states,
            timestep,
            encoder_hidden_states=encoder_hidden_states,
            text_embedding_mask=text_embedding_mask,
            encoder_hidden_states_t5=encoder_hidden_states_t5,
            text_embedding_mask_t5=text_embedding_mask_t5,
            image_meta_size=image_meta_size,
            style=style,
            image_rotary_emb=(*image_rotary_emb, hidden_states.new_empty((*grid, 0))),
            controlnet_block_samples=controlnet_block_samples,
            return_dict=return_dict,
        )
