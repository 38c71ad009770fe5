"""The operators: see `mhla` and `tile_attention`; `naive` modules hold their definitions."""

from mhla_gen.ops.auto_tiles import auto_tiles
from mhla_gen.ops.causal import causal_mhla, distance_mixing, locality_weights
from mhla_gen.ops.causal_state import CausalState
from mhla_gen.ops.depthwise import depthwise_conv
from mhla_gen.ops.dispatch import IMPLEMENTATIONS, linear_attention, mhla, resolve_implementation
from mhla_gen.ops.feature_maps import FEATURE_MAPS
from mhla_gen.ops.frame_causal import (
    FRAME_MIXING_INITS,
    frame_causal_mhla,
    frame_locality,
    frame_mixing,
)
from mhla_gen.ops.frame_state import FrameState
from mhla_gen.ops.linformer import linformer_attention
from mhla_gen.ops.mixing import MIXING_INITS, locality_mixing, uniform_mixing
from mhla_gen.ops.partition import auto_layout, block_starts
from mhla_gen.ops.tile_attention import TILE_IMPLEMENTATIONS, tile_attention
from mhla_gen.ops.tiles import TileLayout, tile_share
from mhla_gen.ops.window import window_attention
from mhla_gen.ops.window_state import WindowState

__all__ = [
    "FEATURE_MAPS",
    "FRAME_MIXING_INITS",
    "IMPLEMENTATIONS",
    "MIXING_INITS",
    "TILE_IMPLEMENTATIONS",
    "CausalState",
    "FrameState",
    "TileLayout",
    "WindowState",
    "auto_layout",
    "auto_tiles",
    "block_starts",
    "causal_mhla",
    "depthwise_conv",
    "distance_mixing",
    "frame_causal_mhla",
    "frame_locality",
    "frame_mixing",
    "linear_attention",
    "linformer_attention",
    "locality_mixing",
    "locality_weights",
    "mhla",
    "resolve_implementation",
    "tile_attention",
    "tile_share",
    "uniform_mixing",
    "window_attention",
]
