"""MHLA for diffusers' Stable Diffusion 3 and 3.5: text-to-image, any aspect ratio."""

from typing import Any

from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

from mhla_gen.models.family import patch_grid
from mhla_gen.models.joint import JointFamily, JointMHLAProcessor
from mhla_gen.models.processors import DropsGrid, MHLAProcessor
from mhla_gen.models.transformer import FusesSelfAttention


class SoftmaxSD3AttnProcessor(DropsGrid, JointAttnProcessor2_0):
    """Stock attention for the softmax layers of a hybrid."""


class SD3Family(JointFamily):
    """Stable Diffusion 3: image grids, no rotary embedding.

    Some blocks of 3.5 medium have a second attention, over image tokens only.
    """

    base_class = SD3Transformer2DModel
    rank = 2
    layers = ("transformer_blocks.*.attn", "transformer_blocks.*.attn2")
    # 77 tokens of CLIP and 256 of T5.
    text_length = 333
    stock_processor = JointAttnProcessor2_0
    mhla_processor = JointMHLAProcessor
    unconverted_processor = SoftmaxSD3AttnProcessor

    def reads_text(self, attention: Any) -> bool:
        """Whether the layer also projects text tokens."""
        return attention.add_q_proj is not None

    def processors(self, attention: Any) -> tuple[type, type, type]:
        """Those of the family; for a layer without text, those of plain self-attention."""
        mhla = self.mhla_processor if self.reads_text(attention) else MHLAProcessor
        return self.stock_processor, mhla, self.unconverted_processor

    def arguments(self, model: Any, given: dict[str, Any]) -> dict[str, Any]:
        """The grid is passed with the layers' own arguments."""
        grid = patch_grid(given["hidden_states"].shape[-2:], model.config.patch_size)
        own = given.get("joint_attention_kwargs") or {}
        return given | {"joint_attention_kwargs": {**own, "grid": grid}}


class MHLASD3Transformer2DModel(FusesSelfAttention, SD3Transformer2DModel):
    """`SD3Transformer2DModel` with MHLA layers.

    Takes the arguments of its base class and `mhla`, an `MHLAConfig` or a dict of its values.
    """

    family = SD3Family()
    _repeated_blocks = ["JointTransformerBlock"]  # noqa: RUF012
