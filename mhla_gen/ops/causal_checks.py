"""Checks of causal MHLA's arguments."""

import torch
from torch import Tensor

from mhla_gen.errors import UserError
from mhla_gen.ops.dispatch import check_alike, check_feature_map, check_tables
from mhla_gen.ops.partition import check_whole


def check_causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    block_size: int,
    mask: Tensor | None,
    feature_map: str,
    rotary: tuple[Tensor, Tensor] | None,
) -> None:
    """Raise `ValueError` unless everything fits together."""
    check_causal_tokens(query, key, value, mask, rotary)
    check_weights(weights, key.shape[2], block_size, feature_map)
    if weights.device != query.device:
        raise ValueError(f"weights are on {weights.device} but query on {query.device}")


def check_causal_tokens(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    rotary: tuple[Tensor, Tensor] | None,
) -> None:
    """Raise `ValueError` unless tokens, their mask and their tables fit together."""
    if query.ndim != 4 or key.ndim != 4 or value.ndim != 4:
        raise ValueError(
            "query, key and value must be [batch, seq_len, heads, dim], found "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    heads = key.shape[2]
    if query.shape[:2] != key.shape[:2] or query.shape[3] != key.shape[3]:
        raise ValueError(
            f"key must have batch, seq_len and head_dim of query {tuple(query.shape)}, found "
            f"{tuple(key.shape)}"
        )
    if value.shape[:3] != key.shape[:3] or heads == 0 or query.shape[2] % heads:
        raise ValueError(
            "value must have the heads of key, and query a multiple of them, found "
            f"{value.shape[2]}, {heads} and {query.shape[2]} heads"
        )
    check_alike(query, key, value)
    if query.shape[1] == 0:
        raise UserError("query has no tokens; give at least one")
    if query.shape[3] == 0:
        raise ValueError(f"head_dim must be at least 1, found query {tuple(query.shape)}")
    if mask is not None and mask.device != query.device:
        raise ValueError(f"mask is on {mask.device} but query on {query.device}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != query.shape[:2]):
        raise ValueError(
            f"mask must be bool {tuple(query.shape[:2])}, found {mask.dtype} {tuple(mask.shape)}"
        )
    _check_rotary(query, rotary)


def check_weights(weights: Tensor, heads: int | None, block_size: int, feature_map: str) -> None:
    """Raise `ValueError` unless weights, block size and feature map are valid."""
    fits = weights.ndim in (1, 2) and weights.shape[-1] > 0
    if not fits or (weights.ndim == 2 and heads not in (None, weights.shape[0])):
        raise UserError(
            "weights must be [num_distances] or [num_key_heads, num_distances], found "
            f"{tuple(weights.shape)}" + ("" if heads is None else f" for {heads} key heads")
        )
    if not weights.is_floating_point():
        raise UserError(f"weights must be in a floating dtype, found {weights.dtype}")
    check_whole(block_size=block_size)
    if block_size < 1:
        raise UserError(f"block_size must be at least 1, found {block_size}")
    check_feature_map(feature_map)


def check_window(window: int) -> None:
    """Raise `ValueError` unless the window is at least one token."""
    check_whole(window=window)
    if window < 1:
        raise UserError(f"window must be at least 1, found {window}")


def _check_rotary(query: Tensor, rotary: tuple[Tensor, Tensor] | None) -> None:
    if rotary is None:
        return
    batch, seq_len, _, head_dim = query.shape
    shape = (seq_len, head_dim // 2)
    check_tables(query, rotary)
    if len(rotary) != 2 or rotary[0].ndim != rotary[1].ndim:
        raise ValueError(
            "rotary must be (cos, sin) of one shape, found "
            f"{' and '.join(str(tuple(table.shape)) for table in rotary)}"
        )
    for table in rotary:
        if head_dim % 2 or tuple(table.shape) not in (shape, (batch, *shape), (1, *shape)):
            raise ValueError(
                f"rotary must be (cos, sin), each {shape} or {(batch, *shape)} with an even "
                f"head_dim, found {tuple(table.shape)} for head_dim={head_dim}"
            )
