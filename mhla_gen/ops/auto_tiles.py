"""The tiles for a share of pairs: how large they and their groups are, and how far a window goes.

It computes with plain integers, so that `torch.compile` can trace it.
"""

import itertools
import math
from collections.abc import Callable

from mhla_gen.errors import UserError
from mhla_gen.ops.partition import check_grid
from mhla_gen.ops.tiles import TileLayout, tiling

# Tile lengths along an axis that `auto_tiles` chooses from, the preferred one first.
_TILE_LENGTHS = (4, 5, 3)
# Along a clip's frames also 7: in 7×3×3, which fills 63 of 64 slots, and 21 frames without rest.
_FRAMES = (*_TILE_LENGTHS, 7)
_LINE_TILE = 16
_TILE_TOKENS = {2: 16, 3: 64}
# Tokens of a clip up to which tiles of 64 are fewer than an image of 4,096 tokens has: too few to
# choose from, and too large for a window.
_SHORT_CLIP = 16384
# Tokens of an image up to which every tile has a list of its own, if a window takes at most 4/5 of
# it, 5×5 tiles or else 3×3. Images of 4,096 tokens were trained; much larger ones share lists for
# speed.
_SMALL_IMAGE, _MOST_NEAR = 8192, 0.8
# Above this share, lists of single tiles may take longer than softmax on all pairs.
_MOST_ALONE = 0.25
# Queries of a group: the number of rows at which matrix products on a GPU are efficient.
_GROUP_QUERIES, _FLAT_GROUP_QUERIES = 128, 64
# Share of the tiles of an axis that groups of even size must fill.
_FILLED = 0.95


def auto_tiles(
    grid: tuple[int, ...],
    share: float,
    *,
    tile: tuple[int, ...] | None = None,
    group: tuple[int, ...] | None = None,
    window: tuple[int, ...] | None = None,
) -> TileLayout:
    """The layout for a share of pairs: near ones in a window, and others chosen by content.

    - Tiles have at most 16 tokens on a line or an image (about 4×4) and at most 64 in a clip, with
      3 to 5 along each axis, or 7 frames; the lengths with the fewest empty slots are chosen. A
      clip of at most 16,384 tokens has the tiles and groups of an image in each of its frames.
    - Up to a quarter of the pairs, every tile of an image of at most 8,192 tokens has a list of its
      own: the best of all layouts, although slower than to share lists (docs/evidence.md). It has a
      window of 5×5 tiles, or else 3×3, whichever takes at most four fifths of the share; where
      neither does, the next rules hold.
    - Other images first get a window of 3×3 tiles, if the share allows it, since they lose most
      without one. So does a clip with tiles of one frame, or even of 3×3×3 tiles, if they take at
      most three quarters of the share. On a line and in other clips, the window grows by two tiles
      along its shortest axis that does not cover the grid, as long as it takes at most half of the
      share.
    - Groups, which share a list, double along an axis that they divide, or nearly so, the shortest
      first, up to 64 queries in an image and 128 elsewhere, as long as the window around them stays
      within these bounds.
    - The rest of the share is chosen by content.

    Args:
        grid: Tokens along each axis.
        share: Share of all pairs of a query and a key, in (0, 1]. At least one tile is read.
        tile: Tile to use instead; see `TileLayout`, as the two below.
        group: Group to use instead; its own tiles may take more than the share. If it has several
            tiles, its window is that of other images.
        window: Window to use instead; it may take more than the share.

    Raises:
        ValueError: If the share, the grid or a size is out of range.
    """
    if not 0 < share <= 1:
        raise UserError(f"the share of exact pairs must be in (0, 1], found {share}")
    check_grid(grid)
    tile = _auto_tile(grid) if tile is None else tile
    tiles = tiling(grid, tile, (0,) * len(grid), 0).tiles
    num_tiles = math.prod(tiles)
    budget = max(1, round(share * num_tiles))

    def near(window: tuple[int, ...], group: tuple[int, ...] | None = None) -> int:
        return tiling(grid, tile, window, 0, group).window_size

    flat, single = _is_flat(tile), (1,) * len(grid)
    square, cube = (*single[2:], 3, 3), (3,) * len(grid)
    most = budget if flat else max(1, budget // 2)
    first, alone = window, None
    if flat and group in (None, single) and share <= _MOST_ALONE and _is_small_image(grid, tile):
        wide = (*single[2:], 5, 5)
        alone = next((w for w in (wide, square) if near(w) <= _MOST_NEAR * budget), None)
    if alone is not None:
        group, first = single, alone if window is None else window
    if first is None:
        first = single
        if flat and near(square, group) <= budget:
            around = _auto_group(tile, tiles, lambda _: True) if group is None else group
            deep = len(grid) == 3 and near(cube, around) <= budget * 3 // 4
            first = cube if deep else square
    if group is None:
        chosen = first
        group = _auto_group(tile, tiles, lambda group: near(chosen, group) <= most)
    if window is None and budget == num_tiles:
        return TileLayout(tile, group, tuple(n + 1 - n % 2 for n in tiles), 0)
    if window is None and not flat:
        first = _grown(grid, tile, first, group, most)
    return TileLayout(tile, group, first, max(0, budget - near(first, group)))


def _grown(
    grid: tuple[int, ...],
    tile: tuple[int, ...],
    window: tuple[int, ...],
    group: tuple[int, ...],
    most: int,
) -> tuple[int, ...]:
    """The window, grown along its shortest axis to at most `most` tiles around a group."""
    while True:
        placed = tiling(grid, tile, window, 0, group)
        free = [a for a, n in enumerate(placed.tiles) if placed.reach[a] < n]
        if not free:
            return window
        axis = min(free, key=lambda a: placed.reach[a] * tile[a])
        larger = tuple(w + 2 * (a == axis) for a, w in enumerate(window))
        if tiling(grid, tile, larger, 0, group).window_size > most:
            return window
        window = larger


def _auto_tile(grid: tuple[int, ...]) -> tuple[int, ...]:
    """Tile lengths with the fewest empty slots; tiles below the size limit also cost."""
    if len(grid) == 1:
        return (_LINE_TILE,)
    if len(grid) == 3 and math.prod(grid) <= _SHORT_CLIP:
        return (1, *_auto_tile(grid[1:]))
    limit = _TILE_TOKENS[len(grid)]

    def cost(tile: tuple[int, ...]) -> float:
        counts = [-(-n // size) for n, size in zip(grid, tile, strict=True)]
        slots = math.prod(-(-n // count) for n, count in zip(grid, counts, strict=True))
        # Kernels pad a tile to a power of two.
        padded = 1 << (slots - 1).bit_length()
        return math.prod(counts) * padded / math.prod(grid) * limit / slots

    frames = (_FRAMES,) if len(grid) == 3 else ()
    lengths = itertools.product(*frames, *[_TILE_LENGTHS] * 2)
    return min((tile for tile in lengths if math.prod(tile) <= limit), key=cost)


def _is_flat(tile: tuple[int, ...]) -> bool:
    """Whether tiles are of an image, or of one frame of a clip."""
    return len(tile) == 2 or (len(tile) == 3 and tile[0] == 1)


def _is_small_image(grid: tuple[int, ...], tile: tuple[int, ...]) -> bool:
    """Whether lists for single tiles are worth their time; those of smaller tiles are not."""
    tokens, sides = math.prod(grid), grid[-2:]
    return tokens == math.prod(sides) and tokens <= _SMALL_IMAGE and min(*tile[-2:], *sides) >= 3


def _auto_group(
    tile: tuple[int, ...], tiles: tuple[int, ...], fits: Callable[[tuple[int, ...]], bool]
) -> tuple[int, ...]:
    flat = _is_flat(tile)
    queries = _FLAT_GROUP_QUERIES if flat else _GROUP_QUERIES
    axes = range(len(tile))[-2:] if flat else range(len(tile))
    group = (1,) * len(tile)
    while True:
        doubled = [2 * size for size in group]
        free = [a for a in axes if tiles[a] >= _FILLED * (-(-tiles[a] // doubled[a]) * doubled[a])]
        if not free or 2 * math.prod(group) * math.prod(tile) > queries:
            return group
        axis = min(reversed(free), key=lambda a: tile[a] * group[a])
        larger = tuple(size * (1 + (a == axis)) for a, size in enumerate(group))
        if not fits(larger):
            return group
        group = larger
