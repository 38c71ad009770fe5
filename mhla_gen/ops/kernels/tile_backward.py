"""Tile attention, backward: gradients of queries by group, of keys and values by tile.

With p = exp(scale · q kᵀ − lse), δ = do·o − dlse and ds = p (do vᵀ − δ):

    dq = scale · ds k        dk = scale · dsᵀ q        dv = pᵀ do

Queries and output gradients come in packs of groups, whose empty slots hold lse = ∞, so p = 0. The
groups that read a tile are its owners, in ascending order (`tile_owners.py`).
"""

import triton
import triton.language as tl

from mhla_gen.ops.kernels.attention import add_times, outer
from mhla_gen.ops.kernels.boxes import box_tokens, tile_box
from mhla_gen.ops.kernels.linear import rotate_pieces
from mhla_gen.ops.kernels.pieces import head_offset, load_pieces, store_pieces
from mhla_gen.ops.kernels.tile_attention import (
    listed_tokens,
    load_extra,
    load_rows,
    load_tokens,
    locate_group,
    slot_places,
)

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def prepare_kernel(
    grad_ptr,
    out_ptr,
    lse_ptr,
    grad_lse_ptr,
    packed_grad_ptr,
    packed_lse_ptr,
    delta_ptr,
    grad_strides,
    out_strides,
    box,
    groups,
    seq_len,
    num_heads,
    num_groups,
    blocks,
    V: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    BM: tl.constexpr,
    RANK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Pack do, lse in units of log 2, and δ, of BM slots of one group and head."""
    batch, head, group, slots, tokens, valid = locate_group(
        box, groups, num_heads, num_groups, blocks, BM, RANK
    )
    grad_ptr += head_offset(grad_strides, batch, head, ALIGN)
    out_ptr += head_offset(out_strides, batch, head, ALIGN)
    do0, do1 = load_pieces(grad_ptr, tokens, valid, grad_strides, V, V0, V1, ALIGN)
    o0, o1 = load_pieces(out_ptr, tokens, valid, out_strides, V, V0, V1, ALIGN)
    delta = tl.sum(do0.to(tl.float32) * o0.to(tl.float32), axis=1)
    if V1 > 0:
        delta += tl.sum(do1.to(tl.float32) * o1.to(tl.float32), axis=1)
    row = batch * num_heads + head
    lse = tl.load(lse_ptr + row * seq_len + tokens, mask=valid, other=float("inf"))
    if grad_lse_ptr is not None:
        delta -= tl.load(grad_lse_ptr + row * seq_len + tokens, mask=valid, other=0.0)
    rows = (row * num_groups + group) * (blocks * BM) + slots
    tl.store(packed_lse_ptr + rows, lse * _LOG2E)
    tl.store(delta_ptr + rows, delta)
    store_pieces(
        packed_grad_ptr, do0, do1, rows, slots >= 0, (0, V, 0, 1), V, V0, V1,
        16 if V % 16 == 0 else 1,
    )  # fmt: skip


@triton.jit
def score_gradients(
    a0, a1, b0, b1, c0, c1, d0, d1, lse, delta, scale, D1: tl.constexpr, V1: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Weights p, and ds, of rows a, c against columns b, d; `lse`, `delta` are of queries."""
    weights = tl.exp2(outer(a0, a1, b0, b1, D1, PRECISION) * scale - lse)
    return weights, weights * (outer(c0, c1, d0, d1, V1, PRECISION) - delta)


@triton.jit
def tile_backward_queries_kernel(
    q_ptr,
    grad_ptr,
    packed_lse_ptr,
    delta_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    lists_ptr,
    extra_k_ptr,
    extra_v_ptr,
    extra_mask_ptr,
    dq_ptr,
    k_strides,
    v_strides,
    dq_strides,
    extra_k_strides,
    extra_v_strides,
    box,
    groups,
    num_heads,
    num_groups,
    num_tiles,
    list_size,
    extra_len,
    blocks,
    scale,
    factor,
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
    ROTARY: tl.constexpr,
    PACKED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient dq of BM slots of one group and head, rotated back."""
    batch, head, group, slots, tokens, q_valid = locate_group(
        box, groups, num_heads, num_groups, blocks, BM, RANK
    )
    row = batch * num_heads + head
    entries_ptr = lists_ptr + (row * num_groups + group) * (2 * list_size) + list_size
    if not PACKED:
        k_ptr += head_offset(k_strides, batch, head, ALIGN)
        v_ptr += head_offset(v_strides, batch, head, ALIGN)
    packed = row * num_groups * (blocks * BM)
    rows = group * (blocks * BM) + slots
    q0, q1 = load_rows(q_ptr + packed * D, rows, D, D0, D1, WIDE)
    do0, do1 = load_rows(grad_ptr + packed * V, rows, V, V0, V1, WIDE)
    lse = tl.load(packed_lse_ptr + packed + rows)[:, None]
    delta = tl.load(delta_ptr + packed + rows)[:, None]
    dq0 = tl.zeros((BM, D0), tl.float32)
    dq1 = tl.zeros((BM, D1 if D1 > 0 else 1), tl.float32)
    if PACKED:
        first = (row * num_tiles * SLOTS).to(tl.int32)
        parts: tl.constexpr = SLOTS // BN
        steps = list_size * parts
        tile = tl.load(entries_ptr - list_size)
        for step in range(0, steps):
            start = step % parts * BN
            k0 = k_ptr.load([first + tile * SLOTS + start, 0])
            v0 = v_ptr.load([first + tile * SLOTS + start, 0])
            tile = tl.load(entries_ptr - list_size + tl.minimum(step + 1, steps - 1) // parts)
            # Keys without a token are zero, and so add nothing if their weights are finite. No
            # weight is larger than one.
            scores = outer(q0, q0, k0, k0, 0, PRECISION) * scale - lse
            weights = tl.exp2(tl.minimum(scores, 0.0))
            ds = weights * (outer(do0, do0, v0, v0, 0, PRECISION) - delta)
            dq0, dq1 = add_times(ds.to(OPERAND), k0, k0, dq0, dq1, 0, PRECISION)
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
            _p, ds = score_gradients(
                q0, q1, k0, k1, do0, do1, v0, v1, lse, delta, scale, D1, V1, PRECISION
            )
            if RAGGED or TAIL:
                ds = tl.where(valid[None, :], ds, 0.0)
            dq0, dq1 = add_times(ds.to(OPERAND), k0, k1, dq0, dq1, D1, PRECISION)
    if extra_mask_ptr is not None:
        extra_k_ptr += head_offset(extra_k_strides, batch, head, ALIGN)
        extra_v_ptr += head_offset(extra_v_strides, batch, head, ALIGN)
        extra_mask_ptr += batch * extra_len
        for start in range(0, extra_len, BN):
            k0, k1, v0, v1, valid = load_extra(
                extra_k_ptr, extra_v_ptr, extra_mask_ptr, start + tl.arange(0, BN), extra_len,
                extra_k_strides, extra_v_strides, D, V, D0, D1, V0, V1, ALIGN,
            )  # fmt: skip
            _p, ds = score_gradients(
                q0, q1, k0, k1, do0, do1, v0, v1, lse, delta, scale, D1, V1, PRECISION
            )
            ds = tl.where(valid[None, :], ds, 0.0)
            dq0, dq1 = add_times(ds.to(OPERAND), k0, k1, dq0, dq1, D1, PRECISION)
    dq0, dq1 = dq0 * factor, dq1 * factor
    if ROTARY:
        dq0, dq1 = rotate_pieces(dq0, dq1, cos_ptr, sin_ptr, tokens, q_valid, D, D0, D1, -1)
    dq_ptr += head_offset(dq_strides, batch, head, ALIGN)
    store_pieces(dq_ptr, dq0, dq1, tokens, q_valid, dq_strides, D, D0, D1, ALIGN)


@triton.jit
def add_key_gradients(
    k0, k1, v0, v1, q_ptr, grad_ptr, packed_lse_ptr, delta_ptr, rows, valid, scale, dk0, dk1, dv0,
    dv1, D: tl.constexpr, V: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr,
    V1: tl.constexpr, WIDE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sums dk and dv with what packed queries `rows` add to them, those that are `valid`."""
    q0, q1 = load_rows(q_ptr, rows, D, D0, D1, WIDE)
    do0, do1 = load_rows(grad_ptr, rows, V, V0, V1, WIDE)
    lse = tl.where(valid, tl.load(packed_lse_ptr + rows), float("inf"))[None, :]
    delta = tl.load(delta_ptr + rows)[None, :]
    p, ds = score_gradients(k0, k1, q0, q1, v0, v1, do0, do1, lse, delta, scale, D1, V1, PRECISION)
    dv0, dv1 = add_times(p.to(OPERAND), do0, do1, dv0, dv1, V1, PRECISION)
    dk0, dk1 = add_times(ds.to(OPERAND), q0, q1, dk0, dk1, D1, PRECISION)
    return dk0, dk1, dv0, dv1


@triton.jit
def tile_backward_keys_kernel(
    q_ptr,
    grad_ptr,
    packed_lse_ptr,
    delta_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    owners_ptr,
    counts_ptr,
    dk_ptr,
    dv_ptr,
    k_strides,
    v_strides,
    dk_strides,
    dv_strides,
    box,
    num_heads,
    num_tiles,
    num_groups,
    blocks,
    scale,
    factor,
    D: tl.constexpr,
    V: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PACK: tl.constexpr,
    WIDE: tl.constexpr,
    RANK: tl.constexpr,
    ALIGN: tl.constexpr,
    ROTARY: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients dk, rotated back, and dv of BN slots of one tile and head.

    A step handles BM queries: a part of one group of PACK slots, or several small groups.
    """
    block = tl.program_id(0) % blocks
    tile = tl.program_id(0) // blocks % num_tiles
    head = tl.program_id(0) // blocks // num_tiles % num_heads
    batch = (tl.program_id(0) // blocks // num_tiles // num_heads).to(tl.int64)
    row = batch * num_heads + head
    slots = block * BN + tl.arange(0, BN)
    first_t, first_h, first_w, size_t, size_h, size_w = tile_box(tile, box, RANK)
    valid = slots < size_t * size_h * size_w
    tokens = box_tokens(slots, first_t, first_h, first_w, size_h, size_w, box[1], box[2], RANK)
    k_ptr += head_offset(k_strides, batch, head, ALIGN)
    v_ptr += head_offset(v_strides, batch, head, ALIGN)
    k0, k1 = load_pieces(k_ptr, tokens, valid, k_strides, D, D0, D1, ALIGN)
    v0, v1 = load_pieces(v_ptr, tokens, valid, v_strides, V, V0, V1, ALIGN)
    packed = row * num_groups * PACK
    dk0 = tl.zeros((BN, D0), tl.float32)
    dk1 = tl.zeros((BN, D1 if D1 > 0 else 1), tl.float32)
    dv0 = tl.zeros((BN, V0), tl.float32)
    dv1 = tl.zeros((BN, V1 if V1 > 0 else 1), tl.float32)
    owners_ptr += (row * num_tiles + tile) * num_groups
    count = tl.load(counts_ptr + row * num_tiles + tile)
    num_queries = count * PACK
    inside = tl.arange(0, BM) % PACK
    for start in range(0, num_queries, BM):
        # Vectors, also of equal numbers, Triton loads ahead; for a scalar it would wait.
        if PACK % BM == 0:
            owners = tl.load(owners_ptr + start // PACK + tl.zeros((BM,), tl.int32))
            rows = owners * PACK + start % PACK + inside
        else:
            places = start // PACK + tl.arange(0, BM) // PACK
            rows = tl.load(owners_ptr + tl.minimum(places, count - 1)) * PACK + inside
        exists = start + tl.arange(0, BM) < num_queries
        dk0, dk1, dv0, dv1 = add_key_gradients(
            k0, k1, v0, v1, q_ptr + packed * D, grad_ptr + packed * V, packed_lse_ptr + packed,
            delta_ptr + packed, rows, exists, scale, dk0, dk1, dv0, dv1,
            D, V, D0, D1, V0, V1, WIDE, OPERAND, PRECISION,
        )  # fmt: skip
    dk0, dk1 = dk0 * factor, dk1 * factor
    if ROTARY:
        dk0, dk1 = rotate_pieces(dk0, dk1, cos_ptr, sin_ptr, tokens, valid, D, D0, D1, -1)
    dk_ptr += head_offset(dk_strides, batch, head, ALIGN)
    dv_ptr += head_offset(dv_strides, batch, head, ALIGN)
    store_pieces(dk_ptr, dk0, dk1, tokens, valid, dk_strides, D, D0, D1, ALIGN)
    store_pieces(dv_ptr, dv0, dv1, tokens, valid, dv_strides, V, V0, V1, ALIGN)


@triton.jit
def tile_backward_extra_kernel(
    q_ptr,
    grad_ptr,
    packed_lse_ptr,
    delta_ptr,
    extra_k_ptr,
    extra_v_ptr,
    extra_mask_ptr,
    dk_ptr,
    dv_ptr,
    extra_k_strides,
    extra_v_strides,
    num_heads,
    batch_size,
    extra_len,
    extra_blocks,
    num_blocks,
    part_blocks,
    scale,
    factor,
    D: tl.constexpr,
    V: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGN: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What one part of all packed queries adds to dk and dv of BN keys off the grid."""
    block = tl.program_id(0) % extra_blocks
    head = tl.program_id(0) // extra_blocks % num_heads
    batch = (tl.program_id(0) // extra_blocks // num_heads % batch_size).to(tl.int64)
    part = tl.program_id(0) // extra_blocks // num_heads // batch_size
    row = batch * num_heads + head
    keys = block * BN + tl.arange(0, BN)
    k0, k1, v0, v1, valid = load_extra(
        extra_k_ptr + head_offset(extra_k_strides, batch, head, ALIGN),
        extra_v_ptr + head_offset(extra_v_strides, batch, head, ALIGN),
        extra_mask_ptr + batch * extra_len,
        keys, extra_len, extra_k_strides, extra_v_strides, D, V, D0, D1, V0, V1, ALIGN,
    )  # fmt: skip
    packed = row * num_blocks * BM
    dk0 = tl.zeros((BN, D0), tl.float32)
    dk1 = tl.zeros((BN, D1 if D1 > 0 else 1), tl.float32)
    dv0 = tl.zeros((BN, V0), tl.float32)
    dv1 = tl.zeros((BN, V1 if V1 > 0 else 1), tl.float32)
    last = tl.minimum((part + 1) * part_blocks, num_blocks)
    for step in range(part * part_blocks, last):
        rows = step * BM + tl.arange(0, BM)
        dk0, dk1, dv0, dv1 = add_key_gradients(
            k0, k1, v0, v1, q_ptr + packed * D, grad_ptr + packed * V, packed_lse_ptr + packed,
            delta_ptr + packed, rows, rows >= 0, scale, dk0, dk1, dv0, dv1,
            D, V, D0, D1, V0, V1, WIDE, OPERAND, PRECISION,
        )  # fmt: skip
    # Masked keys were read as zeros, whose weights may be anything.
    kept = valid[:, None]
    dk0, dk1 = tl.where(kept, dk0 * factor, 0.0), tl.where(kept, dk1 * factor, 0.0)
    dv0, dv1 = tl.where(kept, dv0, 0.0), tl.where(kept, dv1, 0.0)
    first = (part * batch_size + batch) * extra_len * num_heads + head
    rows = first + keys.to(tl.int64) * num_heads
    exists = keys < extra_len
    store_pieces(dk_ptr, dk0, dk1, rows, exists, (0, D, 0, 1), D, D0, D1, 1)
    store_pieces(dv_ptr, dv0, dv1, rows, exists, (0, V, 0, 1), V, V0, V1, 1)
