"""Checkpoints of facebookresearch/DiT.

The original has one timestep and one label embedder, diffusers a copy in every block; it fuses
query, key and value into one projection; and it embeds timesteps at other frequencies, which
`OriginalDiTTransformer2DModel` carries.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.embeddings import PatchEmbed
from torch import Tensor

from mhla_gen.conversion.keys import (
    Converted,
    inverse,
    refuse_other_settings,
    refuse_unknown,
    rename,
    shape,
)
from mhla_gen.errors import UserError
from mhla_gen.models.families.dit import OriginalDiTTransformer2DModel

KIND = "a facebookresearch/DiT checkpoint"

_NAMES = {
    "x_embedder.proj": "pos_embed.proj",
    "blocks.{}.adaLN_modulation.1": "transformer_blocks.{}.norm1.linear",
    "blocks.{}.attn.proj": "transformer_blocks.{}.attn1.to_out.0",
    "blocks.{}.mlp.fc1": "transformer_blocks.{}.ff.net.0.proj",
    "blocks.{}.mlp.fc2": "transformer_blocks.{}.ff.net.2",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
# One in the original, one a block in diffusers.
_EMBEDDERS = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}
_FUSED = re.compile(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)")
_SPLIT = re.compile(r"transformer_blocks\.(\d+)\.attn1\.to_([qkv])\.(weight|bias)")
_COPIED = re.compile(r"transformer_blocks\.(\d+)\.norm1\.emb\.(.+)")

# Heads leave no trace in the weights; these are the published sizes, S, B, L and XL.
_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
# What the original has no switch for.
_FIXED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "timestep_freq_shift": 0.0,
}


def read(state: Mapping[str, Tensor], num_attention_heads: int | None = None) -> Converted:
    """The softmax DiT that equals a checkpoint of the original.

    Args:
        state: Weights by the original's names.
        num_attention_heads: Heads; None takes those of the published model of this width.

    Raises:
        ValueError: If it is a checkpoint of something else, or cannot be represented exactly.
    """
    hidden_size, in_channels, patch_size, _ = shape(state, "x_embedder.proj.weight", KIND)
    num_layers = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    converted, unknown = {}, []
    for key, tensor in state.items():
        if new := rename(key, _NAMES):
            converted[new] = tensor
        elif new := rename(key, _EMBEDDERS):
            for block in range(num_layers):
                converted[f"transformer_blocks.{block}.norm1.emb.{new}"] = tensor
        elif match := _FUSED.fullmatch(key):
            for name, part in zip("qkv", tensor.chunk(3), strict=True):
                converted[f"transformer_blocks.{match[1]}.attn1.to_{name}.{match[2]}"] = part
        elif key != "pos_embed":
            unknown.append(key)
    refuse_unknown(unknown, KIND)

    heads = num_attention_heads or _HEADS.get(hidden_size)
    if num_attention_heads and hidden_size % num_attention_heads:
        raise UserError(
            f"num_attention_heads must be a divisor of the hidden size {hidden_size}, found "
            f"{num_attention_heads}"
        )
    if heads is None or hidden_size % heads:
        raise UserError(
            "the weights do not determine the number of heads: set num_attention_heads, a divisor "
            f"of the hidden size {hidden_size}"
        )
    sample_size = math.isqrt(shape(state, "pos_embed", KIND)[1]) * patch_size
    _check_positions(state["pos_embed"], sample_size, patch_size)
    arguments = {
        "num_attention_heads": heads,
        "attention_head_dim": hidden_size // heads,
        "in_channels": in_channels,
        "out_channels": shape(state, "final_layer.linear.weight", KIND)[0] // patch_size**2,
        "num_layers": num_layers,
        "sample_size": sample_size,
        "patch_size": patch_size,
        # The last row of the table is "no class".
        "num_embeds_ada_norm": shape(state, "y_embedder.embedding_table.weight", KIND)[0] - 1,
        **_FIXED,
    }
    return Converted(OriginalDiTTransformer2DModel, arguments, converted, dict(state))


def write(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """The original's weights of a softmax DiT; the inverse of `read`.

    Args:
        state: Weights by diffusers' names.
        settings: The model's config.

    Raises:
        ValueError: If the original cannot express the model.
    """
    if settings["timestep_freq_shift"] != _FIXED["timestep_freq_shift"]:
        raise UserError(
            "the model embeds timesteps at diffusers' frequencies, which the original DiT does not "
            "have; if its weights came from the original, load them with "
            "OriginalDiTTransformer2DModel.from_pretrained(folder, norm_eps=1e-6) and save that"
        )
    refuse_other_settings(settings, _FIXED, "the original DiT")
    converted: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    names, embedders = inverse(_NAMES), inverse(_EMBEDDERS)
    unknown = []
    for key, tensor in state.items():
        if new := rename(key, names):
            converted[new] = tensor
        elif match := _SPLIT.fullmatch(key):
            parts.setdefault(f"blocks.{match[1]}.attn.qkv.{match[3]}", {})[match[2]] = tensor
        elif (match := _COPIED.fullmatch(key)) and (new := rename(match[2], embedders)):
            if not torch.equal(converted.setdefault(new, tensor), tensor):
                raise UserError(
                    f"block {match[1]} has another {match[2]} than block 0: the original DiT has "
                    "one for all blocks, and training in diffusers moved them apart"
                )
        else:
            unknown.append(key)
    refuse_unknown(unknown, "a softmax DiT")
    converted |= {key: torch.cat([part[n] for n in "qkv"]) for key, part in parts.items()}
    proj = converted["x_embedder.proj.weight"]
    converted["pos_embed"] = _positions(
        settings["sample_size"], settings["patch_size"], proj.shape[0]
    ).to(proj.dtype)
    return converted


def _positions(sample_size: int, patch_size: int, hidden_size: int) -> Tensor:
    embed = PatchEmbed(sample_size, sample_size, patch_size, embed_dim=hidden_size)
    return embed.pos_embed.clone()  # type: ignore[operator]


def _check_positions(found: Tensor, sample_size: int, patch_size: int) -> None:
    """Refuse positions other than the sine-cosine table that diffusers computes by itself."""
    fixed = _positions(sample_size, patch_size, found.shape[-1])
    # The original's table was rounded elsewhere: 3e-8 in float32, a half-precision digit otherwise.
    tolerance = 1e-5 if found.dtype in (torch.float32, torch.float64) else 1e-2
    if found.shape != fixed.shape or (found.float() - fixed).abs().max() > tolerance:
        raise UserError(
            "pos_embed is not DiT's fixed sine-cosine table of a square grid in raster order, the "
            "only one that diffusers has"
        )
