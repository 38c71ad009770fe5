"""Positions of a block's tokens: boxes of the token grid, which has `RANK` axes."""

import triton
import triton.language as tl


@triton.jit
def _axis_start(block, length, num_blocks):
    # block * length // num_blocks, split so that no product leaves 32 bits.
    return block * (length // num_blocks) + block * (length % num_blocks) // num_blocks


@triton.jit
def divide(x, divisor):
    """Quotient and remainder. Integer division is slow; a float quotient is exact below 2**21."""
    inverse = 1.0 / tl.cast(divisor, tl.float32)
    quotient = ((x.to(tl.float32) + 0.5) * inverse).to(tl.int32)
    return quotient, x - quotient * divisor


@triton.jit
def block_box(block, T, H, W, LT, LH, LW, RANK: tl.constexpr):
    """The box of tokens of `block` on the grid T×H×W cut into LT×LH×LW blocks.

    Returns:
        Its first position along each axis, then its size along each axis.
    """
    first_w = _axis_start(block % LW, W, LW)
    size_w = _axis_start(block % LW + 1, W, LW) - first_w
    first_t, first_h, size_t, size_h = 0, 0, 1, 1
    if RANK > 1:
        row = block // LW
        first_h = _axis_start(row % LH, H, LH)
        size_h = _axis_start(row % LH + 1, H, LH) - first_h
        if RANK > 2:
            first_t = _axis_start(row // LH, T, LT)
            size_t = _axis_start(row // LH + 1, T, LT) - first_t
    return first_t, first_h, first_w, size_t, size_h, size_w


@triton.jit
def held_box(block, box, window, RANK: tl.constexpr):
    """`block_box` of one of the blocks of `box`; with a window, the part that may be inside it.

    A window is (number of blocks along the first axis, the first of them that `box` counts, first
    token, token past the last): `box` covers only some of the blocks, and their boxes are clipped
    to the planes that hold tokens of the window. It needs three axes.
    """
    T, H, W, LT, LH, LW = box
    first_t, first_h, first_w, size_t, size_h, size_w = block_box(block, T, H, W, LT, LH, LW, RANK)
    if window is not None:
        num_blocks, first_block, first, last = window
        block_t = first_block + block // (LH * LW)
        first_t = tl.maximum(_axis_start(block_t, T, num_blocks), first // (H * W))
        last_t = tl.minimum(_axis_start(block_t + 1, T, num_blocks), tl.cdiv(last, H * W))
        size_t = tl.maximum(last_t - first_t, 0)
    return first_t, first_h, first_w, size_t, size_h, size_w


@triton.jit
def in_window(tokens, valid, window):
    """Tokens counted from the first one of the window, and which of the valid ones are in it."""
    if window is not None:
        valid = valid & (tokens >= window[2]) & (tokens < window[3])
        tokens -= window[2]
    return tokens, valid


@triton.jit
def box_tokens(slots, first_t, first_h, first_w, size_h, size_w, H, W, RANK: tl.constexpr):
    """Raster-order tokens (int64) of `slots`, which enumerate a box in raster order."""
    if RANK == 1:
        return (first_w + slots).to(tl.int64)
    else:
        row, w = divide(slots, size_w)
        if RANK == 2:
            return ((first_h + row) * W + first_w + w).to(tl.int64)
        else:
            t, h = divide(row, size_h)
            return (((first_t + t) * H + first_h + h) * W + first_w + w).to(tl.int64)


@triton.jit
def locate_part(box, num_heads, num_parts, RANK: tl.constexpr, GROUP: tl.constexpr):
    """The work of a program: batch element, head, index of its part, block.

    `GROUP` heads are adjacent in the launch grid, to share rotary tables and memory pages.
    """
    num_rows = box[3] * box[4] * box[5] * num_parts
    group = tl.program_id(0) // (GROUP * num_rows)
    inside = tl.program_id(0) % (GROUP * num_rows)
    groups = num_heads // GROUP
    batch = (group // groups).to(tl.int64)
    head = group % groups * GROUP + inside % GROUP
    row = inside // GROUP
    return batch, head, row, row // num_parts


@triton.jit
def part_slots(row, num_parts, count, BT: tl.constexpr):
    """Slots [first, last) of part `row` of a block with `count` slots; parts are whole tiles."""
    span = tl.cdiv(tl.cdiv(count, num_parts), BT) * BT
    first = tl.minimum(row % num_parts * span, count)
    return first, tl.minimum(first + span, count)


@triton.jit
def block_of_tokens(tokens, box, RANK: tl.constexpr):
    """Block of each raster-order token (int32), the inverse of `box_tokens`; below 2**21 tokens."""
    T, H, W, LT, LH, LW = box
    row, w = divide(tokens, W)
    block, _rest = divide((w + 1) * LW - 1, W)
    if RANK > 1:
        t, h = divide(row, H)
        block_h, _rest = divide((h + 1) * LH - 1, H)
        block += block_h * LW
        if RANK > 2:
            block_t, _rest = divide((t + 1) * LT - 1, T)
            block += block_t * (LH * LW)
    return block


@triton.jit
def tile_box(tile, box, RANK: tl.constexpr):
    """As `block_box`; `box` ends with the size along each axis if all tiles have the same."""
    if len(box) == 9:
        return _even_box(tile, box[4], box[5], box[6], box[7], box[8], RANK)
    else:
        return block_box(tile, box[0], box[1], box[2], box[3], box[4], box[5], RANK)


@triton.jit
def _even_box(index, LH, LW, size_t, size_h, size_w, RANK: tl.constexpr):
    # Uneven boxes take a dozen divisions, more instructions than some programs have otherwise.
    first_t, first_h = 0, 0
    if RANK > 1:
        first_h = index // LW * size_h
        if RANK > 2:
            first_t, first_h = index // LW // LH * size_t, index // LW % LH * size_h
    return first_t, first_h, index % LW * size_w, size_t, size_h, size_w


@triton.jit
def group_box(group, box, groups, RANK: tl.constexpr):
    """The box of tokens of a group of tiles: `groups` of them along each axis, see `block_box`.

    Groups divide the tiles of an axis as tiles divide its tokens. `groups` ends with the size along
    each axis if all groups have the same.
    """
    if len(groups) == 6:
        return _even_box(group, groups[1], groups[2], groups[3], groups[4], groups[5], RANK)
    else:
        return _uneven_group_box(group, box, groups, RANK)


@triton.jit
def _uneven_group_box(group, box, groups, RANK: tl.constexpr):
    T, H, W, LT, LH, LW = box[0], box[1], box[2], box[3], box[4], box[5]
    GT, GH, GW = groups
    first_w, size_w = _group_span(group % GW, W, LW, GW)
    first_t, first_h, size_t, size_h = 0, 0, 1, 1
    if RANK > 1:
        row = group // GW
        first_h, size_h = _group_span(row % GH, H, LH, GH)
        if RANK > 2:
            first_t, size_t = _group_span(row // GH, T, LT, GT)
    return first_t, first_h, first_w, size_t, size_h, size_w


@triton.jit
def _group_span(group, length, num_blocks, num_groups):
    first = _axis_start(_axis_start(group, num_blocks, num_groups), length, num_blocks)
    last = _axis_start(_axis_start(group + 1, num_blocks, num_groups), length, num_blocks)
    return first, last - first
