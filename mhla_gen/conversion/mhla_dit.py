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
from mhla_gen.conversion.keys import (
    Converted,
    inverse,
    refuse_other_settings,
    rename,
    shape,
    translated,
)
from mhla_gen.errors import UserError
from mhla_gen.models.families.dit import MHLADiTTransformer2DModel

KIND = "a checkpoint of the MHLA authors' DiT"

# To the original's names; the rest of a block is the same.
_NAMES = {
    "blocks.{}.attn.to_qkv": "blocks.{}.attn.qkv",
    "blocks.{}.attn.to_out.0": "blocks.{}.attn.proj",
}
_ADDED = {
    "blocks.{}.attn.lepe": "transformer_blocks.{}.attn1.mhla.conv",
    "blocks.{}.attn.piece_attn.conv.weight": "transformer_blocks.{}.attn1.mhla.mixing",
}
_MATRIX = ".attn.piece_attn.conv.weight"
_NORM = re.compile(r"(blocks\.\d+\.attn\.)(norm|q_norm|k_norm)\.(weight|bias)")

_LAYER_NORM = (
    "the released code normalises the input of attention once more (attn.norm); here its scale and "
    "shift are folded into the projections and the normalisation itself is left out"
)
_NORMS = (
    "the released code RMS-normalises queries and keys over all heads, timm's attention each head; "
    "here their scale is folded into the projections and the normalisation itself is left out"
)
_NORMALIZER = (
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
    config = config_of(state, KIND)
    if any(re.search(r"\.attn\.[qk]_norm\.", key) for key in state):
        raise UserError("the checkpoint normalises queries and keys, which diffusers' DiT cannot")
    differences = differences_of(state, config, normalizer, allow_differences)
    source = without_norms(state)
    ours = {key: tensor for key, tensor in source.items() if rename(key, _ADDED)}
    base = {rename(k, _NAMES) or k: tensor for k, tensor in source.items() if k not in ours}
    converted = original_dit.read(base, num_attention_heads)
    return Converted(
        MHLADiTTransformer2DModel,
        {**converted.arguments, "mhla": config.to_dict()},
        converted.state | translated(ours, _ADDED, KIND),
        source,
        differences,
    )


def config_of(state: Mapping[str, Tensor], kind: str) -> MHLAConfig:
    """Settings of attention of the authors' DiT or DeiT.

    Raises:
        ValueError: If the weights are of something else.
    """
    side = math.isqrt(shape(state, f"blocks.0{_MATRIX}", kind)[0])
    mixing = [tensor for key, tensor in state.items() if key.endswith(_MATRIX)]
    if any(tuple(m.shape) != (side**2, side**2, 1, 1) for m in mixing):
        found = ", ".join(sorted({str(list(m.shape)) for m in mixing}))
        raise UserError(f"{kind} has mixing matrices [M, M, 1, 1] of one square M, found {found}")
    width = shape(state, "blocks.0.attn.lepe.weight", kind)[-1]
    return MHLAConfig(layout=(side, side), conv_kernel_size=width, **FIXED)


def differences_of(
    state: Mapping[str, Tensor], config: MHLAConfig, normalizer: str, allowed: bool
) -> tuple[str, ...]:
    """Where our model computes something other than the authors' code; arguments as for `read`.

    Raises:
        ValueError: If it does somewhere, and that is not allowed.
    """
    found = {
        _LAYER_NORM: any(".attn.norm." in key for key in state),
        _NORMS: any(re.search(r"\.attn\.[qk]_norm\.", key) for key in state),
        _NORMALIZER: normalizer == "released" and math.prod(config.layout) > 1,
    }
    differences = tuple(text for text, there in found.items() if there)
    if differences and not allowed:
        raise UserError(
            f"this checkpoint would compute another function: {'; '.join(differences)}. To "
            "import it as a starting point for training, set allow_differences=true"
        )
    return differences


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
    back = inverse(_ADDED)
    ours = {key: tensor for key, tensor in state.items() if rename(key, back)}
    base = {key: tensor for key, tensor in state.items() if key not in ours}
    converted = translated(ours, back, KIND)
    if len(converted) != 3 * settings["num_layers"]:
        raise UserError("the authors' DiT has MHLA in every layer; some layers here are softmax")
    for key, tensor in original_dit.write(base, settings).items():
        converted[rename(key, inverse(_NAMES)) or key] = tensor
    return converted


def without_norms(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fold scale and shift of `attn.norm`, and scales of q_norm and k_norm, into `to_qkv`."""
    kept = {key: tensor for key, tensor in state.items() if not _NORM.fullmatch(key)}
    for name in sorted({m[1] for key in state if (m := _NORM.fullmatch(key))}):
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
