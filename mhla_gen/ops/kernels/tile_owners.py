"""Which groups read a tile: the lists of tile attention, inverted for gradients of keys."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mhla_gen.ops.kernels.compiled import launch


def owners_of_tiles(lists: Tensor, num_tiles: int) -> tuple[Tensor, Tensor]:
    """The owners of each tile of each head: the groups that read it, ascending.

    Args:
        lists: Tiles and entries, int32 `[batch · heads, groups, 2, list_size]`.
        num_tiles: Tiles of a head.

    Returns:
        Groups, int32 `[batch · heads, tiles, groups]`, filled from the front, and how many there
        are, int32 `[batch · heads, tiles]`.
    """
    heads, num_groups, _, list_size = lists.shape
    reads = torch.zeros(heads, num_tiles, num_groups, dtype=torch.uint8, device=lists.device)
    launch(
        reads_kernel,
        (heads * num_groups,),
        (lists, reads),
        (list_size, num_groups, num_tiles),
        {"BT": triton.next_power_of_2(max(list_size, 1)), "num_warps": 1},
    )
    owners = lists.new_empty((heads, num_tiles, num_groups))
    counts = lists.new_empty((heads, num_tiles))
    size = min(triton.next_power_of_2(num_groups), 1024)
    launch(
        owners_kernel,
        (heads * num_tiles,),
        (reads, owners, counts),
        (num_groups,),
        {"BT": size, "num_warps": max(1, size // 256)},
    )
    return owners, counts


@triton.jit
def reads_kernel(lists_ptr, reads_ptr, list_size, num_groups, num_tiles, BT: tl.constexpr):
    """Mark the tiles that one group of one head reads."""
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BT)
    tiles = tl.load(lists_ptr + row * (2 * list_size) + places, mask=places < list_size, other=0)
    reads_ptr += row // num_groups * num_tiles * num_groups + row % num_groups
    tl.store(reads_ptr + tiles * num_groups, 1, mask=places < list_size)


@triton.jit
def owners_kernel(reads_ptr, owners_ptr, counts_ptr, num_groups, BT: tl.constexpr):
    """The owners of one tile and head: where its row of the table has ones."""
    row = tl.program_id(0).to(tl.int64)
    found = 0
    for start in range(0, num_groups, BT):
        groups = start + tl.arange(0, BT)
        exists = groups < num_groups
        read = tl.load(reads_ptr + row * num_groups + groups, mask=exists, other=0).to(tl.int32)
        places = found + tl.cumsum(read, axis=0) - 1
        tl.store(owners_ptr + row * num_groups + places, groups, mask=read != 0)
        found += tl.sum(read)
    tl.store(counts_ptr + row, found)
