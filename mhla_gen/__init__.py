"""Token-level multi-head linear attention (MHLA) for diffusion and video transformers.

Names are imported on first use, so that `mhla_gen.ops` works without loading diffusers.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mhla_gen.version import __version__

if TYPE_CHECKING:
    from diffusers.models.modeling_utils import ModelMixin

    from mhla_gen.config import CausalMHLAConfig, LinformerConfig, MHLAConfig, load_config
    from mhla_gen.models import (
        MHLA,
        ClipState,
        MHLACogVideoXTransformer3DModel,
        MHLACosmosTransformer3DModel,
        MHLADiTTransformer2DModel,
        MHLAFlux2Transformer2DModel,
        MHLAFluxTransformer2DModel,
        MHLAHunyuanDiT2DModel,
        MHLAHunyuanVideo15Transformer3DModel,
        MHLAHunyuanVideoTransformer3DModel,
        MHLAKandinsky5Transformer3DModel,
        MHLALTX2VideoTransformer3DModel,
        MHLALTXVideoTransformer3DModel,
        MHLAMochiTransformer3DModel,
        MHLAPixArtTransformer2DModel,
        MHLAQwenImageTransformer2DModel,
        MHLASanaTransformer2DModel,
        MHLASanaVideoTransformer3DModel,
        MHLASD3Transformer2DModel,
        MHLASkyReelsV2Transformer3DModel,
        MHLAWanAnimateTransformer3DModel,
        MHLAWanTransformer3DModel,
        MHLAWanVACETransformer3DModel,
        MHLAZImageTransformer2DModel,
        OriginalDiTTransformer2DModel,
        inject,
        load_adapter,
        restore,
        save_adapter,
        summary,
        unload_adapter,
    )
    from mhla_gen.models.language import (
        MHLALlamaForCausalLM,
        MHLAMistralForCausalLM,
        MHLAQwen2ForCausalLM,
        MHLAQwen3ForCausalLM,
    )
    from mhla_gen.models.vision import MHLAVisionTransformer, MHLAVisionTransformerDistilled
    from mhla_gen.pipelines.class_conditional import ClassConditionalPipeline
    from mhla_gen.pipelines.clip_stream import stream_clip

# Where names are that `mhla_gen.models` does not have. diffusers looks up ModelMixin in the package
# of a saved component before it loads the component.
_HOMES = {
    "ModelMixin": "diffusers.models.modeling_utils",
    "CausalMHLAConfig": "mhla_gen.config",
    "LinformerConfig": "mhla_gen.config",
    "MHLAConfig": "mhla_gen.config",
    "load_config": "mhla_gen.config",
    "MHLALlamaForCausalLM": "mhla_gen.models.language",
    "MHLAMistralForCausalLM": "mhla_gen.models.language",
    "MHLAQwen2ForCausalLM": "mhla_gen.models.language",
    "MHLAQwen3ForCausalLM": "mhla_gen.models.language",
    "MHLAVisionTransformer": "mhla_gen.models.vision",
    "MHLAVisionTransformerDistilled": "mhla_gen.models.vision",
    "ClassConditionalPipeline": "mhla_gen.pipelines.class_conditional",
    "stream_clip": "mhla_gen.pipelines.clip_stream",
}

__all__ = [
    "MHLA",
    "CausalMHLAConfig",
    "ClassConditionalPipeline",
    "ClipState",
    "LinformerConfig",
    "MHLACogVideoXTransformer3DModel",
    "MHLAConfig",
    "MHLACosmosTransformer3DModel",
    "MHLADiTTransformer2DModel",
    "MHLAFlux2Transformer2DModel",
    "MHLAFluxTransformer2DModel",
    "MHLAHunyuanDiT2DModel",
    "MHLAHunyuanVideo15Transformer3DModel",
    "MHLAHunyuanVideoTransformer3DModel",
    "MHLAKandinsky5Transformer3DModel",
    "MHLALTX2VideoTransformer3DModel",
    "MHLALTXVideoTransformer3DModel",
    "MHLALlamaForCausalLM",
    "MHLAMistralForCausalLM",
    "MHLAMochiTransformer3DModel",
    "MHLAPixArtTransformer2DModel",
    "MHLAQwen2ForCausalLM",
    "MHLAQwen3ForCausalLM",
    "MHLAQwenImageTransformer2DModel",
    "MHLASD3Transformer2DModel",
    "MHLASanaTransformer2DModel",
    "MHLASanaVideoTransformer3DModel",
    "MHLASkyReelsV2Transformer3DModel",
    "MHLAVisionTransformer",
    "MHLAVisionTransformerDistilled",
    "MHLAWanAnimateTransformer3DModel",
    "MHLAWanTransformer3DModel",
    "MHLAWanVACETransformer3DModel",
    "MHLAZImageTransformer2DModel",
    "ModelMixin",
    "OriginalDiTTransformer2DModel",
    "__version__",
    "inject",
    "load_adapter",
    "load_config",
    "restore",
    "save_adapter",
    "stream_clip",
    "summary",
    "unload_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "mhla_gen.models")), name)


def __dir__() -> list[str]:
    return sorted(__all__)
