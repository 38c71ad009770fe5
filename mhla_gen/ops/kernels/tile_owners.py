"""Which groups read a tile: the lists of tile attention, inverted for gradients of keys.

A *patch* is a box of neighbouring small tiles whose gradients one program sums, or a single tile.
The owners of a patch are the groups that read some of its tiles, each stored as 65536 · group plus
one bit for each tile that it reads.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mhla_gen.ops.kernels.boxes import block_box, box_tokens
from mhla_gen.ops.kernels.compiled import launch
from mhla_gen.ops.kernels.launch import quotient_up
from mhla_gen.ops.kernels.tile_call import TileCall, three_axes

# Owners have 16 bits for tiles.
_MOST_TILES = 16


class Patches(NamedTuple):
    """How the tiles of a grid are divided into patches."""

    size: tuple[int, ...]
    """Tiles of the largest patch along three axes, ones in front."""
    counts: tuple[int, ...]
    """Patches along three axes."""

    @property
    def tiles(self) -> int:
        """Tiles of the largest patch."""
        return math.prod(self.size)


def choose_patches(call: TileCall, keys: int) -> Patches:
    """Patches of up to `keys` slots, as close to cubes of tokens as tiles allow."""
    tiles = three_axes(call.placed.tiles)
    sides = [call.slot_sizes[name] for name in ("SLOT_T", "SLOT_H", "SLOT_W")]
    size = [1, 1, 1]
    while 2 * math.prod(size) <= min(keys // call.slot_sizes["SLOTS"], _MOST_TILES):
        free = [axis for axis in range(3) if 2 * size[axis] <= tiles[axis]]
        if not free:
            break
        size[min(reversed(free), key=lambda axis: size[axis] * sides[axis])] *= 2
    return Patches(tuple(size), tuple(map(quotient_up, tiles, size)))


def owners_of_patches(lists: Tensor, call: TileCall, patches: Patches) -> tuple[Tensor, Tensor]:
    """The owners of each patch of each head, ascending.

    Args:
        lists: Tiles and entries, int32 `[batch · heads, groups, 2, list_size]`.
        call: Sizes.
        patches: How tiles are divided.

    Returns:
        int32 `[batch · heads, patches, groups]`, filled from the front, and how many there are,
        int32 `[batch · heads, patches]`.
    """
    heads, num_groups, num_tiles = call.batch_heads, call.placed.num_groups, call.placed.num_tiles
    reads = torch.zeros(heads, num_tiles, num_groups, dtype=torch.uint8, device=lists.device)
    list_size = call.placed.list_size
    launch(
        reads_kernel,
        (heads * num_groups,),
        (lists, reads),
        (list_size, num_groups, num_tiles),
        {"BT": triton.next_power_of_2(max(list_size, 1)), "num_warps": 1},
    )
    num_patches = math.prod(patches.counts)
    owners = lists.new_empty((heads, num_patches, num_groups))
    counts = lists.new_empty((heads, num_patches))
    size_t, size_h, size_w = patches.size
    launch(
        owners_kernel,
        (heads * num_patches,),
        (reads, owners, counts),
        (call.box, patches.counts, num_patches, num_groups),
        {
            "SIZE_T": size_t,
            "SIZE_H": size_h,
            "SIZE_W": size_w,
            "RANK": call.rank,
            "BT": min(triton.next_power_of_2(num_groups), 1024),
            "num_warps": 1 if num_groups <= 256 else 4,
        },
    )
    return owners, counts


@triton.jit
def reads_kernel(lists_ptr, reads_ptr, list_size, num_groups, num_tiles, BT: tl.constexpr):
    """Put a one wherever one group and head reads a tile."""
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BT)
    tiles = tl.load(lists_ptr + row * (2 * list_size) + places, mask=places < list_size, other=0)
    reads_ptr += row // num_groups * num_tiles * num_groups + row % num_groups
    tl.store(reads_ptr + tiles * num_groups, 1, mask=places < list_size)


@triton.jit
def owners_kernel(
    reads_ptr,
    owners_ptr,
    counts_ptr,
    box,
    patches,
    num_patches,
    num_groups,
    SIZE_T: tl.constexpr,
    SIZE_H: tl.constexpr,
    SIZE_W: tl.constexpr,
    RANK: tl.constexpr,
    BT: tl.constexpr,
):
    """The owners of one patch and head, from a table of which group reads which tile."""
    index = tl.program_id(0).to(tl.int64)
    first_t, first_h, first_w, count_t, count_h, count_w = block_box(
        tl.program_id(0) % num_patches, box[3], box[4], box[5], patches[0], patches[1], patches[2],
        RANK,
    )  # fmt: skip
    reads_ptr += index // num_patches * (box[3] * box[4] * box[5]) * num_groups
    owners_ptr += index * num_groups
    found = 0
    for start in range(0, num_groups, BT):
        groups = start + tl.arange(0, BT)
        bits = tl.zeros((BT,), tl.int32)
        for member in tl.static_range(SIZE_T * SIZE_H * SIZE_W):
            w, h, t = member % SIZE_W, member // SIZE_W % SIZE_H, member // (SIZE_W * SIZE_H)
            exists = (t < count_t) & (h < count_h) & (w < count_w) & (groups < num_groups)
            tile = ((first_t + t) * box[4] + first_h + h) * box[5] + first_w + w
            read = tl.load(reads_ptr + tile * num_groups + groups, mask=exists, other=0)
            bits |= read.to(tl.int32) << member
        owns = bits != 0
        places = found + tl.cumsum(owns.to(tl.int32), axis=0) - 1
        tl.store(owners_ptr + places, groups * 65536 + bits, mask=owns)
        found += tl.sum(owns.to(tl.int32))
    tl.store(counts_ptr + index, found)


@triton.jit
def patch_slots(
    patch, slots, box, patches, SLOTS: tl.constexpr, SIZE_T: tl.constexpr, SIZE_H: tl.constexpr,
    SIZE_W: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Slots of a patch, `SLOTS` a tile: which of its tiles they belong to, tokens, which exist."""
    T, H, W, LT, LH, LW = box
    first_t, first_h, first_w, count_t, count_h, count_w = block_box(
        patch, LT, LH, LW, patches[0], patches[1], patches[2], RANK
    )
    member, place = slots // SLOTS, slots % SLOTS
    w, h, t = member % SIZE_W, member // SIZE_W % SIZE_H, member // (SIZE_W * SIZE_H)
    exists = (t < count_t) & (h < count_h) & (w < count_w)
    tile = ((first_t + t) * LH + first_h + h) * LW + first_w + w
    first_t, first_h, first_w, size_t, size_h, size_w = block_box(
        tl.where(exists, tile, 0), T, H, W, LT, LH, LW, RANK
    )
    valid = exists & (place < size_t * size_h * size_w)
    tokens = box_tokens(place, first_t, first_h, first_w, size_h, size_w, H, W, RANK)
    return member, tokens, valid
