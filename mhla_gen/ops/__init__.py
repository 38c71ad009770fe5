"""The operator. `naive` is the definition; `blockwise` runs anywhere; see `mhla`."""

from mhla_gen.ops.depthwise import depthwise_conv
from mhla_gen.ops.dispatch import IMPLEMENTATIONS, linear_attention, mhla, resolve_implementation
from mhla_gen.ops.feature_maps import FEATURE_MAPS
from mhla_gen.ops.linformer import linformer_attention
from mhla_gen.ops.mixing import MIXING_INITS, locality_mixing, uniform_mixing
from mhla_gen.ops.partition import auto_layout, block_starts

__all__ = [
    "FEATURE_MAPS",
    "IMPLEMENTATIONS",
    "MIXING_INITS",
    "auto_layout",
    "block_starts",
    "depthwise_conv",
    "linear_attention",
    "linformer_attention",
    "locality_mixing",
    "mhla",
    "resolve_implementation",
    "uniform_mixing",
]
