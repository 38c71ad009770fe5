"""Checkpoints of the MHLA authors' DiT.

The names are those of the original DiT but for attention. The released code is not the paper's
equation: it sends the input of attention through a second LayerNorm, and it normalises a token by
the queries that other blocks have at the same place. No weights make our model compute either, so
such a checkpoint is only read as a starting point, on request.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mhla_gen.config import MHLAConfig
from mhla_gen.conversion import original_dit
from mhla_gen.conversion.keys import Converted, refuse_other_settings, rename, shape
from mhla_gen.errors import UserError
from mhla_gen.models.dit import MHLADiTTransformer2DModel

KIND = "a checkpoint of the MHLA authors' DiT"

# To the original's names; the rest of a block is the same.
_NAMES = {
    "blocks.{}.attn.to_qkv": "blocks.{}.attn.qkv",
    "blocks.{}.attn.to_out.0": "blocks.{}.attn.proj",
}
_NAMES_BACK = {new: old for old, new in _NAMES.items()}
_CONV = {"blocks.{}.attn.lepe": "transformer_blocks.{}.attn1.mhla.conv"}
_CONV_BACK = {new: old for old, new in _CONV.items()}
_MIXING = re.compile(r"blocks\.(\d+)\.attn\.piece_attn\.conv\.weight")
_OURS = re.compile(r"transformer_blocks\.(\d+)\.attn1\.mhla\.mixing")

LAYER_NORM = (
    "the released code normalises the input of attention once more (attn.norm); here its scale and "
    "shift are folded into the projections and the normalisation itself is left out"
)
NORMALIZER = (
    "the released code divides a token by a sum over other blocks' queries; here by Eq. 4 of the "
    "paper"
)
# What the authors' model has no switch for, by the names of MHLAConfig.
FIXED = {
    "exact": 0.0,
    "feature_map": "relu",
    "magnitude": False,
    "normalize": True,
    "conv": True,
    "gate": False,
    "output_norm": False,
    "mixing_per_head": False,
    "eps": 1e-6,
}


def read(
    state: Mapping[str, Tensor],
    num_attention_heads: int | None = None,
    *,
    normalizer: str = "released",
    allow_differences: bool = False,
) -> Converted:
    """The MHLA DiT that equals a checkpoint of the authors, or comes close.

    Args:
        state: Weights by the authors' names.
        num_attention_heads: Heads; None takes those of the published model of this width.
        normalizer: What the code that made the checkpoint divides by, which its weights do not
            tell: `released`, or `paper` for code that was mended.
        allow_differences: Read it although it computes something else here.

    Raises:
        ValueError: If it is a checkpoint of something else, or cannot be represented exactly and
            differences are not allowed.
    """
    mixing = {m[1]: tensor for key, tensor in state.items() if (m := _MIXING.fullmatch(key))}
    num_blocks = shape(state, "blocks.0.attn.piece_attn.conv.weight", KIND)[0]
    side = math.isqrt(num_blocks)
    if any(tuple(m.shape) != (side**2, side**2, 1, 1) for m in mixing.values()):
        raise UserError(f"{KIND} has mixing matrices [M, M, 1, 1] of one square number M")
    if any(re.search(r"\.attn\.[qk]_norm\.", key) for key in state):
        raise UserError("the checkpoint normalises queries and keys, which diffusers' DiT cannot")

    differences = []
    if any(".attn.norm." in key for key in state):
        differences.append(LAYER_NORM)
    if normalizer == "released" and num_blocks > 1:
        differences.append(NORMALIZER)
    if differences and not allow_differences:
        raise UserError(
            f"this checkpoint would compute another function: {'; '.join(differences)}. To "
            "import it as a starting point for training, set allow_differences=true"
        )
    source = _without_layer_norm(state)
    base, added = {}, {}
    for key, tensor in source.items():
        if new := rename(key, _CONV):
            added[new] = tensor
        elif match := _MIXING.fullmatch(key):
            added[f"transformer_blocks.{match[1]}.attn1.mhla.mixing"] = tensor[:, :, 0, 0]
        else:
            base[rename(key, _NAMES) or key] = tensor
    converted = original_dit.read(base, num_attention_heads)
    config = MHLAConfig(
        layout=(side, side),
        conv_kernel_size=shape(state, "blocks.0.attn.lepe.weight", KIND)[-1],
        **FIXED,
    )
    return Converted(
        MHLADiTTransformer2DModel,
        {**converted.arguments, "mhla": config.to_dict()},
        converted.state | added,
        source,
        tuple(differences),
    )


def refuse_unwritable(settings: Mapping[str, Any], normalizer: str, model: str) -> None:
    """Refuse a config that the authors' `model` cannot express, and code that computes otherwise.

    Raises:
        ValueError: With what does not fit.
    """
    if normalizer != "paper":
        raise UserError(
            f"the authors' released {model} computes another function than Eq. 4, and needs a "
            "second LayerNorm that no model of ours has; normalizer=paper writes weights for "
            "mended code"
        )
    mhla = MHLAConfig.from_dict(settings["mhla"]).to_dict()
    refuse_other_settings(mhla, FIXED, f"the authors' {model}")
    if len(set(mhla["layout"])) > 1:
        raise UserError(
            f"the authors' {model} has as many blocks along both axes, not {mhla['layout']}"
        )


def write(
    state: Mapping[str, Tensor], settings: Mapping[str, Any], *, normalizer: str = "released"
) -> dict[str, Tensor]:
    """The authors' weights of an MHLA DiT; the inverse of `read`.

    Args:
        state: Weights by our names.
        settings: The model's config.
        normalizer: What the code that will load them divides by.

    Raises:
        ValueError: If the authors' model cannot express ours.
    """
    refuse_unwritable(settings, normalizer, "DiT")
    base, converted = {}, {}
    for key, tensor in state.items():
        if new := rename(key, _CONV_BACK):
            converted[new] = tensor
        elif match := _OURS.fullmatch(key):
            converted[f"blocks.{match[1]}.attn.piece_attn.conv.weight"] = tensor[:, :, None, None]
        else:
            base[key] = tensor
    if len(converted) != 3 * settings["num_layers"]:
        raise UserError("the authors' DiT has MHLA in every layer; some layers here are softmax")
    for key, tensor in original_dit.write(base, settings).items():
        converted[rename(key, _NAMES_BACK) or key] = tensor
    return converted


def _without_layer_norm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fold the scale and shift of `attn.norm` into the projection behind it."""
    kept = {key: tensor for key, tensor in state.items() if ".attn.norm." not in key}
    for key in state:
        if not key.endswith(".attn.norm.weight"):
            continue
        attn = key.removesuffix("norm.weight")
        weight = state[f"{attn}to_qkv.weight"].double()
        bias = state[f"{attn}to_qkv.bias"].double()
        shift = torch.mv(weight, state[f"{attn}norm.bias"].double())
        dtype = state[key].dtype
        kept[f"{attn}to_qkv.weight"] = (weight * state[key].double()).to(dtype)
        kept[f"{attn}to_qkv.bias"] = (bias + shift).to(dtype)
    return kept
