"""MHLA for diffusers' PixArt (α and Σ): text-to-image, any aspect ratio."""

from typing import Any

from diffusers.configuration_utils import register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from torch import Tensor

from mhla_gen.config import MHLAConfig
from mhla_gen.models.dit import MHLAAttnProcessor
from mhla_gen.models.family import Family
from mhla_gen.models.projection import FusesSelfAttention
from mhla_gen.models.transformer import accepts_mhla


class SoftmaxPixArtAttnProcessor(AttnProcessor2_0):
    """Stock attention, for layers that are handed a grid and do not need it."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
    ) -> Tensor:
        """As `AttnProcessor2_0`."""
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


class PixArtFamily(Family):
    """PixArt: image grids of any aspect ratio, no rotary embedding."""

    base_class = PixArtTransformer2DModel
    rank = 2
    stock_processor = AttnProcessor2_0
    mhla_processor = MHLAAttnProcessor
    unconverted_processor = SoftmaxPixArtAttnProcessor

    def attentions(self, model: Any) -> list[tuple[str, Any]]:
        """`attn1` of every block."""
        return [
            (f"transformer_blocks.{i}.attn1", block.attn1)
            for i, block in enumerate(model.transformer_blocks)
        ]

    def bystanders(self, model: Any) -> list[tuple[str, Any]]:
        """`attn2` of every block: it reads the text, and diffusers hands it the same arguments."""
        return [
            (f"transformer_blocks.{i}.attn2", block.attn2)
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


class MHLAPixArtTransformer2DModel(FusesSelfAttention, PixArtTransformer2DModel, PeftAdapterMixin):
    """`PixArtTransformer2DModel` with MHLA layers.

    Takes the arguments of its base class and `mhla`, an `MHLAConfig` or a dict of its values.
    """

    # A saved pipeline names this module; diffusers looks there for the class and for ModelMixin.
    __module__ = "mhla_gen"

    family = PixArtFamily()
    _repeated_blocks = ["BasicTransformerBlock"]  # noqa: RUF012
    _keep_in_fp32_modules = ["mixing"]  # noqa: RUF012
    _skip_layerwise_casting_patterns = [  # noqa: RUF012
        *PixArtTransformer2DModel._skip_layerwise_casting_patterns,
        "mhla",
    ]

    @register_to_config
    @accepts_mhla(PixArtTransformer2DModel)
    def __init__(self, mhla: MHLAConfig | dict[str, Any] | None = None, **base: Any):
        super().__init__(**base)
        self.convert_new(mhla)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Any = None,
        added_cond_kwargs: Any = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """As `PixArtTransformer2DModel`; hands the grid to the layers with their own arguments."""
        patch = self.pos_embed.patch_size
        grid = (hidden_states.shape[-2] // patch, hidden_states.shape[-1] // patch)
        return super().forward(
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            timestep=timestep,
            added_cond_kwargs=added_cond_kwargs,
            cross_attention_kwargs={**(cross_attention_kwargs or {}), "grid": grid},
            attention_mask=attention_mask,
            encoder_attention_mask=encoder_attention_mask,
            return_dict=return_dict,
        )
