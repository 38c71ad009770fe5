"""Tile attention, forward: one program handles queries of one group and their list of tiles.

A block of `BN` keys is the next tiles of the list (`tile_lists.py`), read in place. Scores are in
units of log 2.
"""

import triton
import triton.language as tl

from mhla_gen.ops.kernels.attention import add_times, outer
from mhla_gen.ops.kernels.boxes import box_tokens, group_box
from mhla_gen.ops.kernels.pieces import head_offset, load_pieces, piece_offsets, store_pieces

_LN2 = tl.constexpr(0.6931471805599453)
# In a sum of weights below this, some weights or their products have vanished.
_VANISHED = tl.constexpr(2.0**-60)


@triton.jit
def locate_group(box, groups, num_heads, num_groups, blocks, BM: tl.constexpr, RANK: tl.constexpr):
    """What a program works on: batch, head, group, its rows' slots, tokens, and which exist."""
    block = tl.program_id(0) % blocks
    group = tl.program_id(0) // blocks % num_groups
    head = tl.program_id(0) // blocks // num_groups % num_heads
    batch = (tl.program_id(0) // blocks // num_groups // num_heads).to(tl.int64)
    slots = block * BM + tl.arange(0, BM)
    first_t, first_h, first_w, size_t, size_h, size_w = group_box(group, box, groups, RANK)
    valid = slots < size_t * size_h * size_w
    tokens = box_tokens(slots, first_t, first_h, first_w, size_h, size_w, box[1], box[2], RANK)
    return batch, head, group, slots, tokens, valid


@triton.jit
def load_tokens(
    x_ptr, tokens, strides, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    ALIGN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Both pieces of tokens that exist, of one head; `WIDE` if 32 bits do not number elements."""
    if WIDE:
        tokens = tokens.to(tl.int64)
    x0 = _load_piece(x_ptr, tokens, strides, D, 0, D0, ALIGN)
    x1 = x0
    if D1 > 0:
        x1 = _load_piece(x_ptr, tokens, strides, D, D0, D1, ALIGN)
    return x0, x1


@triton.jit
def load_rows(x_ptr, rows, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, WIDE: tl.constexpr):
    """Both pieces of consecutive rows of D channels."""
    return load_tokens(x_ptr, rows, (0, D, 0, 1), D, D0, D1, 16 if D % 16 == 0 else 1, WIDE)


@triton.jit
def _load_piece(
    x_ptr, tokens, strides, D: tl.constexpr, START: tl.constexpr, B: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    offsets = piece_offsets(tokens, strides, START, B, ALIGN)
    if START + B <= D:
        return tl.load(x_ptr + offsets)
    else:
        channels = START + tl.arange(0, B)
        return tl.load(x_ptr + offsets, mask=(channels < D)[None, :], other=0.0)


@triton.jit
def slot_places(slots, box, SLOT_T: tl.constexpr, SLOT_H: tl.constexpr, SLOT_W: tl.constexpr):
    """Tokens of slots, counted from their tile's first, and the bits of entries without them."""
    w, h, t = slots % SLOT_W, slots // SLOT_W % SLOT_H, slots // (SLOT_W * SLOT_H)
    bits = tl.where(w == SLOT_W - 1, 1, 0) + tl.where(h == SLOT_H - 1, 2, 0)
    bits += tl.where(t == SLOT_T - 1, 4, 0)
    # Every entry has bit 8.
    return (t * box[1] + h) * box[2] + w, tl.where(t >= SLOT_T, 8, bits)


@triton.jit
def listed_tokens(
    entries_ptr, start, offsets, bits, num_keys, box, SLOTS: tl.constexpr, SLOT_T: tl.constexpr,
    SLOT_H: tl.constexpr, SLOT_W: tl.constexpr, BN: tl.constexpr, RAGGED: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """Tokens of keys [start, start + BN) of a list, and which of them are there.

    `TAIL`: the last block of the list is not full.
    """
    keys = start + tl.arange(0, BN)
    if BN % SLOTS == 0:
        place = start // SLOTS + tl.arange(0, BN) // SLOTS
    else:
        place = keys // SLOTS
        offsets, bits = slot_places(keys % SLOTS, box, SLOT_T, SLOT_H, SLOT_W)
    if TAIL:
        # Not masked, since Triton loads only what needs no mask or zeros ahead of its use.
        place = tl.minimum(place, num_keys // SLOTS - 1)
    entries = tl.load(entries_ptr + place)
    valid = keys < num_keys
    if RAGGED:
        exists = (entries & bits) == 0
        # Any token stands in for a missing one, such as the tile's first.
        offsets, valid = tl.where(exists, offsets, 0), valid & exists
    return (entries >> 4) + offsets, valid


@triton.jit
def tile_size(entry, SLOT_T: tl.constexpr, SLOT_H: tl.constexpr, SLOT_W: tl.constexpr):
    """Tokens of the tile that an entry names."""
    return (SLOT_T - entry // 4 % 2) * (SLOT_H - entry // 2 % 2) * (SLOT_W - entry % 2)


@triton.jit
def attend_to_tiles(
    q0, k_tiles, v_tiles, entries_ptr, first, list_size, peak, total, out0, out1, scale,
    BN: tl.constexpr, SLOTS: tl.constexpr, SLOT_T: tl.constexpr, SLOT_H: tl.constexpr,
    SLOT_W: tl.constexpr, RAGGED: tl.constexpr, BOUNDED: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to all packed tiles of a list by tensor descriptors; a head begins at row `first`."""
    parts: tl.constexpr = SLOTS // BN
    steps = list_size * parts
    # Tile and entry are loaded a step ahead, because a program waits for every scalar.
    tile, entry = tl.load(entries_ptr - list_size), tl.load(entries_ptr)
    for step in range(0, steps):
        start = step % parts * BN
        k0 = k_tiles.load([first + tile * SLOTS + start, 0])
        v0 = v_tiles.load([first + tile * SLOTS + start, 0])
        valid = start + tl.arange(0, BN) < tile_size(entry, SLOT_T, SLOT_H, SLOT_W)
        place = tl.minimum(step + 1, steps - 1) // parts
        tile, entry = tl.load(entries_ptr - list_size + place), tl.load(entries_ptr + place)
        peak, total, out0, out1 = attend(
            q0, q0, k0, k0, v0, v0, valid, peak, total, out0, out1, scale,
            0, 0, RAGGED, BOUNDED, OPERAND, PRECISION,
        )  # fmt: skip
    return peak, total, out0, out1


@triton.jit
def attend(
    q0, q1, k0, k1, v0, v1, valid, peak, total, out0, out1, scale, D1: tl.constexpr,
    V1: tl.constexpr, MASKED: tl.constexpr, BOUNDED: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys more in Σ exp and Σ exp · v of every query.

    `peak` is no smaller than any score if `BOUNDED`, else the largest score so far.
    """
    scores = outer(q0, q1, k0, k1, D1, PRECISION)
    if MASKED:
        scores = tl.where(valid[None, :], scores, float("-inf"))
    shift = peak
    if not BOUNDED:
        peak = tl.maximum(peak, tl.max(scores, axis=1) * scale)
        # A query without any key so far has a peak of -∞.
        decay = tl.where(peak > float("-inf"), tl.exp2(shift - peak), 0.0)
        shift = tl.where(peak > float("-inf"), peak, 0.0)
        total = total * decay
        out0 = out0 * decay[:, None]
        if V1 > 0:
            out1 = out1 * decay[:, None]
    weights = tl.exp2(scores * scale - shift[:, None])
    total += tl.sum(weights, axis=1)
    out0, out1 = add_times(weights.to(OPERAND), v0, v1, out0, out1, V1, PRECISION)
    return peak, total, out0, out1


@triton.jit
def attend_to_list(
    q0, q1, k_ptr, v_ptr, entries_ptr, extra_k_ptr, extra_v_ptr, extra_mask_ptr, k_strides,
    v_strides, extra_k_strides, extra_v_strides, box, peak, first, list_size, extra_len, scale,
    D: tl.constexpr, V: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr,
    V1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SLOTS: tl.constexpr,
    SLOT_T: tl.constexpr, SLOT_H: tl.constexpr, SLOT_W: tl.constexpr, RAGGED: tl.constexpr,
    TAIL: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr, BOUNDED: tl.constexpr,
    PACKED: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All keys of one list and head, then those off the grid; see `attend`."""
    total = tl.zeros((BM,), tl.float32)
    out0 = tl.zeros((BM, V0), tl.float32)
    out1 = tl.zeros((BM, V1 if V1 > 0 else 1), tl.float32)
    if PACKED:
        peak, total, out0, out1 = attend_to_tiles(
            q0, k_ptr, v_ptr, entries_ptr, first, list_size, peak, total, out0, out1, scale,
            BN, SLOTS, SLOT_T, SLOT_H, SLOT_W, RAGGED, BOUNDED, OPERAND, PRECISION,
        )  # fmt: skip
    else:
        num_keys = list_size * SLOTS
        offsets, bits = slot_places(tl.arange(0, BN) % SLOTS, box, SLOT_T, SLOT_H, SLOT_W)
        for start in range(0, num_keys, BN):
            keys, valid = listed_tokens(
                entries_ptr, start, offsets, bits, num_keys, box,
                SLOTS, SLOT_T, SLOT_H, SLOT_W, BN, RAGGED, TAIL,
            )  # fmt: skip
            k0, k1 = load_tokens(k_ptr, keys, k_strides, D, D0, D1, ALIGN, WIDE)
            v0, v1 = load_tokens(v_ptr, keys, v_strides, V, V0, V1, ALIGN, WIDE)
            peak, total, out0, out1 = attend(
                q0, q1, k0, k1, v0, v1, valid, peak, total, out0, out1, scale,
                D1, V1, RAGGED or TAIL, BOUNDED, OPERAND, PRECISION,
            )  # fmt: skip
    if extra_mask_ptr is not None:
        for start in range(0, extra_len, BN):
            k0, k1, v0, v1, valid = load_extra(
                extra_k_ptr, extra_v_ptr, extra_mask_ptr, start + tl.arange(0, BN), extra_len,
                extra_k_strides, extra_v_strides, D, V, D0, D1, V0, V1, ALIGN,
            )  # fmt: skip
            peak, total, out0, out1 = attend(
                q0, q1, k0, k1, v0, v1, valid, peak, total, out0, out1, scale,
                D1, V1, True, BOUNDED, OPERAND, PRECISION,
            )  # fmt: skip
    return peak, total, out0, out1


@triton.jit
def squared_norms(x0, x1, SECOND: tl.constexpr):
    """Squared length of every row, in pieces."""
    x0 = x0.to(tl.float32)
    norms = tl.sum(x0 * x0, axis=1)
    if SECOND > 0:
        x1 = x1.to(tl.float32)
        norms += tl.sum(x1 * x1, axis=1)
    return norms


@triton.jit
def tile_attend_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    lists_ptr,
    longest_ptr,
    lengths_ptr,
    flags_ptr,
    extra_k_ptr,
    extra_v_ptr,
    extra_mask_ptr,
    out_ptr,
    lse_ptr,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    extra_k_strides,
    extra_v_strides,
    box,
    groups,
    seq_len,
    num_heads,
    num_groups,
    num_tiles,
    list_size,
    extra_len,
    blocks,
    scale,
    D: tl.constexpr,
    V: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SLOTS: tl.constexpr,
    SLOT_T: tl.constexpr,
    SLOT_H: tl.constexpr,
    SLOT_W: tl.constexpr,
    RAGGED: tl.constexpr,
    TAIL: tl.constexpr,
    WIDE: tl.constexpr,
    RANK: tl.constexpr,
    ALIGN: tl.constexpr,
    BOUNDED: tl.constexpr,
    PACKED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Output and log-sum-exp of up to BM queries of one group and head.

    Queries and keys are rotated beforehand: matrix products with operands in registers would run
    one after the other, each waiting for the previous one. If `PACKED`, queries, keys and values
    are descriptors of packed groups and tiles.

    If `BOUNDED`, the softmax subtracts the product of norms, which no score exceeds, instead of the
    largest score. If this is so loose that weights vanish, the program sets its flag. Without a
    bound, and with flags, only programs whose flag is set run.
    """
    if flags_ptr is not None and not BOUNDED:  # noqa: SIM102 - known when compiled, then when run
        if tl.load(flags_ptr + tl.program_id(0)) == 0:
            return
    batch, head, group, _slots, tokens, q_valid = locate_group(
        box, groups, num_heads, num_groups, blocks, BM, RANK
    )
    row = batch * num_heads + head
    entries_ptr = lists_ptr + (row * num_groups + group) * (2 * list_size) + list_size
    out_ptr += head_offset(out_strides, batch, head, ALIGN)
    if PACKED:
        # Programs are in the order of packed blocks.
        packed = tl.program_id(0) * BM
        q0 = q_ptr.load([packed, 0])
        q1 = q0
    else:
        q_ptr += head_offset(q_strides, batch, head, ALIGN)
        k_ptr += head_offset(k_strides, batch, head, ALIGN)
        v_ptr += head_offset(v_strides, batch, head, ALIGN)
        q0, q1 = load_pieces(q_ptr, tokens, q_valid, q_strides, D, D0, D1, ALIGN)
    if extra_mask_ptr is not None:
        extra_k_ptr += head_offset(extra_k_strides, batch, head, ALIGN)
        extra_v_ptr += head_offset(extra_v_strides, batch, head, ALIGN)
        extra_mask_ptr += batch * extra_len
    peak = tl.full((BM,), float("-inf"), tl.float32)
    if BOUNDED:
        if PACKED:
            lengths = tl.load(lengths_ptr + packed + tl.arange(0, BM))
        else:
            lengths = squared_norms(q0, q1, D1)
        peak = tl.sqrt(lengths * tl.load(longest_ptr + row)) * scale
    peak, total, out0, out1 = attend_to_list(
        q0, q1, k_ptr, v_ptr, entries_ptr, extra_k_ptr, extra_v_ptr, extra_mask_ptr,
        k_strides, v_strides, extra_k_strides, extra_v_strides, box, peak,
        (row * num_tiles * SLOTS).to(tl.int32), list_size, extra_len, scale, D, V, D0, D1, V0, V1,
        BM, BN, SLOTS, SLOT_T, SLOT_H, SLOT_W, RAGGED, TAIL, WIDE, ALIGN, BOUNDED, PACKED, OPERAND,
        PRECISION,
    )  # fmt: skip
    if BOUNDED:
        vanished = tl.min(tl.where(q_valid, total, 1.0)) < _VANISHED
        tl.store(flags_ptr + tl.program_id(0), vanished.to(tl.int32))
    inverse = 1 / total
    out0, out1 = out0 * inverse[:, None], out1 * inverse[:, None]
    store_pieces(out_ptr, out0, out1, tokens, q_valid, out_strides, V, V0, V1, ALIGN)
    tl.store(lse_ptr + row * seq_len + tokens, (peak + tl.log2(total)) * _LN2, mask=q_valid)


@triton.jit
def load_extra(
    k_ptr, v_ptr, mask_ptr, keys, extra_len, k_strides, v_strides, D: tl.constexpr,
    V: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Pieces of keys and values off the grid, and which of them are valid."""
    valid = tl.load(mask_ptr + keys, mask=keys < extra_len, other=0) != 0
    tokens = keys.to(tl.int64)
    k0, k1 = load_pieces(k_ptr, tokens, valid, k_strides, D, D0, D1, ALIGN)
    v0, v1 = load_pieces(v_ptr, tokens, valid, v_strides, V, V0, V1, ALIGN)
    return k0, k1, v0, v1, valid
