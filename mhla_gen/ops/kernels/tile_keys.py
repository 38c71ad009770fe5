"""Tile attention, backward: gradients of packed keys and values, by tensor descriptors.

See `tile_backward.py`. Queries and output gradients come packed by group, keys and values by tile;
whole packs are copied, so that a step needs one address instead of one for every 16 bytes.
"""

import triton
import triton.language as tl

from mhla_gen.ops.kernels.boxes import box_tokens, tile_box
from mhla_gen.ops.kernels.linear import rotate_pieces
from mhla_gen.ops.kernels.pieces import dot, head_offset, store_pieces
from mhla_gen.ops.kernels.tile_backward import score_gradients


@triton.jit
def tile_backward_packed_keys_kernel(
    q_tiles,
    grad_tiles,
    packed_lse_ptr,
    delta_ptr,
    k_tiles,
    v_tiles,
    cos_ptr,
    sin_ptr,
    owners_ptr,
    counts_ptr,
    dk_ptr,
    dv_ptr,
    dk_strides,
    dv_strides,
    box,
    num_heads,
    num_tiles,
    num_groups,
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
    SLOTS: tl.constexpr,
    RANK: tl.constexpr,
    ALIGN: tl.constexpr,
    ROTARY: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients dk, rotated back, and dv of BN slots of one tile and head."""
    blocks: tl.constexpr = SLOTS // BN
    block = tl.program_id(0) % blocks
    tile = tl.program_id(0) // blocks % num_tiles
    head = tl.program_id(0) // blocks // num_tiles % num_heads
    batch = (tl.program_id(0) // blocks // num_tiles // num_heads).to(tl.int64)
    row = batch * num_heads + head
    keys = ((row * num_tiles + tile) * SLOTS + block * BN).to(tl.int32)
    k = k_tiles.load([keys, 0])
    v = v_tiles.load([keys, 0])
    parts: tl.constexpr = PACK // BM
    first = (row * num_groups * PACK).to(tl.int32)
    owners_ptr += (row * num_tiles + tile) * num_groups
    steps = tl.load(counts_ptr + row * num_tiles + tile) * parts
    dk = tl.zeros((BN, D0), tl.float32)
    dv = tl.zeros((BN, V0), tl.float32)
    # The owner is loaded a step ahead, because a program waits for every scalar.
    owner = tl.load(owners_ptr)
    for step in range(0, steps):
        start = first + owner * PACK + step % parts * BM
        q = q_tiles.load([start, 0])
        do = grad_tiles.load([start, 0])
        rows = start + tl.arange(0, BM)
        lse = tl.load(packed_lse_ptr + rows)[None, :]
        delta = tl.load(delta_ptr + rows)[None, :]
        owner = tl.load(owners_ptr + tl.minimum(step + 1, steps - 1) // parts)
        p, ds = score_gradients(k, k, q, q, v, v, do, do, lse, delta, scale, 0, 0, PRECISION)
        dv = dot(p.to(OPERAND), do, dv, PRECISION)
        dk = dot(ds.to(OPERAND), q, dk, PRECISION)
    slots = block * BN + tl.arange(0, BN)
    first_t, first_h, first_w, size_t, size_h, size_w = tile_box(tile, box, RANK)
    valid = slots < size_t * size_h * size_w
    tokens = box_tokens(slots, first_t, first_h, first_w, size_h, size_w, box[1], box[2], RANK)
    dk = dk * factor
    if ROTARY:
        dk, _ = rotate_pieces(dk, dk, cos_ptr, sin_ptr, tokens, valid, D, D0, D1, -1)
    dk_ptr += head_offset(dk_strides, batch, head, ALIGN)
    dv_ptr += head_offset(dv_strides, batch, head, ALIGN)
    store_pieces(dk_ptr, dk, dk, tokens, valid, dk_strides, D, D0, D1, ALIGN)
    store_pieces(dv_ptr, dv, dv, tokens, valid, dv_strides, V, V0, V1, ALIGN)
