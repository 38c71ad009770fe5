"""MHLA for diffusers' PixArt (α and Σ): text-to-image, any aspect ratio."""

from typing import Any

from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel

from mhla_gen.models.family import Family, patch_grid
from mhla_gen.models.processors import DropsGrid, MHLAProcessor
from mhla_gen.models.transformer import FusesSelfAttention


class SoftmaxPixArtAttnProcessor(DropsGrid, AttnProcessor2_0):
    """Stock attention, for layers that receive a grid but do not need it."""


class PixArtFamily(Family):
    """PixArt: image grids of any aspect ratio, no rotary embedding.

    diffusers passes the same arguments to `attn1` and to `attn2`, which reads the text.
    """

    base_class = PixArtTransformer2DModel
    rank = 2
    layers = ("transformer_blocks.*.attn1",)
    bystander_layers = ("transformer_blocks.*.attn2",)
    stock_processor = AttnProcessor2_0
    mhla_processor = MHLAProcessor
    unconverted_processor = SoftmaxPixArtAttnProcessor

    def arguments(self, model: Any, given: dict[str, Any]) -> dict[str, Any]:
        """The grid is passed with the layers' own arguments."""
        grid = patch_grid(given["hidden_states"].shape[-2:], model.pos_embed.patch_size)
        own = given.get("cross_attention_kwargs") or {}
        return given | {"cross_attention_kwargs": {**own, "grid": grid}}


class MHLAPixArtTransformer2DModel(FusesSelfAttention, PixArtTransformer2DModel, PeftAdapterMixin):
    """`PixArtTransformer2DModel` with MHLA layers.

    Takes the arguments of its base class and `mhla`, an `MHLAConfig` or a dict of its values.
    """

    family = PixArtFamily()
    _repeated_blocks = ["BasicTransformerBlock"]  # noqa: RUF012
