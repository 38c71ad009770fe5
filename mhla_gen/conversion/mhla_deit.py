"""Checkpoints of the MHLA authors' DeiT.

The names are those of timm's ViT but for attention, which is that of their DiT, with a 5 × 5
convolution and, as a rule, normalised queries and keys. As there, no weights make our model compute
what the released code does; see `mhla_dit`. Images are padded to 16 × 16 patches before they reach
the model, so the model is one for that size.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mhla_gen.conversion.keys import Converted, inverse, shape, translated
from mhla_gen.conversion.mhla_dit import (
    config_of,
    differences_of,
    refuse_unwritable,
    without_norms,
)
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
    "blocks.{}.attn.piece_attn.conv.weight": "blocks.{}.attn.mhla.mixing",
}
_HEADS = {192: 3, 384: 6, 768: 12}


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
    config = config_of(state, KIND)
    width, channels, patch, _ = shape(state, "patch_embed.proj.weight", KIND)
    num_patches = shape(state, "pos_embed", KIND)[1]
    side = math.isqrt(num_patches)
    if side**2 != num_patches:
        raise UserError(f"{KIND} has a square number of positions, found {num_patches}")
    num_heads = num_attention_heads or _HEADS.get(width)
    if num_heads is None:
        raise UserError(f"set num_attention_heads: no published DeiT has {width} channels")
    differences = differences_of(state, config, normalizer, allow_differences)
    source = without_norms(state)
    weights = translated(source, _NAMES, KIND)
    model_args = {
        "img_size": patch * side,
        "patch_size": patch,
        "in_chans": channels,
        "num_classes": shape(state, "head.weight", KIND)[0],
        "embed_dim": width,
        "num_heads": num_heads,
        "depth": sum(key.endswith(".mhla.mixing") for key in weights),
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
        weights,
        source,
        differences,
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
    converted = translated(state, inverse(_NAMES), "the authors' DeiT")
    matrices = sum(".piece_attn." in key for key in converted)
    if matrices != sum(key.endswith(".attn.to_qkv.weight") for key in converted):
        raise UserError("the authors' DeiT has MHLA in every layer; some layers here are softmax")
    return converted
