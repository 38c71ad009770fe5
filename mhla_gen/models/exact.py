"""The exact half of an attention layer: softmax on a chosen part of the pairs, or on all."""

import functools
import operator

import torch
import torch.nn.functional as F
from torch import Tensor

from mhla_gen.config import AttentionConfig, MHLAConfig
from mhla_gen.models.rotary import rotated
from mhla_gen.ops import TileLayout, auto_tiles, tile_attention, tile_share
from mhla_gen.ops.softmax import softmax_attention

# Cached, because all layers ask for the same few grids.
_remembered_tiles = functools.lru_cache(maxsize=1024)(auto_tiles)


# torch.compile calls this function instead of tracing its integer arithmetic.
@torch.compiler.assume_constant_result
def _auto_tiles(
    grid: tuple[int, ...],
    share: str,
    tile: tuple[int, ...] | None = None,
    group: tuple[int, ...] | None = None,
    window: tuple[int, ...] | None = None,
) -> TileLayout:
    return _remembered_tiles(grid, float(share), tile=tile, group=group, window=window)


def tile_layout(config: MHLAConfig, grid: tuple[int, ...]) -> TileLayout:
    """The tiles of a layer on a token grid, from the config or from `auto_tiles`.

    Args:
        config: Settings; without a share of pairs, no tile is read.
        grid: Number of tokens along each axis.
    """
    # As indices, so that torch.compile specializes on the grid and its tiles.
    grid = tuple(operator.index(length) for length in grid)
    if not config.has_tiles:
        picked = _auto_tiles(grid, "1")
        return TileLayout(picked.tile, picked.group, (0,) * len(grid), 0)
    tile, group = config.exact_tile, config.exact_group
    if tile is not None and group is None:
        group = (1,) * len(grid)
    picked = _auto_tiles(grid, config.share, tile, group, config.exact_window)
    # A layout of its own, since torch 2.11 cannot unpack one that it was told to take as constant.
    top = picked.top if config.exact_top is None else config.exact_top
    return TileLayout(picked.tile, picked.group, picked.window, top)


def exact_share(config: AttentionConfig, grid: tuple[int, ...]) -> float:
    """The share of pairs that softmax computes on a token grid, from 0 to 1."""
    if not isinstance(config, MHLAConfig) or not config.has_tiles:
        return float(config.exact)
    tile, group, window, top = tile_layout(config, grid)
    return tile_share(grid, tile, window, top, group)


def exact_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: MHLAConfig,
    grid: tuple[int, ...],
    rotary: tuple[Tensor, Tensor] | None = None,
    extra: tuple[Tensor, ...] | None = None,
) -> Tensor:
    """Softmax on the share of pairs that a config asks for, and on keys off the grid.

    Args:
        query: `[batch, seq_len, num_heads, head_dim]`, raster order.
        key: Like `query`.
        value: Like `query`.
        config: Settings; without a share of pairs, only `extra` is read.
        grid: Number of tokens along each axis.
        rotary: As in `MHLA.forward`.
        extra: As in `MHLA.forward`.

    Returns:
        The output, shaped like `value`.
    """
    if config.exact == 1:
        mask = None
        query, key = rotated(query, rotary), rotated(key, rotary)
        if extra is not None:
            if len(extra) == 3:
                mask = F.pad(extra[2], (key.shape[1], 0), value=True)
            key, value = (torch.cat(pair, dim=1) for pair in ((key, extra[0]), (value, extra[1])))
        return softmax(query, key, value, mask)
    if rotary is not None and rotary[0].ndim == 4:
        query, key, rotary = rotated(query, rotary), rotated(key, rotary), None
    if extra is not None and config.exact == 0:
        return _extra_alone(rotated(query, rotary), *extra)
    tile, group, window, top = tile_layout(config, grid)
    out, _ = tile_attention(
        query,
        key,
        value,
        grid=grid,
        tile=tile,
        group=group,
        window=window,
        top=top,
        rotary=rotary,
        extra=extra,
        implementation=config.implementation,
    )
    return out


def _extra_alone(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax on keys off the grid only; arguments as in `softmax`.

    The output of a sample without any, for example because its whole caption is masked, is zero.
    """
    if mask is None:
        return softmax(query, key, value)
    empty = ~mask.any(dim=1)
    # Softmax over no key would be 0 / 0.
    out = softmax(query, key, value, mask | empty[:, None])
    return out.masked_fill(empty[:, None, None, None], 0)


def softmax(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax of all pairs, `[batch, seq_len, num_heads, head_dim]` in and out.

    Args:
        query: Rotated, like keys.
        key: `[batch, key_len, num_heads, head_dim]`.
        value: Like `key`.
        mask: Bool `[batch, key_len]`, True for valid keys; None if all are.
    """
    return softmax_attention(query, key, value, mask=None if mask is None else mask[:, None, None])
