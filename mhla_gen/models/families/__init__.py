"""Every family of transformers that MHLA knows: for each model of diffusers, the class it becomes.

To add one, write a file with a `Family` and its class, and name the class here.
"""

from typing import Any

from mhla_gen.errors import UserError
from mhla_gen.models.families.cogvideox import MHLACogVideoXTransformer3DModel
from mhla_gen.models.families.cosmos import MHLACosmosTransformer3DModel
from mhla_gen.models.families.dit import MHLADiTTransformer2DModel
from mhla_gen.models.families.flux import MHLAFlux2Transformer2DModel, MHLAFluxTransformer2DModel
from mhla_gen.models.families.hunyuan_dit import MHLAHunyuanDiT2DModel
from mhla_gen.models.families.hunyuan_video import (
    MHLAHunyuanVideo15Transformer3DModel,
    MHLAHunyuanVideoTransformer3DModel,
)
from mhla_gen.models.families.kandinsky5 import MHLAKandinsky5Transformer3DModel
from mhla_gen.models.families.ltx import MHLALTXVideoTransformer3DModel
from mhla_gen.models.families.ltx2 import MHLALTX2VideoTransformer3DModel
from mhla_gen.models.families.mochi import MHLAMochiTransformer3DModel
from mhla_gen.models.families.pixart import MHLAPixArtTransformer2DModel
from mhla_gen.models.families.qwen_image import MHLAQwenImageTransformer2DModel
from mhla_gen.models.families.sana import MHLASanaTransformer2DModel
from mhla_gen.models.families.sana_video import MHLASanaVideoTransformer3DModel
from mhla_gen.models.families.sd3 import MHLASD3Transformer2DModel
from mhla_gen.models.families.unsupported import reason_of
from mhla_gen.models.families.wan import MHLAWanTransformer3DModel
from mhla_gen.models.families.wan_variants import (
    MHLASkyReelsV2Transformer3DModel,
    MHLAWanAnimateTransformer3DModel,
    MHLAWanVACETransformer3DModel,
)
from mhla_gen.models.families.z_image import MHLAZImageTransformer2DModel
from mhla_gen.models.family import Family

# Base class → the class it becomes.
MHLA_CLASSES: dict[type, type] = {
    softmax_class: mhla_class
    for mhla_class in (
        MHLALTX2VideoTransformer3DModel,
        MHLASanaTransformer2DModel,
        MHLAWanVACETransformer3DModel,
        MHLAWanAnimateTransformer3DModel,
        MHLASkyReelsV2Transformer3DModel,
        MHLACosmosTransformer3DModel,
        MHLAZImageTransformer2DModel,
        MHLASD3Transformer2DModel,
        MHLAQwenImageTransformer2DModel,
        MHLAMochiTransformer3DModel,
        MHLAHunyuanVideo15Transformer3DModel,
        MHLAHunyuanVideoTransformer3DModel,
        MHLAFlux2Transformer2DModel,
        MHLAFluxTransformer2DModel,
        MHLACogVideoXTransformer3DModel,
        MHLADiTTransformer2DModel,
        MHLAHunyuanDiT2DModel,
        MHLAKandinsky5Transformer3DModel,
        MHLALTXVideoTransformer3DModel,
        MHLAPixArtTransformer2DModel,
        MHLASanaVideoTransformer3DModel,
        MHLAWanTransformer3DModel,
    )
    for softmax_class in (mhla_class.family.base_class, *mhla_class.family.variants)
}


def family_of(model: Any) -> Family:
    """The family of a transformer, converted or not.

    Raises:
        ValueError: If it belongs to no supported family.
    """
    for base, mhla_class in MHLA_CLASSES.items():
        if isinstance(model, base):
            known = mhla_class
            return known.family
    raise UserError(refusal(model))


def refusal(transformer: Any) -> str:
    """Why a transformer cannot be converted."""
    if hasattr(transformer, "_orig_mod"):
        return "the model is compiled; convert it before torch.compile"
    reason = reason_of(transformer)
    if reason is not None:
        return f"{reason} (docs/models.md)"
    return (
        f"expected a pipeline or one of {', '.join(c.__name__ for c in MHLA_CLASSES)}, found a "
        f"{type(transformer).__name__}"
    )
