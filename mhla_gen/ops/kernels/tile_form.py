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
from mhla_gen.ops.kernels.tile_lists import list_kernel, pack_kernel
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
        return _largest(self.placed.grid, self.placed.tiles)

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
        """Whether some tile has fewer tokens than others."""
        sizes = zip(self.placed.grid, self.placed.tiles, strict=True)
        return any(n % count for n, count in sizes)

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


def _largest(grid: tuple[int, ...], counts: tuple[int, ...]) -> int:
    return math.prod(map(quotient_up, grid, counts))


def _span(group: int, length: int, tiles: int, groups: int) -> int:
    first, last = group * tiles // groups, (group + 1) * tiles // groups
    return last * length // tiles - first * length // tiles


def _three(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return (*[1] * (3 - len(sizes)), *sizes)


def forward(
    query: Tensor, key: Tensor, value: Tensor, extra: Extra | None, call: TileCall
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, log-sum-exp `[batch, heads, seq_len]` and lists `[batch · heads, groups, list]`."""
    keys, mean_keys = pack_tiles(key, call, rotary=True, mean=call.placed.top > 0)
    values, _ = pack_tiles(value, call)
    lists = tile_lists(query, mean_keys, call)
    out = value.new_empty(value.shape)
    batch, seq_len, heads, _ = query.shape
    lse = query.new_empty((batch, heads, seq_len), dtype=torch.float32)
    options = _forward_options(call)
    blocks = quotient_up(call.queries, options["BM"])
    strides = query.stride(), out.stride()
    launch(
        tile_attend_kernel,
        (blocks * call.placed.num_groups * call.batch_heads,),
        (query, keys, values, call.cos, call.sin, lists, *_extra(extra), out, lse),
        (
            *strides,
            *_extra_strides(extra),
            call.box,
            _three(call.placed.groups),
            seq_len,
            heads,
            call.placed.num_groups,
            call.placed.num_tiles,
            call.placed.list_size,
            0 if extra is None else extra[0].shape[1],
            blocks,
            call.scale * _LOG2E,
        ),
        _constants(call, options, *strides, *_extra_strides(extra)),
    )
    return out, lse, lists


def pack_tiles(
    x: Tensor, call: TileCall, *, rotary: bool = False, mean: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Tokens of every tile in consecutive rows `[batch · heads, tiles, slots, dim]`; their means.

    Means are float32 `[batch · heads, tiles, dim]`.
    """
    shape = call.batch_heads, call.placed.num_tiles
    packed = x.new_empty((*shape, call.slots, x.shape[3]))
    means = x.new_empty((*shape, x.shape[3]), dtype=torch.float32) if mean else None
    _pack(x, packed, means, None, call.slots, call, rotary)
    return packed, means


def pack_groups(x: Tensor, call: TileCall, slots: int, *, rotary: bool = False) -> Tensor:
    """Tokens of every group in `slots` consecutive rows `[batch · heads, groups, slots, dim]`."""
    packed = x.new_empty((call.batch_heads, call.placed.num_groups, slots, x.shape[3]))
    _pack(x, packed, None, _three(call.placed.groups), slots, call, rotary)
    return packed


def _pack(
    x: Tensor,
    packed: Tensor | None,
    means: Tensor | None,
    groups: tuple[int, ...] | None,
    slots: int,
    call: TileCall,
    rotary: bool,
) -> None:
    num_boxes = call.placed.num_tiles if groups is None else call.placed.num_groups
    rows = min(padded(slots), 64)
    constants = {
        "D": x.shape[3],
        "BD": padded(x.shape[3]),
        "BT": rows,
        "SLOTS": slots,
        "RANK": call.rank,
        "ALIGN": alignment(x.stride()),
        "ROTARY": rotary and call.cos is not None,
        "STORE": packed is not None,
        "MEAN": means is not None,
        "num_warps": 4 if rows > 16 else 2,
    }
    launch(
        pack_kernel,
        (num_boxes * call.batch_heads,),
        (x, call.cos, call.sin, packed, means),
        (x.stride(), call.box, groups, num_boxes, x.shape[2]),
        constants,
    )


def tile_lists(query: Tensor, mean_keys: Tensor | None, call: TileCall) -> Tensor:
    """Tiles of every group and head, int32 `[batch · heads, groups, list_size]`."""
    placed = call.placed
    lists = query.new_empty(
        (call.batch_heads, placed.num_groups, placed.list_size), dtype=torch.int32
    )
    if placed.list_size == 0:
        return lists
    products = None
    if mean_keys is not None:
        means = query.new_empty(
            (call.batch_heads, placed.num_groups, query.shape[3]), dtype=torch.float32
        )
        _pack(query, None, means, _three(placed.groups), call.queries, call, rotary=True)
        products = means @ mean_keys.mT
    reach, before = (tuple(max(size, 1) for size in _three(placed.reach)), _zeros(placed.before))
    if placed.window_size == 0:
        # Nothing is near: a window that no tile is in.
        before, reach = (0, 0, 0), (0, 0, 0)
    launch(
        list_kernel,
        (placed.num_groups * call.batch_heads,),
        (products, lists),
        (
            call.box,
            _three(placed.groups),
            reach,
            before,
            placed.num_groups,
            placed.num_tiles,
            placed.window_size,
            placed.top,
        ),
        {
            "RANK": call.rank,
            "BW": padded(placed.window_size),
            "BT": padded(placed.num_tiles),
            "num_warps": 4 if placed.num_tiles > 512 else 1,
        },
    )
    return lists


def _zeros(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return (*[0] * (3 - len(sizes)), *sizes)


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
    keys, _ = pack_tiles(key, call, rotary=True)
    values, _ = pack_tiles(value, call)
    queries = pack_groups(query, call, slots, rotary=True)
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
    launch(
        tile_backward_queries_kernel,
        (blocks * placed.num_groups * call.batch_heads,),
        (*packs, keys, values, call.cos, call.sin, lists, *_extra(extra), dquery),
        (
            dquery.stride(),
            *_extra_strides(extra),
            call.box,
            groups,
            heads,
            placed.num_groups,
            placed.num_tiles,
            placed.list_size,
            0 if extra is None else extra[0].shape[1],
            blocks,
            *scales,
        ),
        _constants(call, options["queries"], dquery.stride(), *_extra_strides(extra)),
    )
    dkey, dvalue = _backward_keys(packs, keys, values, lists, blocks, options["keys"], call)
    dextra = _backward_extra(packs, extra, blocks, options["extra"], call)
    return dquery, dkey, dvalue, *dextra


def _backward_keys(
    packs: tuple[Tensor, ...],
    keys: Tensor,
    values: Tensor,
    lists: Tensor,
    group_blocks: int,
    options: dict,
    call: TileCall,
) -> tuple[Tensor, Tensor]:
    placed = call.placed
    dkey, dvalue = call.query.new_empty(call.query.shape), call.value.new_empty(call.value.shape)
    owners, offsets = owners_of_tiles(lists, placed.num_tiles)
    blocks = quotient_up(call.slots, options["BN"])
    strides = dkey.stride(), dvalue.stride()
    constants = _constants(call, options, *strides)
    del constants["RAGGED"]
    launch(
        tile_backward_keys_kernel,
        (blocks * placed.num_tiles * call.batch_heads,),
        (*packs, keys, values, call.cos, call.sin, owners, offsets, dkey, dvalue),
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
        lists: int32 `[batch · heads, groups, list_size]`.
        num_tiles: Tiles of a head.

    Returns:
        int32 groups of all tiles one after the other, and where each tile's begin, and the last
        one's end.
    """
    heads, num_groups, list_size = lists.shape
    first = torch.arange(heads, dtype=torch.int32, device=lists.device) * num_tiles
    tiles, order = (lists.flatten(1) + first[:, None]).flatten().sort(stable=True)
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
    constants = _constants(call, options, *_extra_strides(extra))
    for name in ("RAGGED", "SLOTS", "RANK", "ROTARY"):
        del constants[name]
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


def _constants(call: TileCall, options: dict, *strides: tuple[int, ...]) -> dict:
    return {
        **call.pieces,
        "BM": options["BM"],
        "BN": options["BN"],
        "SLOTS": call.slots,
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
    return {"BM": rows, "BN": 64, "num_warps": 8 if rows == 128 else 4, "num_stages": 3}


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
    rows = call.block(128)
    keys = min(padded(call.slots), 64)
    return {
        "queries": {"BM": rows, "BN": 64, "num_warps": 8, "num_stages": 2},
        "keys": {"BM": rows, "BN": keys, "num_warps": 8 if keys > 32 else 4, "num_stages": 2},
        "extra": {"BM": rows, "BN": 64, "num_warps": 8, "num_stages": 2},
    }
