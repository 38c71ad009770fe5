"""MHLA inside diffusers transformers."""

from mhla_gen.models.adapters import load_adapter, save_adapter, unload_adapter
from mhla_gen.models.attention import MHLA
from mhla_gen.models.clip_state import ClipState
from mhla_gen.models.families import (
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
)
from mhla_gen.models.families.dit import OriginalDiTTransformer2DModel
from mhla_gen.models.frame_causal import FrameCausalMHLA
from mhla_gen.models.injection import inject, restore
from mhla_gen.models.linformer import Linformer
from mhla_gen.models.overview import LayerSummary, Summary, summary

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
