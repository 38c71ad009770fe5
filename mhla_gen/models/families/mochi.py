"""MHLA for diffusers' Mochi: text to video."""

from typing import Any

from diffusers.models.attention_processor import MochiAttnProcessor2_0
from diffusers.models.transformers.transformer_mochi import MochiRoPE, MochiTransformer3DModel
from torch import Tensor

from mhla_gen.models.joint import JointFamily, JointMHLAProcessor
from mhla_gen.models.processors import DropsGrid, Rotary
from mhla_gen.models.transformer import MHLATransformerMixin


class GridMochiRoPE(MochiRoPE):
    """Mochi's rotary embedding that also passes its grid to the attention layers."""

    def forward(  # type: ignore[override]
        self,
        pos_frequencies: Tensor,
        num_frames: int,
        height: int,
        width: int,
        device: Any = None,
        dtype: Any = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`(cos, sin, grid carrier)`."""
        sizes = (num_frames, height, width)
        cos, sin = super().forward(pos_frequencies, *sizes, device=device, dtype=dtype)
        return cos, sin, cos.new_empty((*sizes, 0))


class SoftmaxMochiAttnProcessor(DropsGrid, MochiAttnProcessor2_0):
    """Stock attention for the softmax layers of a hybrid."""


class MHLAMochiAttnProcessor(JointMHLAProcessor):
    """MHLA of a `MochiAttention` layer, whose rotary angles are learned per head."""

    takes_mask = True
    zeroes_padding = True

    def rotary(self, attn: Any, tables: Any, num_image: int) -> tuple[Rotary, Rotary]:
        """From tables `[num_image, num_heads, head_dim / 2]`; text is not rotated."""
        return (tables[0].unsqueeze(0), tables[1].unsqueeze(0)), None


class MochiFamily(JointFamily):
    """Mochi: grids of frames, height and width."""

    base_class = MochiTransformer3DModel
    rank = 3
    layers = ("transformer_blocks.*.attn1",)
    # 163 frames at 480×848 after the VAE (6×8×8) and patches (1×2×2): the size it was trained at.
    native = (28, 30, 53)
    text_length = 256
    stock_processor = MochiAttnProcessor2_0
    mhla_processor = MHLAMochiAttnProcessor
    unconverted_processor = SoftmaxMochiAttnProcessor
    replaced_modules = {"rope": (MochiRoPE, GridMochiRoPE)}  # noqa: RUF012


class MHLAMochiTransformer3DModel(MHLATransformerMixin, MochiTransformer3DModel):
    """`MochiTransformer3DModel` with MHLA layers.

    Takes the arguments of its base class and `mhla`, an `MHLAConfig` or a dict of its values.
    """

    family = MochiFamily()
    _repeated_blocks = ["MochiTransformerBlock"]  # noqa: RUF012
