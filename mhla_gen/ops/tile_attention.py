"""The public operator of the exact half: check, choose an implementation, call it."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mhla_gen.errors import UserError
from mhla_gen.ops.dispatch import check_rotary, check_tokens
from mhla_gen.ops.fused_limits import HAS_TRITON, require_triton
from mhla_gen.ops.naive import naive_tile_attention
from mhla_gen.ops.tile_blockwise import blockwise_tile_attention
from mhla_gen.ops.tiles import tiling


def _fused_tile_attention(
    query: Tensor, key: Tensor, value: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    require_triton()
    from mhla_gen.ops.tile_fused import fused_tile_attention

    return fused_tile_attention(query, key, value, **options)


TILE_IMPLEMENTATIONS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "naive": naive_tile_attention,
    "blockwise": blockwise_tile_attention,
    "fused": _fused_tile_attention,
}


def tile_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: Sequence[int],
    tile: Sequence[int],
    window: Sequence[int],
    top: int,
    group: Sequence[int] | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    extra: tuple[Tensor, ...] | None = None,
    scale: float | None = None,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Exact softmax attention of every query over a small part of the token grid.

    Let T(n) be the tokens that query n reads, with queries and keys rotated by `rotary`:

        lse_n = log Σ_{s∈T(n)} exp(scale · q_nᵀ k_s)
        o_n = Σ_{s∈T(n)} exp(scale · q_nᵀ k_s − lse_n) v_s

    T(n) consists of the tiles of a window around the query's own tile, shifted inwards at the
    borders of the grid so that all queries read equally many tiles; of the `top` other tiles with
    the largest product of mean query and mean key, ties broken by index; and of the keys in
    `extra`. A window that covers the grid gives softmax attention. No gradient flows through the
    choice of tiles.

    Args:
        query: `[batch, seq_len, num_heads, head_dim]`, tokens in raster order of `grid`.
        key: Like `query`.
        value: `[batch, seq_len, num_heads, value_dim]`.
        grid: Tokens along each axis: `(length,)`, `(height, width)` or `(frames, height, width)`.
        tile: Tokens of a tile along each axis; the grid is cut into `ceil(n / tile)` tiles by
            `block_starts`, so sizes need not divide.
        window: Odd number of tiles along each axis around the query's own, or zeros for none.
        top: Number of further tiles chosen by content, at most those outside the window.
        group: Tiles along each axis whose queries share one list of tiles (default: one). The list
            has the windows of all of them, `window + group − 1` tiles along each axis, and `top`
            tiles by the mean query of the group. Larger groups are faster.
        rotary: `(cos, sin)`, each `[seq_len, head_dim / 2]`; channels 2i and 2i + 1 are a pair.
        extra: Keys `[batch, extra_len, num_heads, head_dim]` and values `[…, value_dim]` off the
            grid, which every query reads without rotation, and optionally a bool mask
            `[batch, extra_len]`, True for valid keys. Without window and top, every sample needs a
            valid key: a query without any key gets NaN.
        scale: Factor of the scores, positive; `head_dim ** -0.5` by default.
        implementation: `naive` (the definition), `blockwise` (PyTorch, any device), `fused` (CUDA
            kernels; an error where they cannot run), or `auto`: `fused` where it can run.

    Returns:
        Output `[batch, seq_len, num_heads, value_dim]` in the dtype of `query`, and the log-sum-exp
        `[batch, num_heads, seq_len]` in float32 (float64 for float64 inputs), both differentiable.

    Raises:
        ValueError: If shapes, dtypes, devices or names do not fit; the message says what does.

    Source:
        Softmax over key blocks chosen by pooled products, beside linear attention for the rest:
        SLA, Zhang et al. 2025, arXiv:2509.24006. Window, groups and the choice of tiles are this
        project's.
    """
    grid = tuple(grid)
    check_tokens(query, key, value, grid)
    check_rotary(query, rotary)
    placed = tiling(grid, tuple(tile), tuple(window), top, None if group is None else tuple(group))
    checked = None if extra is None else _check_extra(query, value, extra)
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite, found {scale}")
    if placed.list_size == 0 and (checked is None or checked[0].shape[1] == 0):
        raise UserError("no query has a key: give window, top or extra")
    implementation = resolve_tile_implementation(
        implementation, query, value, rotary, placed.num_tiles
    )
    return TILE_IMPLEMENTATIONS[implementation](
        query,
        key,
        value,
        placed=placed,
        rotary=rotary,
        extra=checked,
        scale=query.shape[3] ** -0.5 if scale is None else scale,
    )


def resolve_tile_implementation(
    implementation: str,
    query: Tensor,
    value: Tensor,
    rotary: tuple[Tensor, Tensor] | None = None,
    num_tiles: int = 1,
) -> str:
    """The implementation that `tile_attention` runs when asked for `implementation`.

    Raises:
        ValueError: If there is no such implementation.
    """
    if implementation not in ("auto", *TILE_IMPLEMENTATIONS):
        names = ", ".join(["auto", *TILE_IMPLEMENTATIONS])
        raise UserError(f"implementation must be one of {names}, found {implementation!r}")
    if implementation != "auto":
        return implementation
    if query.device.type != "cuda" or not HAS_TRITON:
        return "blockwise"
    from mhla_gen.ops.tile_fused import unsupported

    return "fused" if unsupported(query, value, rotary, num_tiles) is None else "blockwise"


def _check_extra(
    query: Tensor, value: Tensor, extra: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and mask; `ValueError` if they do not fit the query."""
    if len(extra) not in (2, 3):
        raise ValueError(f"extra must be (key, value) or (key, value, mask), found {len(extra)}")
    keys, values = extra[:2]
    batch, _, num_heads, head_dim = query.shape
    expected = (batch, keys.shape[1] if keys.ndim > 1 else 0, num_heads)
    if keys.shape != (*expected, head_dim) or values.shape != (*expected, value.shape[3]):
        raise ValueError(
            f"extra keys and values must be [{batch}, extra_len, {num_heads}, {head_dim}] and "
            f"[…, {value.shape[3]}], found {tuple(keys.shape)} and {tuple(values.shape)}"
        )
    if not (
        keys.dtype == values.dtype == query.dtype and keys.device == values.device == query.device
    ):
        raise ValueError(
            f"extra must be {query.dtype} on {query.device} like query, found {keys.dtype} on "
            f"{keys.device} and {values.dtype} on {values.device}"
        )
    if len(extra) == 2:
        mask = torch.ones(batch, keys.shape[1], dtype=torch.bool, device=keys.device)
        return keys, values, mask
    mask = extra[2]
    if mask.shape != (batch, keys.shape[1]) or mask.dtype != torch.bool:
        raise ValueError(
            f"the mask of extra must be bool [{batch}, {keys.shape[1]}], found {mask.dtype} "
            f"{tuple(mask.shape)}"
        )
    return keys, values, mask.to(query.device)
