"""Which tiles of the token grid a query reads exactly: tiles, groups, windows, choice by content.

`block_starts` divides each axis of `n` tokens into `ceil(n / tile)` tiles, so any grid size works.
Neighbouring tiles form a *group*, whose queries share one list of tiles: those of a window around
the group, and the `top` other tiles whose mean key has the largest product with the group's mean
query. Tiles and groups are boxes of the grid, indexed in raster order.

Sizes are plain integers, so that `torch.compile` can trace them.
"""

import math
import operator
from typing import NamedTuple

import torch
from torch import Tensor

from mhla_gen.errors import UserError
from mhla_gen.ops.partition import block_slots, check_grid, check_whole


class TileLayout(NamedTuple):
    """Settings of `tile_attention` that say which tiles are read."""

    tile: tuple[int, ...]
    """Tokens of a tile along each axis, at most."""
    group: tuple[int, ...]
    """Tiles along each axis whose queries share one list, at most."""
    window: tuple[int, ...]
    """Odd number of tiles along each axis around a query's own tile; zeros for no window."""
    top: int
    """Further tiles, chosen by content."""


class Tiling(NamedTuple):
    """A `TileLayout` on a grid, with all numbers that follow from the two."""

    grid: tuple[int, ...]
    tiles: tuple[int, ...]
    """Tiles along each axis."""
    groups: tuple[int, ...]
    """Groups along each axis."""
    reach: tuple[int, ...]
    """Tiles along each axis of the window of a group, clipped to the grid."""
    before: tuple[int, ...]
    """Tiles of the window before the first tile of the group, away from the borders."""
    top: int
    """Tiles by content: at most those outside the window."""

    @property
    def num_tiles(self) -> int:
        """Tiles of the grid."""
        return math.prod(self.tiles)

    @property
    def num_groups(self) -> int:
        """Groups of the grid."""
        return math.prod(self.groups)

    @property
    def window_size(self) -> int:
        """Tiles of a window."""
        return math.prod(self.reach)

    @property
    def list_size(self) -> int:
        """Tiles that a group reads."""
        return self.window_size + self.top


def tiling(
    grid: tuple[int, ...],
    tile: tuple[int, ...],
    window: tuple[int, ...],
    top: int,
    group: tuple[int, ...] | None = None,
) -> Tiling:
    """Place a layout on a grid.

    Args:
        grid: Tokens along each axis.
        tile: See `TileLayout`, as the three below.
        window: A window as large as the grid or larger reads everything.
        top: Any number; at most the tiles outside the window are used.
        group: None for groups of one tile.

    Raises:
        ValueError: If a size is out of range; the message says which.
    """
    group = (1,) * len(grid) if group is None else group
    check_grid(grid)
    check_whole(tile=tile, window=window, group=group, top=top)
    # As indices, so that torch.compile specializes on the layout: with symbols it takes minutes.
    grid, tile, window, group = (
        tuple(operator.index(n) for n in each) for each in (grid, tile, window, group)
    )
    top = operator.index(top)
    sizes = {"tile": tile, "window": window, "group": group}
    for name, size in sizes.items():
        if len(size) != len(grid):
            raise UserError(f"{name} needs one number per axis of grid={grid}, found {size}")
    if min(*tile, *group) < 1:
        raise UserError(f"tile and group must be positive, found {tile} and {group}")
    if max(window) > 0 and any(w < 1 or w % 2 == 0 for w in window):
        raise UserError(
            f"window must be odd numbers of tiles, or all zeros for no window, found {window}"
        )
    if min(window) < 0 or top < 0:
        raise UserError(f"window and top must not be negative, found {window} and {top}")
    tiles = tuple(-(-n // size) for n, size in zip(grid, tile, strict=True))
    groups = tuple(-(-n // size) for n, size in zip(tiles, group, strict=True))
    # The largest group is -(-tiles // groups) tiles long.
    reach = tuple(
        min(w + -(-n // count) - 1, n) if w > 0 else 0
        for w, n, count in zip(window, tiles, groups, strict=True)
    )
    before = tuple(max(w - 1, 0) // 2 for w in window)
    left = math.prod(tiles) - math.prod(reach)
    return Tiling(grid, tiles, groups, reach, before, min(top, left))


def tile_share(
    grid: tuple[int, ...],
    tile: tuple[int, ...],
    window: tuple[int, ...],
    top: int,
    group: tuple[int, ...] | None = None,
) -> float:
    """Share of all pairs of a query and a key that `tile_attention` computes, counted in tiles."""
    placed = tiling(grid, tile, window, top, group)
    return placed.list_size / placed.num_tiles


def window_tiles(placed: Tiling, device: torch.device | str | None = None) -> Tensor:
    """Tiles of the window of every group, int64 `[num_groups, window_size]`, ascending."""
    rank = len(placed.grid)
    found = torch.zeros((), dtype=torch.int64, device=device)
    axes = zip(placed.tiles, placed.groups, placed.reach, placed.before, strict=True)
    for axis, (num_tiles, num_groups, reach, before) in enumerate(axes):
        first = torch.arange(num_groups, device=device).mul(num_tiles) // num_groups
        first = (first - before).clamp(0, max(num_tiles - reach, 0))
        along_axis = first[:, None] + torch.arange(reach, device=device)
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = num_groups, reach
        found = found * num_tiles + along_axis.reshape(shape)
    return found.reshape(placed.num_groups, placed.window_size)


@torch.no_grad()
def tile_lists(mean_query: Tensor, mean_key: Tensor, placed: Tiling) -> Tensor:
    """The list of tiles that each group and head reads.

    Args:
        mean_query: Mean rotated query of every group, `[batch, num_heads, num_groups, head_dim]`.
        mean_key: Mean rotated key of every tile, `[batch, num_heads, num_tiles, head_dim]`.
        placed: Tiles and groups.

    Returns:
        int64 `[batch, num_heads, num_groups, list_size]`: the window, then the tiles chosen by
        content, with ties broken by index.
    """
    window = window_tiles(placed, mean_query.device)
    shape = (*mean_query.shape[:3], placed.window_size)
    near = window.expand(shape)
    if placed.top == 0:
        return near
    # Products of float32 would depend on `torch.set_float32_matmul_precision`, which may make them
    # TF32 or bfloat16, and the choice with them. Apple's GPUs have no float64.
    wide = torch.float32 if mean_query.device.type == "mps" else torch.float64
    products = mean_query.to(wide) @ mean_key.to(wide).transpose(-1, -2)
    products = products.scatter(-1, near, float("-inf"))
    order = products.sort(dim=-1, descending=True, stable=True).indices
    return torch.cat((near, order[..., : placed.top]), dim=-1)


def group_slots(placed: Tiling, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """Tokens of every group: int64 and bool `[num_groups, slots]`, False where a slot is empty."""
    tiles = block_slots(placed.grid, placed.tiles, device)
    groups = block_slots(placed.tiles, placed.groups, device)
    tokens, filled = tiles.tokens[groups.tokens], filled_slots(tiles.filled, tiles.tokens)
    filled = filled[groups.tokens] & filled_slots(groups.filled, groups.tokens)[..., None]
    return tokens.flatten(1), filled.flatten(1)


def token_places(placed: Tiling, device: torch.device | str | None = None) -> Tensor:
    """Flat slot of every token in `group_slots`, int64 `[seq_len]`."""
    tiles = block_slots(placed.grid, placed.tiles, device)
    groups = block_slots(placed.tiles, placed.groups, device)
    size = tiles.tokens.shape[1]
    return groups.slots[tiles.slots // size] * size + tiles.slots % size


def filled_slots(filled: Tensor | None, slots: Tensor) -> Tensor:
    """`BlockSlots.filled`, all True where no slot is empty."""
    return torch.ones_like(slots, dtype=torch.bool) if filled is None else filled
