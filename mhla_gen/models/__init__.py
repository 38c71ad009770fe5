"""MHLA inside diffusers transformers."""

from mhla_gen.models.attention import MHLA
from mhla_gen.models.dit import MHLADiTTransformer2DModel, OriginalDiTTransformer2DModel
from mhla_gen.models.hunyuan_dit import MHLAHunyuanDiT2DModel
from mhla_gen.models.injection import LayerSummary, Summary, inject, restore, summary
from mhla_gen.models.kandinsky5 import MHLAKandinsky5Transformer3DModel
from mhla_gen.models.ltx import MHLALTXVideoTransformer3DModel
from mhla_gen.models.pixart import MHLAPixArtTransformer2DModel
from mhla_gen.models.sana_video import MHLASanaVideoTransformer3DModel
from mhla_gen.models.wan import MHLAWanTransformer3DModel

__all__ = [
    "MHLA",
    "LayerSummary",
    "MHLADiTTransformer2DModel",
    "MHLAHunyuanDiT2DModel",
    "MHLAKandinsky5Transformer3DModel",
    "MHLALTXVideoTransformer3DModel",
    "MHLAPixArtTransformer2DModel",
    "MHLASanaVideoTransformer3DModel",
    "MHLAWanTransformer3DModel",
    "OriginalDiTTransformer2DModel",
    "Summary",
    "inject",
    "restore",
    "summary",
]
