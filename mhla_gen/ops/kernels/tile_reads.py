"""What tile attention reads first: rotated or packed tokens, their means and largest lengths."""

import torch
from torch import Tensor

from mhla_gen.ops.kernels.compiled import launch
from mhla_gen.ops.kernels.launch import alignment, padded
from mhla_gen.ops.kernels.tile_call import TileCall
from mhla_gen.ops.kernels.tile_lists import read_boxes_kernel

# Tokens that a program reads at once, and its warps: up to 64 channels, and beyond.
_NARROW, _WIDE = (32, 1), (16, 1)


def read_tiles(
    key: Tensor,
    call: TileCall,
    *,
    mean: bool = False,
    lengths: bool = False,
    pack: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Rotated keys, like `key` or as by `pack_tiles`, or `key` itself if there is nothing to do.

    On demand also float32 means of tiles `[batch · heads, tiles, head_dim]`, and the largest
    squared length of a key, `[batch · heads]`.
    """
    dim, rotary = key.shape[3], call.cos is not None
    if not (rotary or mean or lengths or pack):
        return key, None, None
    shape = call.batch_heads, call.placed.num_tiles
    means = key.new_empty((*shape, dim), dtype=torch.float32) if mean else None
    longest = key.new_empty(shape, dtype=torch.float32) if lengths else None
    if pack:
        keys = key.new_empty((*shape, call.slot_sizes["SLOTS"], dim))
        read_boxes(key, call, keys, means, longest, "pack", keys.shape[2])
    else:
        keys = _rotated_like(key) if rotary else key
        read_boxes(key, call, keys, means, longest, "raster" if rotary else "nowhere", call.slots)
    return keys, means, None if longest is None else longest.amax(dim=1)


def pack_tiles(x: Tensor, call: TileCall) -> Tensor:
    """Tokens tile by tile, zero in empty slots: `[batch · heads, tiles, SLOTS, dim]`."""
    shape = call.batch_heads, call.placed.num_tiles, call.slot_sizes["SLOTS"], x.shape[3]
    packed = x.new_empty(shape)
    read_boxes(x, call, packed, None, None, "pack", shape[2], rotary=False)
    return packed


def read_groups(
    query: Tensor,
    call: TileCall,
    *,
    mean: bool = False,
    lengths: bool = False,
    slots: int | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As `read_tiles`: rotated queries, means of groups `[batch · heads, groups, head_dim]`.

    With `slots`, queries of every group are consecutive, `[batch · heads, groups, slots, dim]`;
    then, on demand, also their squared lengths, float32 `[batch · heads, groups, slots]`.
    """
    rotary, groups = call.cos is not None, call.groups
    shape = call.batch_heads, call.placed.num_groups
    means = query.new_empty((*shape, query.shape[3]), dtype=torch.float32) if mean else None
    squares = None
    if slots is not None:
        queries = query.new_empty((*shape, slots, query.shape[3]))
        squares = query.new_empty((*shape, slots), dtype=torch.float32) if lengths else None
        read_boxes(query, call, queries, means, squares, "pack", slots, groups)
    elif rotary or mean:
        queries, store = (_rotated_like(query), "raster") if rotary else (query, "nowhere")
        read_boxes(query, call, queries, means, None, store, call.queries, groups)
    else:
        queries = query
    return queries, means, squares


def _rotated_like(x: Tensor) -> Tensor:
    """Room for rotated tokens: heads first, so that neighbours on a line lie together."""
    batch, seq_len, heads, dim = x.shape
    return x.new_empty((batch, heads, seq_len, dim)).transpose(1, 2)


def read_boxes(
    x: Tensor,
    call: TileCall,
    rotated: Tensor | None,
    means: Tensor | None,
    lengths: Tensor | None,
    store: str,
    slots: int,
    groups: tuple[int, ...] | None = None,
    *,
    rotary: bool = True,
) -> None:
    """Launch `read_boxes_kernel` on all tiles, or on all `groups`.

    `lengths` has room for the largest one of every box, or for those of all its slots.
    """
    num_boxes = call.placed.num_tiles if groups is None else call.placed.num_groups
    strides = x.stride(), rotated.stride() if store == "raster" else x.stride()
    rows, warps = _NARROW if x.shape[3] <= 64 else _WIDE
    rows = min(padded(slots), rows)
    launch(
        read_boxes_kernel,
        (num_boxes * call.batch_heads,),
        (x, call.cos, call.sin, rotated, means, lengths),
        (*strides, call.box, groups, num_boxes, x.shape[2]),
        {
            "D": x.shape[3],
            "BD": padded(x.shape[3]),
            "BT": rows,
            "SLOTS": slots,
            "RANK": call.rank,
            "ALIGN": alignment(*strides),
            "ROTARY": rotary and call.cos is not None,
            "STORE": store,
            "MEAN": means is not None,
            "LENGTHS": "none" if lengths is None else "longest" if lengths.ndim == 2 else "each",
            "num_warps": warps,
        },
    )
