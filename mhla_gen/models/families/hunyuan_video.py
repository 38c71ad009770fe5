"""MHLA for diffusers' HunyuanVideo and HunyuanVideo 1.5."""

from diffusers.models.transformers.transformer_hunyuan_video import (
    HunyuanVideoAttnProcessor2_0,
    HunyuanVideoRotaryPosEmbed,
    HunyuanVideoTransformer3DModel,
)
from diffusers.models.transformers.transformer_hunyuan_video15 import (
    HunyuanVideo15AttnProcessor2_0,
    HunyuanVideo15RotaryPosEmbed,
    HunyuanVideo15Transformer3DModel,
)
from torch import Tensor

from mhla_gen.models.joint import JointFamily, JointMHLAProcessor
from mhla_gen.models.processors import DropsGrid, PatchGridCarrier
from mhla_gen.models.transformer import MHLATransformerMixin


class GridHunyuanVideoRotaryPosEmbed(PatchGridCarrier, HunyuanVideoRotaryPosEmbed):
    """HunyuanVideo's rotary embedding that also passes its grid to the attention layers."""


class GridHunyuanVideo15RotaryPosEmbed(PatchGridCarrier, HunyuanVideo15RotaryPosEmbed):
    """HunyuanVideo 1.5's rotary embedding that also passes its grid to the attention layers."""


class SoftmaxHunyuanVideoAttnProcessor(DropsGrid, HunyuanVideoAttnProcessor2_0):
    """Stock attention for the softmax layers of a hybrid."""


class SoftmaxHunyuanVideo15AttnProcessor(DropsGrid, HunyuanVideo15AttnProcessor2_0):
    """Stock attention for the softmax layers of a hybrid."""


class MHLAHunyuanVideoAttnProcessor(JointMHLAProcessor):
    """MHLA of an `Attention` layer with a mask of its text."""

    def text_mask(self, mask: Tensor | None, num_image: int) -> Tensor | None:
        """From a mask `[batch, 1, 1, num_image + text_len]` of all keys."""
        return None if mask is None else mask[:, 0, 0, num_image:]


class MHLAHunyuanVideo15AttnProcessor(JointMHLAProcessor):
    """MHLA of an `Attention` layer with a mask of its text, which also hides padded queries."""

    takes_mask = True
    zeroes_padding = True


class HunyuanVideoFamily(JointFamily):
    """HunyuanVideo: grids of frames, height and width; rotary embedding over all three."""

    base_class = HunyuanVideoTransformer3DModel
    rank = 3
    layers = ("transformer_blocks.*.attn", "single_transformer_blocks.*.attn")
    # 129 frames at 720×1280 after the VAE (4×8×8) and patches (1×2×2), its pipeline's default.
    native = (33, 45, 80)
    text_length = 256
    stock_processor = HunyuanVideoAttnProcessor2_0
    mhla_processor = MHLAHunyuanVideoAttnProcessor
    unconverted_processor = SoftmaxHunyuanVideoAttnProcessor
    replaced_modules = {  # noqa: RUF012
        "rope": (HunyuanVideoRotaryPosEmbed, GridHunyuanVideoRotaryPosEmbed)
    }


class HunyuanVideo15Family(JointFamily):
    """HunyuanVideo 1.5: grids of frames, height and width; rotary embedding over all three."""

    base_class = HunyuanVideo15Transformer3DModel
    rank = 3
    layers = ("transformer_blocks.*.attn",)
    # 121 frames at 480×848 after the VAE (4×16×16), its pipeline's default.
    native = (31, 30, 53)
    # 1000 of the language model, 256 of ByT5 and 729 of the image.
    text_length = 1985
    stock_processor = HunyuanVideo15AttnProcessor2_0
    mhla_processor = MHLAHunyuanVideo15AttnProcessor
    unconverted_processor = SoftmaxHunyuanVideo15AttnProcessor
    replaced_modules = {  # noqa: RUF012
        "rope": (HunyuanVideo15RotaryPosEmbed, GridHunyuanVideo15RotaryPosEmbed)
    }


class MHLAHunyuanVideoTransformer3DModel(MHLATransformerMixin, HunyuanVideoTransformer3DModel):
    """`HunyuanVideoTransformer3DModel` with MHLA layers.

    Takes the arguments of its base class and `mhla`, an `MHLAConfig` or a dict of its values.
    """

    family = HunyuanVideoFamily()


class MHLAHunyuanVideo15Transformer3DModel(MHLATransformerMixin, HunyuanVideo15Transformer3DModel):
    """`HunyuanVideo15Transformer3DModel` with MHLA layers.

    Takes the arguments of its base class and `mhla`, an `MHLAConfig` or a dict of its values.
    """

    family = HunyuanVideo15Family()
