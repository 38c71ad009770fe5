"""What tile attention computes before it attends: means, rotated keys, and lists of tiles.

`box` is (T, H, W, LT, LH, LW): tokens and tiles along each axis; `groups` counts groups of tiles
along each. A *slot* is a place in the largest tile, `SLOT_T` × `SLOT_H` × `SLOT_W` of them, padded
to a power of two, `SLOTS`. A list names a tile twice: by its number, and by an *entry* of which
every slot finds its token without a division: 16 · first token + 8, plus one of the bits 1, 2, 4
for each axis along which the tile is a token shorter than the largest one.
"""

import triton
import triton.language as tl

from mhla_gen.ops.kernels.boxes import box_tokens, divide, group_box, tile_box
from mhla_gen.ops.kernels.features import load_angles, rotate
from mhla_gen.ops.kernels.pieces import head_offset, load_pieces, store_pieces

# Scores of tiles that a list already has: below every other one.
_TAKEN = tl.constexpr(-(2**31))


@triton.jit
def read_boxes_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    rotated_ptr,
    means_ptr,
    lengths_ptr,
    strides,
    rotated_strides,
    box,
    groups,
    num_boxes,
    num_heads,
    D: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
    SLOTS: tl.constexpr,
    RANK: tl.constexpr,
    ALIGN: tl.constexpr,
    ROTARY: tl.constexpr,
    STORE: tl.constexpr,
    MEAN: tl.constexpr,
    LENGTHS: tl.constexpr,
):
    """Read one tile (or group, where `groups` is given) of one head, rotated.

    `STORE` says where to: "raster" to the tokens' own places, "pack" to `SLOTS` consecutive rows
    a box, zeros where it has fewer tokens, or "nowhere". `MEAN` keeps its mean, `LENGTHS` squared
    lengths: the largest one of its tokens ("longest"), those of its `SLOTS` rows ("each"), or
    "none".
    """
    head = tl.program_id(0) % num_heads
    index = tl.program_id(0) // num_heads % num_boxes
    batch = (tl.program_id(0) // num_heads // num_boxes).to(tl.int64)
    if groups is None:
        first_t, first_h, first_w, size_t, size_h, size_w = tile_box(index, box, RANK)
    else:
        first_t, first_h, first_w, size_t, size_h, size_w = group_box(index, box, groups, RANK)
    x_ptr += head_offset(strides, batch, head, ALIGN)
    row = (batch * num_heads + head) * num_boxes + index
    total = tl.zeros((BD,), tl.float32)
    longest = 0.0
    for start in range(0, SLOTS, BT):
        slots = start + tl.arange(0, BT)
        valid = slots < size_t * size_h * size_w
        tokens = box_tokens(slots, first_t, first_h, first_w, size_h, size_w, box[1], box[2], RANK)
        x, _x = load_pieces(x_ptr, tokens, valid, strides, D, BD, 0, ALIGN)
        x = x.to(tl.float32)
        if ROTARY:
            cos, sin = load_angles(cos_ptr, sin_ptr, tokens, valid, D, 0, BD)
            x = rotate(x, cos, sin)
        if MEAN:
            total += tl.sum(x, axis=0)
        if LENGTHS == "longest":
            longest = tl.maximum(longest, tl.max(tl.sum(x * x, axis=1)))
        elif LENGTHS == "each":
            place = lengths_ptr + row * SLOTS + slots
            tl.store(place, tl.sum(x * x, axis=1), mask=slots < SLOTS)
        if STORE == "raster":
            place = rotated_ptr + head_offset(rotated_strides, batch, head, ALIGN)
            store_pieces(place, x, x, tokens, valid, rotated_strides, D, BD, 0, ALIGN)
        elif STORE == "pack":
            rows, exists = row * SLOTS + slots, slots < SLOTS
            store_pieces(
                rotated_ptr, x, x, rows, exists, (0, D, 0, 1), D, BD, 0, 16 if D % 16 == 0 else 1
            )
    if LENGTHS == "longest":
        tl.store(lengths_ptr + row, longest)
    if MEAN:
        channels = tl.arange(0, BD)
        mean = total / (size_t * size_h * size_w)
        tl.store(means_ptr + row * D + channels, mean, mask=channels < D)


@triton.jit
def entries_kernel(
    entries_ptr,
    box,
    num_tiles,
    SLOT_T: tl.constexpr,
    SLOT_H: tl.constexpr,
    SLOT_W: tl.constexpr,
    RANK: tl.constexpr,
    BT: tl.constexpr,
):
    """The entry of every tile."""
    tiles = tl.program_id(0) * BT + tl.arange(0, BT)
    first_t, first_h, first_w, size_t, size_h, size_w = tile_box(tiles, box, RANK)
    token = (first_t * box[1] + first_h) * box[2] + first_w
    short = tl.where(size_w < SLOT_W, 1, 0)
    if RANK > 1:
        short += tl.where(size_h < SLOT_H, 2, 0)
    if RANK > 2:
        short += tl.where(size_t < SLOT_T, 4, 0)
    tl.store(entries_ptr + tiles, token * 16 + 8 + short, mask=tiles < num_tiles)


@triton.jit
def products_kernel(
    groups_ptr,
    tiles_ptr,
    products_ptr,
    num_groups,
    num_tiles,
    D: tl.constexpr,
    BG: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """Products of the means of BG groups with those of BT tiles, of one head."""
    row = tl.program_id(2).to(tl.int64)
    groups = tl.program_id(0) * BG + tl.arange(0, BG)
    tiles = tl.program_id(1) * BT + tl.arange(0, BT)
    groups_ptr += row * num_groups * D
    tiles_ptr += row * num_tiles * D
    products = tl.zeros((BG, BT), tl.float32)
    for start in range(0, D, BD):
        channels = start + tl.arange(0, BD)
        held = (channels < D)[None, :]
        q = tl.load(
            groups_ptr + groups[:, None] * D + channels[None, :],
            mask=(groups < num_groups)[:, None] & held,
            other=0.0,
        )
        k = tl.load(
            tiles_ptr + tiles[:, None] * D + channels[None, :],
            mask=(tiles < num_tiles)[:, None] & held,
            other=0.0,
        )
        products = tl.dot(q, tl.trans(k), products, input_precision="tf32x3")
    places = groups[:, None] * num_tiles + tiles[None, :]
    exist = (groups < num_groups)[:, None] & (tiles < num_tiles)[None, :]
    tl.store(products_ptr + row * num_groups * num_tiles + places, products, mask=exist)


@triton.jit
def _window(group, box, groups, reach, before, RANK: tl.constexpr):
    """The first tile along each axis of the window of a group; see `tiles.window_tiles`."""
    first_t, first_h = 0, 0
    first_w = _first(group % groups[2], box[5], groups[2], reach[2], before[2])
    if RANK > 1:
        row = group // groups[2]
        first_h = _first(row % groups[1], box[4], groups[1], reach[1], before[1])
        if RANK > 2:
            first_t = _first(row // groups[1], box[3], groups[0], reach[0], before[0])
    return first_t, first_h, first_w


@triton.jit
def _first(group, num_tiles, num_groups, reach, before):
    first = group * num_tiles // num_groups - before
    return tl.maximum(tl.minimum(first, num_tiles - reach), 0)


@triton.jit
def _window_tiles(window, index, box, reach, RANK: tl.constexpr):
    """Tiles of these indices of a window."""
    rest, along = divide(index, reach[2])
    tiles = window[2] + along
    if RANK > 1:
        rest, along = divide(rest, reach[1])
        tiles += (window[1] + along) * box[5]
        if RANK > 2:
            tiles += (window[0] + rest) * (box[4] * box[5])
    return tiles


@triton.jit
def _in_window(window, tiles, box, reach, RANK: tl.constexpr):
    """Which tiles are in a window."""
    rest, along = divide(tiles, box[5])
    inside = (along >= window[2]) & (along < window[2] + reach[2])
    if RANK > 1:
        rest, along = divide(rest, box[4])
        inside = inside & (along >= window[1]) & (along < window[1] + reach[1])
        if RANK > 2:
            inside = inside & (rest >= window[0]) & (rest < window[0] + reach[0])
    return inside


@triton.jit
def list_kernel(
    products_ptr,
    entries_ptr,
    lists_ptr,
    box,
    groups,
    reach,
    before,
    num_groups,
    num_tiles,
    window_size,
    top,
    RANK: tl.constexpr,
    BW: tl.constexpr,
    BT: tl.constexpr,
):
    """The list of one group and head: its window, then the `top` largest products, by index.

    The top-th largest product is found bit by bit, until as many are as large as are wanted; ties
    are broken by index. The search begins at a sixteenth of the largest product if enough are
    larger: with numbers so close, exponents need no search.
    """
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(0) % num_groups
    size = window_size + top
    lists_ptr += row * size * 2
    window = _window(group, box, groups, reach, before, RANK)
    if window_size > 0:
        near = tl.arange(0, BW)
        tile = _window_tiles(window, near, box, reach, RANK)
        entry = tl.load(entries_ptr + tile, mask=near < window_size, other=0)
        tl.store(lists_ptr + near, tile, mask=near < window_size)
        tl.store(lists_ptr + size + near, entry, mask=near < window_size)
    if products_ptr is not None:
        tiles = tl.arange(0, BT)
        exists = tiles < num_tiles
        # + 0 makes one zero of two.
        products = tl.load(products_ptr + row * num_tiles + tiles, mask=exists, other=0.0) + 0.0
        bits = products.to(tl.int32, bitcast=True)
        # Whole numbers in the order of the products.
        order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        free = exists
        if window_size > 0:
            free = free & ~_in_window(window, tiles, box, reach, RANK)
        order = tl.where(free, order, _TAKEN)
        # Four octaves up to the largest one.
        low = tl.maximum(tl.max(order), _TAKEN + (4 << 23) - 1) - (4 << 23) + 1
        bit = 24
        if tl.sum((order >= low).to(tl.int32)) >= top:
            threshold = low
        else:
            threshold = tl.where(tl.sum((order >= 0).to(tl.int32)) >= top, 0, _TAKEN)
            bit = 30
        while bit >= 0:
            larger = threshold + (1 << bit)
            number = tl.sum((order >= larger).to(tl.int32))
            threshold = tl.where(number >= top, larger, threshold)
            bit = tl.where(number == top, -1, bit - 1)
        above, equal = order > threshold, order == threshold
        wanted = top - tl.sum(above.to(tl.int32))
        # How many came so far, above and equal, counted in one scan.
        counts = tl.cumsum(above.to(tl.int32) + (equal.to(tl.int32) << 16), axis=0)
        equals = counts >> 16
        taken = above | (equal & (equals <= wanted))
        place = window_size + (counts & 0xFFFF) + tl.minimum(equals, wanted) - 1
        entry = tl.load(entries_ptr + tiles, mask=taken, other=0)
        tl.store(lists_ptr + place, tiles, mask=taken)
        tl.store(lists_ptr + size + place, entry, mask=taken)
