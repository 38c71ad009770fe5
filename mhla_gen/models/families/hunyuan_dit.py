"""MHLA for diffusers' HunyuanDiT: text-to-image, any aspect ratio."""

from typing import Any

from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.attention_processor import HunyuanAttnProcessor2_0
from diffusers.models.transformers.hunyuan_transformer_2d import HunyuanDiT2DModel
from torch import Tensor

from mhla_gen.errors import UserError
from mhla_gen.models.family import Family, patch_grid
from mhla_gen.models.processors import DropsGrid, MHLAProcessor
from mhla_gen.models.rotary import pairs
from mhla_gen.models.transformer import FusesSelfAttention


class SoftmaxHunyuanAttnProcessor(DropsGrid, HunyuanAttnProcessor2_0):
    """Stock attention, for layers that receive a grid but do not need it."""


class MHLAHunyuanAttnProcessor(MHLAProcessor):
    """MHLA of an `Attention` layer."""

    def angles(self, attn: Any, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """From tables `[seq_len, head_dim]`, which may be on another device."""
        device = attn.to_out[0].bias.device
        return pairs(cos.to(device), sin.to(device))


class HunyuanDiTFamily(Family):
    """HunyuanDiT: image grids of any aspect ratio, rotary embedding over both axes.

    `attn2` reads the text and rotates its queries.
    """

    base_class = HunyuanDiT2DModel
    rank = 2
    layers = ("blocks.*.attn1",)
    bystander_layers = ("blocks.*.attn2",)
    stock_processor = HunyuanAttnProcessor2_0
    mhla_processor = MHLAHunyuanAttnProcessor
    unconverted_processor = SoftmaxHunyuanAttnProcessor

    def arguments(self, model: Any, given: dict[str, Any]) -> dict[str, Any]:
        """The grid is passed as the shape of a third tensor beside cos and sin.

        Raises:
            ValueError: If `image_rotary_emb` is missing.
        """
        tables = given.get("image_rotary_emb")
        if tables is None:
            raise UserError("MHLA layers of HunyuanDiT need image_rotary_emb=(cos, sin)")
        hidden_states = given["hidden_states"]
        grid = patch_grid(hidden_states.shape[-2:], model.pos_embed.patch_size)
        return given | {"image_rotary_emb": (*tables, hidden_states.new_empty((*grid, 0)))}


class MHLAHunyuanDiT2DModel(FusesSelfAttention, HunyuanDiT2DModel, PeftAdapterMixin):
    """`HunyuanDiT2DModel` with MHLA layers.

    Takes the arguments of its base class and `mhla`, an `MHLAConfig` or a dict of its values.
    """

    family = HunyuanDiTFamily()
    _repeated_blocks = ["HunyuanDiTBlock"]  # noqa: RUF012
