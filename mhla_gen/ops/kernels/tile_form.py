"""Launches of tile attention: lists, and the output."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mhla_gen.ops.kernels.compiled import launch
from mhla_gen.ops.kernels.launch import padded, quotient_up
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
from mhla_gen.ops.kernels.tile_lists import entries_kernel, list_kernel, products_kernel
from mhla_gen.ops.kernels.tile_reads import pack_tiles, read_groups, read_tiles

# CUDA's limit for the third axis of a launch.
_MOST_PROGRAMS = 65_535


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
    packed: bool = False
    """Whether queries, keys and values are packed by group or tile; else they are read in place."""
    max_registers: int | None = None
    """Most registers of a thread; None leaves them to the compiler."""

    @property
    def options(self) -> dict:
        """Compile-time arguments of a kernel."""
        options = {"BM": self.rows, "BN": self.keys}
        options |= {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.max_registers is None else options | {"maxnreg": self.max_registers}


class Reads(NamedTuple):
    """What the inputs are turned into before anything is attended to; see `tile_reads.py`."""

    queries: Tensor
    """Rotated; by group, if packed."""
    keys: Tensor
    """Rotated; by tile, if packed."""
    values: Tensor
    """By tile, if packed."""
    query_means: Tensor | None
    """Of groups, if tiles are chosen by content."""
    key_means: Tensor | None
    """Of tiles, with `query_means`."""
    longest: Tensor | None
    """The largest squared length of a key of every head, if scores are bounded."""
    lengths: Tensor | None
    """Squared lengths of queries, if they are packed and scores are bounded."""


def read(query: Tensor, key: Tensor, value: Tensor, call: TileCall, loop: Loop) -> Reads:
    """Rotate and pack the inputs as `loop` needs them."""
    bounded, choose = takes_bound(query), call.placed.top > 0
    keys, key_means, longest = read_tiles(
        key,
        call,
        mean=choose,
        lengths=bounded and call.placed.list_size > 0,
        pack=loop.packed,
    )
    values = pack_tiles(value, call) if loop.packed else value
    slots = call.whole_blocks(loop.rows) if loop.packed else None
    queries, query_means, lengths = read_groups(
        query, call, mean=choose, lengths=bounded, slots=slots
    )
    return Reads(queries, keys, values, query_means, key_means, longest, lengths)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    extra: Extra | None,
    call: TileCall,
    reads: Reads | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, log-sum-exp `[batch, heads, seq_len]` and lists; see `tile_lists`."""
    loop = forward_loop(call)
    reads = read(query, key, value, call, loop) if reads is None else reads
    longest = reads.longest
    if takes_bound(query) and extra is not None:
        beside = extra[0].float().square().sum(-1).amax(dim=1).flatten()
        longest = beside if longest is None else torch.maximum(longest, beside)
    lists = tile_lists(reads.query_means, reads.key_means, call)
    batch, seq_len, heads, _ = query.shape
    results = (
        value.new_empty(value.shape),
        query.new_empty((batch, heads, seq_len), dtype=torch.float32),
    )
    sources, flags = (*reads[:3], lists), None
    if longest is not None:
        flags = attend(sources, (longest, reads.lengths), None, extra, results, call, loop)
    attend(sources, None, flags, extra, results, call, loop)
    return *results, lists


def attend(
    sources: tuple[Tensor, Tensor, Tensor, Tensor],
    bound: tuple[Tensor, Tensor | None] | None,
    flags: Tensor | None,
    extra: Extra | None,
    results: tuple[Tensor, Tensor],
    call: TileCall,
    loop: Loop,
) -> Tensor | None:
    """Launch `tile_attend_kernel`, with a bound of scores or without.

    Args:
        sources: Rotated queries and keys, values, and lists.
        bound: Largest squared length of a key, of every head, and squared lengths of queries if
            they are packed. None for no bound.
        flags: Without a bound, which programs have to run; None for all.
        extra: Keys, values and mask off the grid.
        results: Room for output and log-sum-exp.
        call: Shapes and layout of the call.
        loop: Block sizes, warps and stages.

    Returns:
        `flags`; with a bound, new ones that mark the programs to repeat without it.
    """
    queries, keys, values, lists = sources
    out, lse = results
    blocks = quotient_up(queries.shape[2] if loop.packed else call.queries, loop.rows)
    strides = *extra_strides(extra), out.stride()
    read = queries, keys, values
    if loop.packed:
        places = ((0, 0, 0, 0),) * 3
        sizes = loop.rows, loop.keys, loop.keys
        read = tuple(map(descriptor, read, sizes))
    else:
        places = tuple(x.stride() for x in read)
    programs = blocks * call.placed.num_groups * call.batch_heads
    if bound is not None:
        flags = lists.new_empty(programs)
    launch(
        tile_attend_kernel,
        (programs,),
        (*read, lists, *(bound or (None, None)), flags, *extra_tensors(extra), out, lse),
        (
            *places,
            out.stride(),
            *extra_strides(extra),
            call.box,
            call.groups,
            call.query.shape[1],
            call.query.shape[2],
            call.placed.num_groups,
            call.placed.num_tiles,
            call.placed.list_size,
            0 if extra is None else extra[0].shape[1],
            blocks,
            call.scale * LOG2E,
        ),
        without(kernel_constants(call, loop.options, *places, *strides), "ROTARY")
        | {
            "WIDE": not loop.packed and numbered_wide(keys, values),
            "BOUNDED": bound is not None,
            "PACKED": loop.packed,
        },
    )
    return flags


def descriptor(packed: Tensor, count: int) -> TensorDescriptor:
    """Copies `count` rows of packed tiles or groups, channels padded to a power of two."""
    rows = packed.flatten(0, -2)
    return TensorDescriptor.from_tensor(rows, [count, padded(rows.shape[1])])


def takes_bound(query: Tensor) -> bool:
    """Whether scores are bounded by the lengths of queries and keys, see `tile_attend_kernel`.

    Weights far below the bound would vanish in float16, and lose digits that float32 has. Up to 64
    channels, a bound with a second launch for programs that need another has not been timed.
    """
    return query.dtype == torch.bfloat16 and query.shape[3] > 64


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
        products = mean_products(mean_queries, mean_keys)
    launch(
        list_kernel,
        (placed.num_groups * call.batch_heads,),
        (products, entries, lists),
        (
            call.box,
            call.groups,
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
            # Warps would have to wait for each other at every bit.
            "num_warps": max(1, min(8, padded(placed.num_tiles) // 2048)),
        },
    )
    return lists


def mean_products(mean_queries: Tensor, mean_keys: Tensor) -> Tensor:
    """Products of all groups with all tiles of a head, float32 `[batch · heads, groups, tiles]`."""
    rows, num_groups, dim = mean_queries.shape
    num_tiles = mean_keys.shape[1]
    products = mean_queries.new_empty((rows, num_groups, num_tiles))
    parts = (x.split(_MOST_PROGRAMS) for x in (mean_queries, mean_keys, products))
    for part in zip(*parts, strict=True):
        launch(
            products_kernel,
            (quotient_up(num_groups, 64), quotient_up(num_tiles, 64), len(part[0])),
            part,
            (num_groups, num_tiles),
            {"D": dim, "BG": 64, "BT": 64, "BD": min(padded(dim), 64), "num_warps": 4},
        )
    return products


def forward_loop(call: TileCall) -> Loop:
    """The fastest loop that was measured, see `docs/kernel-speed.md`."""
    if call.operand["OPERAND"] == tl.float32:
        return Loop(call.block(32), 32, 4, 1)
    rows, dim = call.block(128), max(call.query.shape[3], call.value.shape[3])
    if worth_packing(call):
        # So small that one program computes weights while another one multiplies.
        return Loop(rows, 64, 4, 2, packed=True)
    if rows <= 32:
        return few_queries(rows, dim)
    if dim <= 64:
        return Loop(rows, 64, 4, 2)
    # Steps of less than a tile would compute the places of its slots anew.
    return Loop(64, 32, 4, 2) if call.slot_sizes["SLOTS"] <= 32 else Loop(64, 64, 4, 3)


def few_queries(rows: int, dim: int) -> Loop:
    """The loop for so few queries that one warp is short of work: with small steps, more fit.

    Entries of a list, and the keys that they name, are loaded one after the other, so that two
    steps of keys are held from five stages on. Where registers leave room for few programs anyway,
    one is better.
    """
    return Loop(rows, 32, 1, 5 if rows * dim <= 2048 else 2)


def worth_packing(call: TileCall) -> bool:
    """Whether programs read so much that packing tiles first is faster, for tensor descriptors.

    Descriptors need whole tiles, channels in one piece, and rows of a multiple of 16 bytes.
    """
    dims = call.query.shape[3], call.value.shape[3]
    return (
        call.operand["OPERAND"] != tl.float32
        and call.slot_sizes["SLOTS"] >= 64
        and call.placed.list_size > 0
        and all(96 < dim <= 128 and dim % 8 == 0 for dim in dims)
    )
