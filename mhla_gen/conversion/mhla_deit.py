"""Checkpoints of the MHLA authors' DeiT.

The names are those of timm's ViT but for attention, which is that of their DiT, with a 5 × 5
convolution and, as a rule, normalised queries and keys. As there, no weights make our model compute
what the released code does; see `mhla_dit`. Images are padded to 16 × 16 patches before they reach
the model, so the model is one for that size.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mhla_gen.config import MHLAConfig
from mhla_gen.conversion.keys import (
    Converted,
    inverse,
    refuse_unknown,
    rename,
    shape,
)
from mhla_gen.conversion.mhla_dit import FIXED, LAYER_NORM, NORMALIZER, refuse_unwritable
from mhla_gen.errors import UserError
from mhla_gen.models.vision import MHLAVisionTransformer

KIND = "a checkpoint of the MHLA authors' DeiT"

_SAME = (
    *("patch_embed.proj", "blocks.{}.norm1", "blocks.{}.norm2", "blocks.{}.mlp.fc1"),
    *("blocks.{}.mlp.fc2", "fc_norm", "head", "pos_embed"),
)
_NAMES = {
    **{name: name for name in _SAME},
    "blocks.{}.attn.to_qkv": "blocks.{}.attn.qkv",
    "blocks.{}.attn.to_out.0": "blocks.{}.attn.proj",
    "blocks.{}.attn.lepe": "blocks.{}.attn.mhla.conv",
}
_MIXING = re.compile(r"blocks\.(\d+)\.attn\.piece_attn\.conv\.weight")
_OURS = re.compile(r"blocks\.(\d+)\.attn\.mhla\.mixing")
_HEADS = {192: 3, 384: 6, 768: 12}
_NORMS = (
    "the released code RMS-normalises queries and keys over all heads, timm's attention each head; "
    "here their scale is folded into the projections and the normalisation itself is left out"
)


def read(
    state: Mapping[str, Tensor],
    num_attention_heads: int | None = None,
    *,
    normalizer: str = "released",
    allow_differences: bool = False,
) -> Converted:
    """The MHLA ViT that equals a checkpoint of the authors, or comes close.

    Args:
        state: Weights by the authors' names.
        num_attention_heads: Heads; None takes those of DeiT-T, S and B by width.
        normalizer: As for `mhla_dit.read`.
        allow_differences: Read it although it computes something else here.

    Raises:
        ValueError: If it is a checkpoint of something else, or cannot be represented exactly and
            differences are not allowed.
    """
    num_blocks = shape(state, "blocks.0.attn.piece_attn.conv.weight", KIND)[0]
    width, channels, patch, _ = shape(state, "patch_embed.proj.weight", KIND)
    num_patches = shape(state, "pos_embed", KIND)[1]
    layout_side, side = math.isqrt(num_blocks), math.isqrt(num_patches)
    mixing = [tensor for key, tensor in state.items() if _MIXING.fullmatch(key)]
    if any(tuple(m.shape) != (layout_side**2, layout_side**2, 1, 1) for m in mixing):
        raise UserError(f"{KIND} has mixing matrices [M, M, 1, 1] of one square number M")
    if side**2 != num_patches:
        raise UserError(f"{KIND} has a square number of positions, found {num_patches}")
    num_heads = num_attention_heads or _HEADS.get(width)
    if num_heads is None:
        raise UserError(f"set num_attention_heads: no published DeiT has {width} channels")
    differences = _differences(state, normalizer, num_blocks)
    if differences and not allow_differences:
        raise UserError(
            f"this checkpoint would compute another function: {'; '.join(differences)}. As a start "
            "for training it can be read with allow_differences=true"
        )
    source = _without_norms(state)
    translated, unknown = {}, []
    for key, tensor in source.items():
        if match := _MIXING.fullmatch(key):
            translated[f"blocks.{match[1]}.attn.mhla.mixing"] = tensor[:, :, 0, 0]
        elif new := rename(key, _NAMES):
            translated[new] = tensor
        else:
            unknown.append(key)
    refuse_unknown(unknown, KIND)
    config = MHLAConfig(
        layout=(layout_side, layout_side),
        conv_kernel_size=shape(state, "blocks.0.attn.lepe.weight", KIND)[-1],
        **FIXED,
    )
    model_args = {
        "img_size": patch * side,
        "patch_size": patch,
        "in_chans": channels,
        "num_classes": shape(state, "head.weight", KIND)[0],
        "embed_dim": width,
        "num_heads": num_heads,
        "depth": len(mixing),
        "mlp_ratio": shape(state, "blocks.0.mlp.fc1.weight", KIND)[0] / width,
        "qkv_bias": "blocks.0.attn.to_qkv.bias" in source,
        "class_token": False,
        "global_pool": "avg",
    }
    return Converted(
        MHLAVisionTransformer,
        {
            "architecture": "deit_tiny_patch16_224",
            "model_args": model_args,
            "mhla": config.to_dict(),
        },
        translated,
        source,
        tuple(differences),
    )


def write(
    state: Mapping[str, Tensor], settings: Mapping[str, Any], *, normalizer: str = "released"
) -> dict[str, Tensor]:
    """The authors' weights of an MHLA ViT; the inverse of `read`.

    Args:
        state: Weights by our names.
        settings: `mhla`, the settings of its attention.
        normalizer: What the code that will load them divides by.

    Raises:
        ValueError: If the authors' model cannot express ours.
    """
    refuse_unwritable(settings, normalizer, "DeiT")
    back, converted, unknown = inverse(_NAMES), {}, []
    for key, tensor in state.items():
        if match := _OURS.fullmatch(key):
            name = f"blocks.{match[1]}.attn.piece_attn.conv.weight"
            converted[name] = tensor[:, :, None, None]
        elif new := rename(key, back):
            converted[new] = tensor
        else:
            unknown.append(key)
    refuse_unknown(unknown, "the authors' DeiT")
    matrices = sum(".piece_attn." in key for key in converted)
    if matrices != sum(key.endswith(".attn.to_qkv.weight") for key in converted):
        raise UserError("the authors' DeiT has MHLA in every layer; some layers here are softmax")
    return converted


def _differences(state: Mapping[str, Tensor], normalizer: str, num_blocks: int) -> list[str]:
    found = []
    if any(".attn.norm." in key for key in state):
        found.append(LAYER_NORM)
    if any(re.search(r"\.attn\.[qk]_norm\.", key) for key in state):
        found.append(_NORMS)
    if normalizer == "released" and num_blocks > 1:
        found.append(NORMALIZER)
    return found


def _without_norms(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fold scale and shift of `attn.norm`, and scales of q_norm and k_norm, into `to_qkv`."""
    norms = re.compile(r"(blocks\.\d+\.attn\.)(norm|q_norm|k_norm)\.(weight|bias)")
    kept = {key: tensor for key, tensor in state.items() if not norms.fullmatch(key)}
    for name in sorted({m[1] for key in state if (m := norms.fullmatch(key))}):
        weight = state[f"{name}to_qkv.weight"]
        wide, bias = weight.double(), state.get(f"{name}to_qkv.bias")
        if f"{name}norm.weight" in state:
            shift = torch.mv(wide, state[f"{name}norm.bias"].double())
            bias = shift if bias is None else bias.double() + shift
            wide = wide * state[f"{name}norm.weight"].double()
        ones = torch.ones(len(wide) // 3, dtype=torch.float64)
        scales = [state.get(f"{name}{part}_norm.weight", ones).double() for part in "qk"]
        scale = torch.cat((*scales, ones))
        kept[f"{name}to_qkv.weight"] = (wide * scale[:, None]).to(weight.dtype)
        if bias is not None:
            kept[f"{name}to_qkv.bias"] = (bias.double() * scale).to(weight.dtype)
    return kept
