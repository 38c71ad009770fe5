"""Launches of tile attention and of its backward."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import triton.language as tl
from torch import Tensor

from mhla_gen.ops.kernels.compiled import launch
from mhla_gen.ops.kernels.launch import alignment, padded, pieces, quotient_up
from mhla_gen.ops.kernels.tile_attention import tile_attend_kernel
from mhla_gen.ops.kernels.tile_backward import (
    prepare_kernel,
    tile_backward_extra_kernel,
    tile_backward_keys_kernel,
    tile_backward_queries_kernel,
)
from mhla_gen.ops.kernels.tile_lists import entries_kernel, list_kernel, read_boxes_kernel
from mhla_gen.ops.tiles import Tiling

_OPERANDS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
_LOG2E = 1.4426950408889634
# Parts of all queries that gradients of few keys off the grid are summed in.
_ENOUGH_PROGRAMS = 512

Extra = tuple[Tensor, Tensor, Tensor]
"""Keys, values and the mask of valid ones, off the grid."""


@dataclass(frozen=True)
class TileCall:
    """One call: sizes, tables and options."""

    query: Tensor
    value: Tensor
    cos: Tensor | None
    sin: Tensor | None
    placed: Tiling
    scale: float

    @cached_property
    def slots(self) -> int:
        """Tokens of the largest tile."""
        return math.prod(map(quotient_up, self.placed.grid, self.placed.tiles))

    @cached_property
    def slot_sizes(self) -> dict:
        """Slots of the largest tile along each axis, and their number, padded."""
        depth, height, width = _three(tuple(map(quotient_up, self.placed.grid, self.placed.tiles)))
        padded_slots = 1 << (self.slots - 1).bit_length()
        return {"SLOTS": padded_slots, "SLOT_T": depth, "SLOT_H": height, "SLOT_W": width}

    @cached_property
    def queries(self) -> int:
        """Tokens of the largest group."""
        largest = zip(self.placed.grid, self.placed.tiles, self.placed.groups, strict=True)
        return math.prod(
            max(_span(group, n, tiles, count) for group in range(count))
            for n, tiles, count in largest
        )

    @cached_property
    def ragged(self) -> bool:
        """Whether some slot of some tile is empty."""
        sizes = zip(self.placed.grid, self.placed.tiles, strict=True)
        return self.slots & (self.slots - 1) != 0 or any(n % count for n, count in sizes)

    @cached_property
    def box(self) -> tuple[int, ...]:
        """Tokens and tiles along three axes, ones in front."""
        return (*_three(self.placed.grid), *_three(self.placed.tiles))

    @property
    def rank(self) -> int:
        """Axes of the grid."""
        return len(self.placed.grid)

    @property
    def batch_heads(self) -> int:
        """Heads of all samples."""
        return self.query.shape[0] * self.query.shape[2]

    @cached_property
    def pieces(self) -> dict:
        """Channels of keys and values in pieces, which waste fewer columns."""
        (d0, d1), (v0, v1) = pieces(self.query.shape[3]), pieces(self.value.shape[3])
        sizes = {"D": self.query.shape[3], "V": self.value.shape[3]}
        return {**sizes, "D0": d0, "D1": d1, "V0": v0, "V1": v1}

    @cached_property
    def operand(self) -> dict:
        """How tiles are multiplied."""
        return {"OPERAND": _OPERANDS[self.query.dtype], "PRECISION": "ieee"}

    def block(self, most: int) -> int:
        """Queries of a block: a power of two that holds a group, or `most`."""
        return min(padded(self.queries), most)


def _span(group: int, length: int, tiles: int, groups: int) -> int:
    first, last = group * tiles // groups, (group + 1) * tiles // groups
    return last * length // tiles - first * length // tiles


def _three(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return (*[1] * (3 - len(sizes)), *sizes)


def forward(
    query: Tensor, key: Tensor, value: Tensor, extra: Extra | None, call: TileCall
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, log-sum-exp `[batch, heads, seq_len]` and lists; see `tile_lists`."""
    bounded = takes_bound(query)
    keys, means, longest = read_tiles(
        key, call, mean=call.placed.top > 0, lengths=bounded and call.placed.list_size > 0
    )
    if bounded and extra is not None:
        beside = extra[0].float().square().sum(-1).amax(dim=1).flatten()
        longest = beside if longest is None else torch.maximum(longest, beside)
    lists = tile_lists(query, means, call)
    out = value.new_empty(value.shape)
    batch, seq_len, heads, _ = query.shape
    lse = query.new_empty((batch, heads, seq_len), dtype=torch.float32)
    options = _forward_options(call)
    blocks = quotient_up(call.queries, options["BM"])
    strides = query.stride(), keys.stride(), value.stride(), out.stride(), *_extra_strides(extra)
    launch(
        tile_attend_kernel,
        (blocks * call.placed.num_groups * call.batch_heads,),
        (query, keys, value, call.cos, call.sin, lists, longest, *_extra(extra), out, lse),
        (
            *strides,
            call.box,
            _three(call.placed.groups),
            seq_len,
            heads,
            call.placed.num_groups,
            call.placed.list_size,
            0 if extra is None else extra[0].shape[1],
            blocks,
            call.scale * _LOG2E,
        ),
        _constants(call, options, *strides) | {"WIDE": _wide(keys, value), "BOUNDED": bounded},
    )
    return out, lse, lists


def takes_bound(query: Tensor) -> bool:
    """Whether scores are bounded by the lengths of queries and keys, see `tile_attend_kernel`.

    Weights far below the bound would vanish in float16, and lose digits that float32 has. With few
    channels, the second loop for bounds that are too large costs registers that the first needs.
    """
    return query.dtype == torch.bfloat16 and query.shape[3] > 64


def read_tiles(
    key: Tensor, call: TileCall, *, mean: bool = False, lengths: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Rotated keys, like `key`, or `key` itself without rotary.

    On demand also float32 means of tiles `[batch · heads, tiles, head_dim]`, and the largest
    squared length of a key, `[batch · heads]`.
    """
    batch, seq_len, heads, dim = key.shape
    rotary = call.cos is not None
    if not (rotary or mean or lengths):
        return key, None, None
    # Heads first, so that neighbours on a line lie together.
    keys = key.new_empty((batch, heads, seq_len, dim)).transpose(1, 2) if rotary else key
    shape = call.batch_heads, call.placed.num_tiles
    means = key.new_empty((*shape, dim), dtype=torch.float32) if mean else None
    longest = key.new_empty(shape, dtype=torch.float32) if lengths else None
    _read(key, call, keys, means, longest, "raster" if rotary else "nowhere", call.slots)
    return keys, means, None if longest is None else longest.amax(dim=1)


def pack_groups(x: Tensor, call: TileCall, slots: int) -> Tensor:
    """Rotated tokens of every group, consecutive: `[batch · heads, groups, slots, dim]`."""
    packed = x.new_empty((call.batch_heads, call.placed.num_groups, slots, x.shape[3]))
    _read(x, call, packed, None, None, "pack", slots, _three(call.placed.groups))
    return packed


def _read(
    x: Tensor,
    call: TileCall,
    rotated: Tensor | None,
    means: Tensor | None,
    longest: Tensor | None,
    store: str,
    slots: int,
    groups: tuple[int, ...] | None = None,
) -> None:
    num_boxes = call.placed.num_tiles if groups is None else call.placed.num_groups
    strides = x.stride(), rotated.stride() if store == "raster" else x.stride()
    rows = min(padded(slots), 64)
    launch(
        read_boxes_kernel,
        (num_boxes * call.batch_heads,),
        (x, call.cos, call.sin, rotated, means, longest),
        (*strides, call.box, groups, num_boxes, x.shape[2]),
        {
            "D": x.shape[3],
            "BD": padded(x.shape[3]),
            "BT": rows,
            "SLOTS": slots,
            "RANK": call.rank,
            "ALIGN": alignment(*strides),
            "ROTARY": call.cos is not None,
            "STORE": store,
            "MEAN": means is not None,
            "LONGEST": longest is not None,
            "num_warps": 4 if rows > 16 else 2,
        },
    )


def tile_lists(query: Tensor, mean_keys: Tensor | None, call: TileCall) -> Tensor:
    """Tiles of every group and head and their entries, int32 `[batch · heads, groups, 2, list]`."""
    placed = call.placed
    lists = query.new_empty(
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
        {**_without(call.slot_sizes, "SLOTS"), "RANK": call.rank, "BT": 256},
    )
    products = None
    if mean_keys is not None:
        means = query.new_empty(
            (call.batch_heads, placed.num_groups, query.shape[3]), dtype=torch.float32
        )
        _read(query, call, None, means, None, "nowhere", call.queries, _three(placed.groups))
        # Autocast would choose tiles by bfloat16 products.
        with torch.autocast(query.device.type, enabled=False):
            products = means @ mean_keys.mT
    launch(
        list_kernel,
        (placed.num_groups * call.batch_heads,),
        (products, entries, lists),
        (
            call.box,
            _three(placed.groups),
            _three(placed.reach),
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


def backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    extra: Extra | None,
    out: Tensor,
    lse: Tensor,
    lists: Tensor,
    call: TileCall,
) -> tuple[Tensor, ...]:
    """Gradients of query, key, value, and of the keys and values of `extra` (empty without)."""
    placed, heads = call.placed, query.shape[2]
    options = _backward_options(call)
    rows = options["queries"]["BM"]
    blocks = quotient_up(call.queries, rows)
    slots = blocks * rows
    keys, _, _ = read_tiles(key, call)
    queries = pack_groups(query, call, slots)
    grads = grad.new_empty((call.batch_heads, placed.num_groups, slots, value.shape[3]))
    packed_lse = lse.new_empty((call.batch_heads, placed.num_groups, slots))
    delta = torch.empty_like(packed_lse)
    strides = grad.stride(), out.stride()
    groups = _three(placed.groups)
    launch(
        prepare_kernel,
        (blocks * placed.num_groups * call.batch_heads,),
        (grad, out, lse, grad_lse, grads, packed_lse, delta),
        (*strides, call.box, groups, query.shape[1], heads, placed.num_groups, blocks),
        {
            **{name: call.pieces[name] for name in ("V", "V0", "V1")},
            "BM": rows,
            "RANK": call.rank,
            "ALIGN": alignment(*strides),
            "num_warps": 4,
        },
    )
    packs = queries, grads, packed_lse, delta
    scales = call.scale * _LOG2E, call.scale
    dquery = query.new_empty(query.shape)
    strides = keys.stride(), value.stride(), dquery.stride(), *_extra_strides(extra)
    launch(
        tile_backward_queries_kernel,
        (blocks * placed.num_groups * call.batch_heads,),
        (*packs, keys, value, call.cos, call.sin, lists, *_extra(extra), dquery),
        (
            *strides,
            call.box,
            groups,
            heads,
            placed.num_groups,
            placed.list_size,
            0 if extra is None else extra[0].shape[1],
            blocks,
            *scales,
        ),
        _constants(call, options["queries"], *strides) | {"WIDE": _wide(keys, value)},
    )
    dkey, dvalue = _backward_keys(packs, keys, value, lists, blocks, options["keys"], call)
    dextra = _backward_extra(packs, extra, blocks, options["extra"], call)
    return dquery, dkey, dvalue, *dextra


def _backward_keys(
    packs: tuple[Tensor, ...],
    keys: Tensor,
    value: Tensor,
    lists: Tensor,
    group_blocks: int,
    options: dict,
    call: TileCall,
) -> tuple[Tensor, Tensor]:
    placed = call.placed
    dkey, dvalue = call.query.new_empty(call.query.shape), call.value.new_empty(call.value.shape)
    owners, offsets = owners_of_tiles(lists, placed.num_tiles)
    blocks = quotient_up(call.slots, options["BN"])
    strides = keys.stride(), value.stride(), dkey.stride(), dvalue.stride()
    constants = _without(_constants(call, options, *strides), "RAGGED", *call.slot_sizes)
    launch(
        tile_backward_keys_kernel,
        (blocks * placed.num_tiles * call.batch_heads,),
        (*packs, keys, value, call.cos, call.sin, owners, offsets, dkey, dvalue),
        (
            *strides,
            call.box,
            call.query.shape[2],
            placed.num_tiles,
            placed.num_groups,
            group_blocks,
            blocks,
            call.scale * _LOG2E,
            call.scale,
        ),
        constants,
    )
    return dkey, dvalue


def owners_of_tiles(lists: Tensor, num_tiles: int) -> tuple[Tensor, Tensor]:
    """The groups that read each tile of each head, ascending.

    Args:
        lists: Tiles and entries, int32 `[batch · heads, groups, 2, list_size]`.
        num_tiles: Tiles of a head.

    Returns:
        int32 groups of all tiles one after the other, and where each tile's begin, and the last
        one's end.
    """
    heads, num_groups, _, list_size = lists.shape
    first = torch.arange(heads, dtype=torch.int32, device=lists.device) * num_tiles
    tiles, order = (lists[:, :, 0] + first[:, None, None]).flatten().sort(stable=True)
    owners = order.div(max(list_size, 1), rounding_mode="floor") % num_groups
    places = torch.arange(heads * num_tiles + 1, dtype=torch.int32, device=lists.device)
    return owners.int(), torch.searchsorted(tiles, places, out_int32=True)


def _backward_extra(
    packs: tuple[Tensor, ...], extra: Extra | None, blocks: int, options: dict, call: TileCall
) -> tuple[Tensor, Tensor]:
    if extra is None:
        return call.query.new_empty(0), call.value.new_empty(0)
    keys, values, mask = extra
    batch, extra_len, heads, _ = keys.shape
    extra_blocks, num_blocks = (
        quotient_up(extra_len, options["BN"]),
        call.placed.num_groups * blocks,
    )
    parts = max(1, min(_ENOUGH_PROGRAMS // (extra_blocks * batch * heads), num_blocks))
    part_blocks = quotient_up(num_blocks, parts)
    parts = quotient_up(num_blocks, part_blocks)
    dkey, dvalue = (
        x.new_empty((parts, batch, extra_len, heads, x.shape[3]), dtype=torch.float32)
        for x in (keys, values)
    )
    constants = _without(
        _constants(call, options, *_extra_strides(extra)),
        "RAGGED", "RANK", "ROTARY", *call.slot_sizes,
    )  # fmt: skip
    launch(
        tile_backward_extra_kernel,
        (parts * batch * heads * extra_blocks,),
        (*packs, keys, values, mask, dkey, dvalue),
        (
            *_extra_strides(extra),
            heads,
            batch,
            extra_len,
            extra_blocks,
            num_blocks,
            part_blocks,
            call.scale * _LOG2E,
            call.scale,
        ),
        constants,
    )
    return dkey.sum(dim=0).to(keys.dtype), dvalue.sum(dim=0).to(values.dtype)


def _extra(extra: Extra | None) -> tuple:
    return (None, None, None) if extra is None else extra


def _extra_strides(extra: Extra | None) -> tuple:
    return ((0, 0, 0, 0),) * 2 if extra is None else (extra[0].stride(), extra[1].stride())


def _wide(*tensors: Tensor) -> bool:
    """Whether 32 bits do not number the elements of a sample."""
    return any(x.shape[1] * x.stride(1) >= 2**31 for x in tensors)


def _without(constants: dict, *names: str) -> dict:
    return {name: value for name, value in constants.items() if name not in names}


def _constants(call: TileCall, options: dict, *strides: tuple[int, ...]) -> dict:
    return {
        **call.pieces,
        "BM": options["BM"],
        "BN": options["BN"],
        **call.slot_sizes,
        "RAGGED": call.ragged,
        "RANK": call.rank,
        "ALIGN": alignment(*strides),
        "ROTARY": call.cos is not None,
        **call.operand,
        "num_warps": options["num_warps"],
        "num_stages": options["num_stages"],
    }


def _forward_options(call: TileCall) -> dict:
    """Queries and keys of a block, warps and pipeline stages."""
    if call.operand["OPERAND"] == tl.float32:
        return {"BM": call.block(32), "BN": 32, "num_warps": 4, "num_stages": 1}
    rows = call.block(128)
    return {"BM": rows, "BN": 64, "num_warps": 4, "num_stages": 2 if rows == 128 else 3}


def _backward_options(call: TileCall) -> dict[str, dict]:
    """As `_forward_options`, for gradients of queries, of keys, and of keys off the grid."""
    if call.operand["OPERAND"] == tl.float32:
        rows = call.block(32)
        common = {"BM": rows, "num_warps": 4, "num_stages": 1}
        keys = min(padded(call.slots), 32)
        return {
            "queries": common | {"BN": 32},
            "keys": common | {"BN": keys},
            "extra": common | {"BN": 32},
        }
    rows = call.block(64)
    keys = min(padded(call.slots), 64)
    common = {"BM": rows, "num_warps": 4, "num_stages": 2}
    return {
        "queries": common | {"BN": 64},
        "keys": common | {"BN": keys},
        "extra": common | {"BN": 64},
    }
