"""Launches of tile attention: rotated keys, means, lists, and the output."""

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mhla_gen.ops.kernels.compiled import launch
from mhla_gen.ops.kernels.launch import alignment, padded, quotient_up
from mhla_gen.ops.kernels.tile_attention import tile_attend_kernel
from mhla_gen.ops.kernels.tile_call import (
    LOG2E,
    Extra,
    TileCall,
    extra_strides,
    extra_tensors,
    kernel_constants,
    numbered_wide,
    three_axes,
    without,
)
from mhla_gen.ops.kernels.tile_lists import entries_kernel, list_kernel, read_boxes_kernel


@dataclass(frozen=True)
class Loop:
    """How a program runs over a list of tiles."""

    rows: int
    """Queries of a program."""
    keys: int
    """Keys of a step."""
    num_warps: int
    num_stages: int
    """Steps that are loaded ahead, and the one at work."""
    packed: str = ""
    """"": keys and values lie in place; "rows": packed by tile, read by pointers; "tiles": packed
    by tile, read by tensor descriptors."""
    maxnreg: int | None = None
    """Most registers a thread."""

    @property
    def options(self) -> dict:
        """Compile-time arguments of a kernel."""
        options = {"BM": self.rows, "BN": self.keys}
        options |= {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.maxnreg is None else options | {"maxnreg": self.maxnreg}


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    extra: Extra | None,
    call: TileCall,
    loop: Loop | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, log-sum-exp `[batch, heads, seq_len]` and lists; see `tile_lists`."""
    bounded, loop = takes_bound(query), forward_loop(call) if loop is None else loop
    keys, means, longest = read_tiles(
        key,
        call,
        mean=call.placed.top > 0,
        lengths=bounded and call.placed.list_size > 0,
        pack=bool(loop.packed),
    )
    values = pack_tiles(value, call) if loop.packed else value
    if bounded and extra is not None:
        beside = extra[0].float().square().sum(-1).amax(dim=1).flatten()
        longest = beside if longest is None else torch.maximum(longest, beside)
    queries, query_means = read_groups(query, call, mean=means is not None)
    lists = tile_lists(query_means, means, call)
    out, lse = attend(queries, keys, values, longest, lists, extra, call, loop)
    return out, lse, lists


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    longest: Tensor | None,
    lists: Tensor,
    extra: Extra | None,
    call: TileCall,
    loop: Loop,
) -> tuple[Tensor, Tensor]:
    """Launch `tile_attend_kernel` on rotated queries and keys."""
    batch, seq_len, heads, _ = call.query.shape
    out = call.value.new_empty(call.value.shape)
    lse = call.query.new_empty((batch, heads, seq_len), dtype=torch.float32)
    blocks = quotient_up(call.queries, loop.rows)
    strides = queries.stride(), keys.stride(), values.stride(), out.stride(), *extra_strides(extra)
    sources = (descriptor(x, loop) if loop.packed == "tiles" else x for x in (keys, values))
    launch(
        tile_attend_kernel,
        (blocks * call.placed.num_groups * call.batch_heads,),
        (queries, *sources, lists, longest, *extra_tensors(extra), out, lse),
        (
            *strides,
            call.box,
            three_axes(call.placed.groups),
            seq_len,
            heads,
            call.placed.num_groups,
            call.placed.num_tiles,
            call.placed.list_size,
            0 if extra is None else extra[0].shape[1],
            blocks,
            call.scale * LOG2E,
        ),
        without(kernel_constants(call, loop.options, *strides), "ROTARY")
        | {
            "WIDE": numbered_wide(keys, values),
            "BOUNDED": takes_bound(call.query),
            "PACKED": loop.packed,
        },
    )
    return out, lse


def descriptor(packed: Tensor, loop: Loop) -> TensorDescriptor:
    """Of packed tiles as rows."""
    rows = packed.transpose(1, 2).flatten(0, 2)
    return TensorDescriptor.from_tensor(rows, [loop.keys, rows.shape[1]])


def takes_bound(query: Tensor) -> bool:
    """Whether scores are bounded by the lengths of queries and keys, see `tile_attend_kernel`.

    Weights far below the bound would vanish in float16, and lose digits that float32 has. With few
    channels, the second loop for bounds that are too large costs registers that the first needs.
    """
    return query.dtype == torch.bfloat16 and query.shape[3] > 64


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
        keys = _packed_like(key, call)
        read_boxes(key, call, keys, means, longest, "pack", call.slot_sizes["SLOTS"])
    else:
        keys = _rotated_like(key) if rotary else key
        read_boxes(key, call, keys, means, longest, "raster" if rotary else "nowhere", call.slots)
    return keys, means, None if longest is None else longest.amax(dim=1)


def pack_tiles(x: Tensor, call: TileCall) -> Tensor:
    """Tokens tile by tile, `[batch, tiles · SLOTS, heads, dim]` with heads first in memory.

    Slots without a token are zero, and so are channels up to a power of two.
    """
    packed = _packed_like(x, call)
    slots = call.slot_sizes["SLOTS"]
    read_boxes(x, call, packed, None, None, "pack", slots, rotary=False)
    return packed


def _packed_like(x: Tensor, call: TileCall) -> Tensor:
    batch, _, heads, dim = x.shape
    rows = call.placed.num_tiles * call.slot_sizes["SLOTS"]
    return x.new_empty((batch, heads, rows, padded(dim))).transpose(1, 2)


def read_groups(query: Tensor, call: TileCall, *, mean: bool) -> tuple[Tensor, Tensor | None]:
    """As `read_tiles`: rotated queries, means of groups `[batch · heads, groups, head_dim]`."""
    rotary = call.cos is not None
    if not (rotary or mean):
        return query, None
    queries = _rotated_like(query) if rotary else query
    shape = (call.batch_heads, call.placed.num_groups, query.shape[3])
    means = query.new_empty(shape, dtype=torch.float32) if mean else None
    store, groups = "raster" if rotary else "nowhere", three_axes(call.placed.groups)
    read_boxes(query, call, queries, means, None, store, call.queries, groups)
    return queries, means


def _rotated_like(x: Tensor) -> Tensor:
    """Room for rotated tokens: heads first, so that neighbours on a line lie together."""
    batch, seq_len, heads, dim = x.shape
    return x.new_empty((batch, heads, seq_len, dim)).transpose(1, 2)


# Heads of a program, whether it holds their angles, most rows at once, rows of a warp.
READ = (1, False, 64, 16)


def read_boxes(
    x: Tensor,
    call: TileCall,
    rotated: Tensor | None,
    means: Tensor | None,
    longest: Tensor | None,
    store: str,
    slots: int,
    groups: tuple[int, ...] | None = None,
    *,
    rotary: bool = True,
) -> None:
    """Launch `read_boxes_kernel` on all tiles, or on all `groups`."""
    num_boxes = call.placed.num_tiles if groups is None else call.placed.num_groups
    strides = x.stride(), rotated.stride() if store == "raster" else x.stride()
    rotary = rotary and call.cos is not None
    most, hold, widest, rows_of_warp = READ
    rows = min(padded(slots), widest)
    heads = next(n for n in range(most if rotary else 1, 0, -1) if x.shape[2] % n == 0)
    launch(
        read_boxes_kernel,
        (num_boxes * call.batch_heads // heads,),
        (x, call.cos, call.sin, rotated, means, longest),
        (*strides, call.box, groups, num_boxes, x.shape[2]),
        {
            "D": x.shape[3],
            "BD": padded(x.shape[3]),
            "BT": rows,
            "HEADS": heads,
            "HOLD": hold,
            "SLOTS": slots,
            "RANK": call.rank,
            "ALIGN": alignment(*strides),
            "ROTARY": rotary,
            "STORE": store,
            "PITCH": 0 if rotated is None else rotated.shape[-1],
            "MEAN": means is not None,
            "LONGEST": longest is not None,
            "num_warps": max(2, rows // rows_of_warp),
        },
    )


def tile_lists(mean_queries: Tensor | None, mean_keys: Tensor | None, call: TileCall) -> Tensor:
    """Tiles of every group and head and their entries, int32 `[batch · heads, groups, 2, list]`.

    Means are those of `read_groups` and `read_tiles`; None if no tile is chosen by content.
    """
    placed = call.placed
    lists = call.query.new_empty(
        (call.batch_heads, placed.num_groups, 2, placed.list_size), dtype=torch.int32
    )
    if placed.list_size == 0:
        return lists
    entries = lists.new_empty(placed.num_tiles)
    launch(
        entries_kernel,
        (quotient_up(placed.num_tiles, 256),),
        (entries,),
        (call.box, placed.num_tiles),
        {**without(call.slot_sizes, "SLOTS"), "RANK": call.rank, "BT": 256},
    )
    products = None
    if mean_queries is not None and mean_keys is not None:
        # Autocast would choose tiles by bfloat16 products.
        with torch.autocast(mean_queries.device.type, enabled=False):
            products = mean_queries @ mean_keys.mT
    launch(
        list_kernel,
        (placed.num_groups * call.batch_heads,),
        (products, entries, lists),
        (
            call.box,
            three_axes(placed.groups),
            three_axes(placed.reach),
            (*[0] * (3 - call.rank), *placed.before),
            placed.num_groups,
            placed.num_tiles,
            placed.window_size,
            placed.top,
        ),
        {
            "RANK": call.rank,
            "BW": padded(placed.window_size),
            "BT": padded(placed.num_tiles),
            "num_warps": max(1, min(8, padded(placed.num_tiles) // 512)),
        },
    )
    return lists


def forward_loop(call: TileCall) -> Loop:
    """The fastest, see `README.md`."""
    if call.operand["OPERAND"] == tl.float32:
        return Loop(call.block(32), 32, 4, 1)
    rows, dim = call.block(128), max(call.query.shape[3], call.value.shape[3])
    # A program of few queries is short of work for one warp, let alone four.
    warps = 4 if rows > 32 else 1
    if rows == 128 and dim > 64:
        # 64 keys would want more registers than there are.
        return Loop(rows, 32, warps, 3)
    return Loop(rows, 64, warps, 2 if rows == 128 else 3)
