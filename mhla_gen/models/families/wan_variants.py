"""MHLA for diffusers' models with Wan's architecture: VACE, Animate, SkyReels V2."""

from diffusers.models.transformers import transformer_wan_animate
from diffusers.models.transformers.transformer_skyreels_v2 import (
    SkyReelsV2AttnProcessor,
    SkyReelsV2RotaryPosEmbed,
    SkyReelsV2Transformer3DModel,
)
from diffusers.models.transformers.transformer_wan_animate import WanAnimateTransformer3DModel
from diffusers.models.transformers.transformer_wan_vace import WanVACETransformer3DModel

from mhla_gen.models.families.wan import WanFamily
from mhla_gen.models.processors import DropsGrid, PatchGridCarrier
from mhla_gen.models.transformer import MHLATransformerMixin

# diffusers has copies of both for this model.
_AnimateAttnProcessor = transformer_wan_animate.WanAttnProcessor
_AnimateRotaryPosEmbed = transformer_wan_animate.WanRotaryPosEmbed


class GridSkyReelsV2RotaryPosEmbed(PatchGridCarrier, SkyReelsV2RotaryPosEmbed):
    """SkyReels V2's rotary embedding that also passes its grid to the attention layers."""


class GridWanAnimateRotaryPosEmbed(PatchGridCarrier, _AnimateRotaryPosEmbed):
    """Wan Animate's rotary embedding that also passes its grid to the attention layers."""


class SoftmaxSkyReelsV2AttnProcessor(DropsGrid, SkyReelsV2AttnProcessor):
    """Stock attention for the softmax layers of a hybrid."""


class SoftmaxWanAnimateAttnProcessor(DropsGrid, _AnimateAttnProcessor):
    """Stock attention for the softmax layers of a hybrid."""


class WanVACEFamily(WanFamily):
    """Wan VACE: the blocks of the video and those of its control."""

    base_class = WanVACETransformer3DModel
    layers = ("vace_blocks.*.attn1", "blocks.*.attn1")
    frame_causal = False
    shares_sequences = False


class WanAnimateFamily(WanFamily):
    """Wan Animate: the layers that read a face are not converted."""

    base_class = WanAnimateTransformer3DModel
    # 77 frames and one of the character at 720×1280 after the VAE (4×8×8) and patches (1×2×2).
    native = (21, 45, 80)
    frame_causal = False
    shares_sequences = False
    stock_processor = _AnimateAttnProcessor
    unconverted_processor = SoftmaxWanAnimateAttnProcessor
    replaced_modules = {  # noqa: RUF012
        "rope": (_AnimateRotaryPosEmbed, GridWanAnimateRotaryPosEmbed)
    }


class SkyReelsV2Family(WanFamily):
    """SkyReels V2, with attention between all frames."""

    base_class = SkyReelsV2Transformer3DModel
    # 97 frames at 544×960 after the VAE (4×8×8) and patches (1×2×2), its pipeline's default.
    native = (25, 34, 60)
    frame_causal = False
    shares_sequences = False
    stock_processor = SkyReelsV2AttnProcessor
    unconverted_processor = SoftmaxSkyReelsV2AttnProcessor
    replaced_modules = {  # noqa: RUF012
        "rope": (SkyReelsV2RotaryPosEmbed, GridSkyReelsV2RotaryPosEmbed)
    }


class MHLAWanVACETransformer3DModel(MHLATransformerMixin, WanVACETransformer3DModel):
    """`WanVACETransformer3DModel` with MHLA layers.

    Takes the arguments of its base class and `mhla`, an `MHLAConfig` or a dict of its values.
    """

    family = WanVACEFamily()
    _repeated_blocks = ["WanTransformerBlock", "WanVACETransformerBlock"]  # noqa: RUF012


class MHLAWanAnimateTransformer3DModel(MHLATransformerMixin, WanAnimateTransformer3DModel):
    """`WanAnimateTransformer3DModel` with MHLA layers.

    Takes the arguments of its base class and `mhla`, an `MHLAConfig` or a dict of its values.
    """

    family = WanAnimateFamily()


class MHLASkyReelsV2Transformer3DModel(MHLATransformerMixin, SkyReelsV2Transformer3DModel):
    """`SkyReelsV2Transformer3DModel` with MHLA layers.

    Takes the arguments of its base class and `mhla`, an `MHLAConfig` or a dict of its values.
    """

    family = SkyReelsV2Family()
