"""MHLA inside diffusers transformers."""

from mhla_gen.models.adapters import load_adapter, save_adapter, unload_adapter
from mhla_gen.models.attention import MHLA
from mhla_gen.models.clip_state import ClipState
from mhla_gen.models.cogvideox import MHLACogVideoXTransformer3DModel
from mhla_gen.models.cosmos import MHLACosmosTransformer3DModel
from mhla_gen.models.dit import MHLADiTTransformer2DModel, OriginalDiTTransformer2DModel
from mhla_gen.models.flux import MHLAFlux2Transformer2DModel, MHLAFluxTransformer2DModel
from mhla_gen.models.frame_causal import FrameCausalMHLA
from mhla_gen.models.hunyuan_dit import MHLAHunyuanDiT2DModel
from mhla_gen.models.hunyuan_video import (
    MHLAHunyuanVideo15Transformer3DModel,
    MHLAHunyuanVideoTransformer3DModel,
)
from mhla_gen.models.injection import inject, restore
from mhla_gen.models.kandinsky5 import MHLAKandinsky5Transformer3DModel
from mhla_gen.models.linformer import Linformer
from mhla_gen.models.ltx import MHLALTXVideoTransformer3DModel
from mhla_gen.models.ltx2 import MHLALTX2VideoTransformer3DModel
from mhla_gen.models.mochi import MHLAMochiTransformer3DModel
from mhla_gen.models.overview import LayerSummary, Summary, summary
from mhla_gen.models.pixart import MHLAPixArtTransformer2DModel
from mhla_gen.models.qwen_image import MHLAQwenImageTransformer2DModel
from mhla_gen.models.sana import MHLASanaTransformer2DModel
from mhla_gen.models.sana_video import MHLASanaVideoTransformer3DModel
from mhla_gen.models.sd3 import MHLASD3Transformer2DModel
from mhla_gen.models.wan import MHLAWanTransformer3DModel
from mhla_gen.models.wan_variants import (
    MHLASkyReelsV2Transformer3DModel,
    MHLAWanAnimateTransformer3DModel,
    MHLAWanVACETransformer3DModel,
)
from mhla_gen.models.z_image import MHLAZImageTransformer2DModel

__all__ = [
    "MHLA",
    "ClipState",
    "FrameCausalMHLA",
    "LayerSummary",
    "Linformer",
    "MHLACogVideoXTransformer3DModel",
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
    "MHLAMochiTransformer3DModel",
    "MHLAPixArtTransformer2DModel",
    "MHLAQwenImageTransformer2DModel",
    "MHLASD3Transformer2DModel",
    "MHLASanaTransformer2DModel",
    "MHLASanaVideoTransformer3DModel",
    "MHLASkyReelsV2Transformer3DModel",
    "MHLAWanAnimateTransformer3DModel",
    "MHLAWanTransformer3DModel",
    "MHLAWanVACETransformer3DModel",
    "MHLAZImageTransformer2DModel",
    "OriginalDiTTransformer2DModel",
    "Summary",
    "inject",
    "load_adapter",
    "restore",
    "save_adapter",
    "summary",
    "unload_adapter",
]
