"""What tile attention needs before it attends: packed tiles, means, and lists of tiles.

`box` is (T, H, W, LT, LH, LW): tokens and tiles along each axis; `groups` counts groups of tiles
along each. A *pack* holds the tokens of every tile (or group) in `SLOTS` consecutive rows of one
head, rotated, with rows of zeros where a tile has fewer tokens.
"""

import triton
import triton.language as tl

from mhla_gen.ops.kernels.boxes import block_box, box_tokens, group_box
from mhla_gen.ops.kernels.features import load_angles, rotate
from mhla_gen.ops.kernels.pieces import head_offset, load_pieces

# Scores of tiles that a list already has: below every other one.
_TAKEN = tl.constexpr(-(2**31))


@triton.jit
def load_box_rows(
    x_ptr, cos_ptr, sin_ptr, slots, place, strides, box, D: tl.constexpr, BD: tl.constexpr,
    RANK: tl.constexpr, ALIGN: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    """Float32 rows [slots, BD] of a box of tokens, rotated, 0 in empty slots; and which are not."""
    first_t, first_h, first_w, size_t, size_h, size_w = place
    valid = slots < size_t * size_h * size_w
    tokens = box_tokens(slots, first_t, first_h, first_w, size_h, size_w, box[1], box[2], RANK)
    x, _x = load_pieces(x_ptr, tokens, valid, strides, D, BD, 0, ALIGN)
    x = x.to(tl.float32)
    if ROTARY:
        cos, sin = load_angles(cos_ptr, sin_ptr, tokens, valid, D, 0, BD)
        x = rotate(x, cos, sin)
    return x, valid


@triton.jit
def pack_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    packed_ptr,
    means_ptr,
    strides,
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
):
    """Pack one tile (or group, where `groups` is given) of one head, or take its mean, or both."""
    head = tl.program_id(0) % num_heads
    index = tl.program_id(0) // num_heads % num_boxes
    batch = (tl.program_id(0) // num_heads // num_boxes).to(tl.int64)
    if groups is None:
        place = block_box(index, box[0], box[1], box[2], box[3], box[4], box[5], RANK)
    else:
        place = group_box(index, box, groups, RANK)
    x_ptr += head_offset(strides, batch, head, ALIGN)
    row = (batch * num_heads + head) * num_boxes + index
    if STORE:
        packed_ptr += row * (SLOTS * D)
    channels = tl.arange(0, BD)
    total = tl.zeros((BD,), tl.float32)
    for start in range(0, SLOTS, BT):
        slots = start + tl.arange(0, BT)
        x, _valid = load_box_rows(
            x_ptr, cos_ptr, sin_ptr, slots, place, strides, box, D, BD, RANK, ALIGN, ROTARY
        )
        if MEAN:
            total += tl.sum(x, axis=0)
        if STORE:
            tl.store(
                packed_ptr + slots[:, None] * D + channels[None, :],
                x.to(packed_ptr.dtype.element_ty),
                mask=(slots < SLOTS)[:, None] & (channels < D)[None, :],
            )
    if MEAN:
        count = place[3] * place[4] * place[5]
        tl.store(means_ptr + row * D + channels, total / count, mask=channels < D)


@triton.jit
def window_tile(group, index, box, groups, reach, before, RANK: tl.constexpr):
    """Tile `index` of the window of a group; see `tiles.window_tiles`."""
    along_w = _first(group % groups[2], box[5], groups[2], reach[2], before[2]) + index % reach[2]
    if RANK == 1:
        return along_w
    else:
        rest, row = index // reach[2], group // groups[2]
        along_h = _first(row % groups[1], box[4], groups[1], reach[1], before[1]) + rest % reach[1]
        tile = along_h * box[5] + along_w
        if RANK == 3:
            plane = _first(row // groups[1], box[3], groups[0], reach[0], before[0])
            tile += (plane + rest // reach[1]) * (box[4] * box[5])
        return tile


@triton.jit
def _first(group, num_tiles, num_groups, reach, before):
    first = group * num_tiles // num_groups - before
    return tl.maximum(tl.minimum(first, num_tiles - reach), 0)


@triton.jit
def list_kernel(
    products_ptr,
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

    The top-th largest product is found bit by bit; of its equals the first ones are taken.
    """
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(0) % num_groups
    lists_ptr += row * (window_size + top)
    near = tl.arange(0, BW)
    if window_size > 0:
        tile = window_tile(group, near, box, groups, reach, before, RANK)
        tl.store(lists_ptr + near, tile, mask=near < window_size)
    if top > 0:
        tiles = tl.arange(0, BT)
        exists = tiles < num_tiles
        # + 0 makes one zero of two.
        products = tl.load(products_ptr + row * num_tiles + tiles, mask=exists, other=0.0) + 0.0
        bits = products.to(tl.int32, bitcast=True)
        order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        order = tl.where(exists & ~_in_window(tiles, group, box, groups, reach, before, RANK),
                         order, _TAKEN)  # fmt: skip
        rank = order.to(tl.int64) - _TAKEN
        threshold = tl.zeros((), tl.int64)
        for bit in range(31, -1, -1):
            larger = threshold + (tl.full((), 1, tl.int64) << bit)
            enough = tl.sum((rank >= larger).to(tl.int32)) >= top
            threshold = tl.where(enough, larger, threshold)
        above = rank > threshold
        equal = (rank == threshold).to(tl.int32)
        wanted = top - tl.sum(above.to(tl.int32))
        taken = above | ((equal > 0) & (tl.cumsum(equal, axis=0) <= wanted))
        place = tl.cumsum(taken.to(tl.int32), axis=0) - 1
        tl.store(lists_ptr + window_size + place, tiles, mask=taken)


@triton.jit
def _in_window(tiles, group, box, groups, reach, before, RANK: tl.constexpr):
    """Which tiles are in the window of a group."""
    first = _first(group % groups[2], box[5], groups[2], reach[2], before[2])
    along = tiles % box[5]
    inside = (along >= first) & (along < first + reach[2])
    if RANK > 1:
        row = group // groups[2]
        first = _first(row % groups[1], box[4], groups[1], reach[1], before[1])
        along = tiles // box[5] % box[4]
        inside = inside & (along >= first) & (along < first + reach[1])
        if RANK > 2:
            first = _first(row // groups[1], box[3], groups[0], reach[0], before[0])
            along = tiles // (box[5] * box[4])
            inside = inside & (along >= first) & (along < first + reach[0])
    return inside
