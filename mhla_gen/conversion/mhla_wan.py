"""Checkpoints of the MHLA authors' Wan (text to video).

The names are those of the original Wan but for what MHLA adds to self-attention. As built by the
released code, a layer has no denominator and RMS-normalises every head's output; a gate or a
convolution may follow, but not both: theirs adds the convolution behind the gate, ours before it.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mhla_gen.config import MHLAConfig
from mhla_gen.conversion.keys import (
    Converted,
    inverse,
    refuse_other_settings,
    shape,
    translated,
)
from mhla_gen.errors import UserError
from mhla_gen.models.families.wan import MHLAWanTransformer3DModel

KIND = "a checkpoint of the MHLA authors' text-to-video Wan"

_ATTENTION = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
}
_NAMES = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    **{f"blocks.{{}}.self_attn.{k}": f"blocks.{{}}.attn1.{v}" for k, v in _ATTENTION.items()},
    **{f"blocks.{{}}.cross_attn.{k}": f"blocks.{{}}.attn2.{v}" for k, v in _ATTENTION.items()},
    "blocks.{}.norm3": "blocks.{}.norm2",
    "blocks.{}.ffn.0": "blocks.{}.ffn.net.0.proj",
    "blocks.{}.ffn.2": "blocks.{}.ffn.net.2",
    "blocks.{}.modulation": "blocks.{}.scale_shift_table",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
    "blocks.{}.self_attn.g_norm": "blocks.{}.attn1.mhla.norm",
    "blocks.{}.self_attn.g": "blocks.{}.attn1.mhla.gate",
    "blocks.{}.self_attn.lepe": "blocks.{}.attn1.mhla.conv",
    "blocks.{}.self_attn.block_attn.conv.weight": "blocks.{}.attn1.mhla.mixing",
}

# What the authors' model has no switch for, by the names of MHLAConfig and of Wan's config.
_FIXED = {
    "exact": 0.0,
    "feature_map": "relu",
    "magnitude": False,
    "normalize": False,
    "output_norm": True,
    "mixing_per_head": False,
    "conv_kernel_size": 3,
}
_FIXED_WAN = {"qk_norm": "rms_norm_across_heads", "eps": 1e-6, "image_dim": None}
_BOTH = "the authors' code adds the convolution behind the gate and ours before it"


def read(state: Mapping[str, Tensor], layout: tuple[int, ...] | None = None) -> Converted:
    """The MHLA Wan that equals a checkpoint of the authors.

    Args:
        state: Weights by the authors' names.
        layout: Blocks along frames, height and width, which the weights do not tell.

    Raises:
        ValueError: If it is a checkpoint of something else, or cannot be represented exactly.
    """
    hidden_size, in_channels, *patch_size = shape(state, "patch_embedding.weight", KIND)
    converted = translated(state, _NAMES, KIND)
    layers = [int(key.split(".")[1]) for key in converted if key.endswith(".mhla.mixing")]
    if not layers:
        raise UserError(f"not {KIND}: no layer has a mixing matrix (self_attn.block_attn)")
    first = f"blocks.{min(layers)}.self_attn"
    _check_layout(layout, shape(state, f"{first}.block_attn.conv.weight", KIND)[0])
    conv, gate = f"{first}.lepe.weight" in state, f"{first}.g.weight" in state
    if conv and gate:
        raise UserError(f"a layer has a gate and a convolution: {_BOTH}")
    head_dim = shape(state, f"{first}.g_norm.weight", KIND)[0]
    config = MHLAConfig(layout=layout, layers=layers, conv=conv, gate=gate, **_FIXED)
    arguments = {
        "patch_size": tuple(patch_size),
        "num_attention_heads": hidden_size // head_dim,
        "attention_head_dim": head_dim,
        "in_channels": in_channels,
        "out_channels": shape(state, "head.head.weight", KIND)[0] // math.prod(patch_size),
        "text_dim": shape(state, "text_embedding.0.weight", KIND)[1],
        "freq_dim": shape(state, "time_embedding.0.weight", KIND)[1],
        "ffn_dim": shape(state, "blocks.0.ffn.0.weight", KIND)[0],
        "num_layers": len({key.split(".")[1] for key in state if key.startswith("blocks.")}),
        "cross_attn_norm": "blocks.0.norm3.weight" in state,
        **_FIXED_WAN,
        "mhla": config.to_dict(),
    }
    return Converted(MHLAWanTransformer3DModel, arguments, converted, dict(state))


def write(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """The authors' weights of an MHLA Wan; the inverse of `read`.

    Args:
        state: Weights by our names.
        settings: The model's config.

    Raises:
        ValueError: If the authors' model cannot express ours.
    """
    mhla = MHLAConfig.from_dict(settings["mhla"]).to_dict()
    refuse_other_settings(mhla, _FIXED, "the authors' Wan")
    refuse_other_settings(settings, _FIXED_WAN, "the authors' Wan")
    if mhla["conv"] and mhla["gate"]:
        raise UserError(f"the model has a gate and a convolution: {_BOTH}")
    if not isinstance(mhla["gate"], bool):
        raise UserError(
            f"the authors' Wan has a gate for each channel or none, but the model has "
            f"gate={mhla['gate']}"
        )
    return translated(state, inverse(_NAMES), "a text-to-video Wan")


def _check_layout(layout: tuple[int, ...] | None, num_blocks: int) -> None:
    if layout is None or len(layout) != 3 or math.prod(layout) != num_blocks:
        known = ", for the released training settings (3, 5, 10)" if num_blocks == 150 else ""
        raise UserError(
            f"the mixing matrices are for {num_blocks} blocks: give layout, the blocks along "
            f"frames, height and width that multiply to it{known}; found {layout}"
        )
