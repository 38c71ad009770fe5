"""Tile attention, backward: gradients of keys and values of several small tiles in one program.

The tiles are those of a patch (`tile_owners.py`), in slabs of at least 16 keys, which matrix
products need. The program reads the queries of each owner once for all slabs, and multiplies only
those slabs that the owner reads. Sums are transposed, `[dim, keys]`: products need many rows.
"""

import triton
import triton.language as tl

from mhla_gen.ops.kernels.linear import rotate_pieces
from mhla_gen.ops.kernels.pieces import dot, head_offset, load_pieces, store_pieces
from mhla_gen.ops.kernels.tile_attention import load_rows
from mhla_gen.ops.kernels.tile_backward import score_gradients
from mhla_gen.ops.kernels.tile_owners import patch_slots


@triton.jit
def add_slab_gradients(
    k0, k1, v0, v1, q0, q1, do0, do1, lse, delta, scale, dk0, dk1, dv0, dv1, D1: tl.constexpr,
    V1: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The transposed sums dk and dv of one slab with what some queries add to them."""
    p, ds = score_gradients(q0, q1, k0, k1, do0, do1, v0, v1, lse, delta, scale, D1, V1, PRECISION)
    p, ds = p.to(OPERAND), ds.to(OPERAND)
    dv0 = dot(tl.trans(do0), p, dv0, PRECISION)
    dk0 = dot(tl.trans(q0), ds, dk0, PRECISION)
    if V1 > 0:
        dv1 = dot(tl.trans(do1), p, dv1, PRECISION)
    if D1 > 0:
        dk1 = dot(tl.trans(q1), ds, dk1, PRECISION)
    return dk0, dk1, dv0, dv1


@triton.jit
def tile_backward_patches_kernel(
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
    patches,
    num_heads,
    num_patches,
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
    SLAB: tl.constexpr,
    SLABS: tl.constexpr,
    PACK: tl.constexpr,
    SLOTS: tl.constexpr,
    SIZE_T: tl.constexpr,
    SIZE_H: tl.constexpr,
    SIZE_W: tl.constexpr,
    RANK: tl.constexpr,
    ALIGN: tl.constexpr,
    ROTARY: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients dk, rotated back, and dv of `SLABS` slabs of `SLAB` slots: a patch of one head.

    A step handles BM queries: a part of one group of PACK slots, or several small groups.
    """
    patch = tl.program_id(0) % num_patches
    head = tl.program_id(0) // num_patches % num_heads
    batch = (tl.program_id(0) // num_patches // num_heads).to(tl.int64)
    row = batch * num_heads + head
    k_ptr += head_offset(k_strides, batch, head, ALIGN)
    v_ptr += head_offset(v_strides, batch, head, ALIGN)
    keys, values, dkeys, dvalues = (), (), (), ()
    for slab in tl.static_range(SLABS):
        _member, tokens, valid = patch_slots(
            patch, slab * SLAB + tl.arange(0, SLAB), box, patches, SLOTS,
            SIZE_T, SIZE_H, SIZE_W, RANK,
        )  # fmt: skip
        keys += (load_pieces(k_ptr, tokens, valid, k_strides, D, D0, D1, ALIGN),)
        values += (load_pieces(v_ptr, tokens, valid, v_strides, V, V0, V1, ALIGN),)
        dkeys += (_zeros(SLAB, D0, D1),)
        dvalues += (_zeros(SLAB, V0, V1),)
    TILES: tl.constexpr = SLAB // SLOTS
    packed = row * num_groups * PACK
    owners_ptr += (row * num_patches + patch) * num_groups
    num_queries = tl.load(counts_ptr + row * num_patches + patch) * PACK
    # Triton loads ahead here only if told to, as all products are in branches.
    for start in tl.range(0, num_queries, BM, num_stages=STAGES):
        queries = start + tl.arange(0, BM)
        if PACK % BM == 0:
            exists = tl.full((BM,), True, tl.int1)
            reads = tl.load(owners_ptr + start // PACK)
            owners = tl.load(owners_ptr + start // PACK + tl.zeros((BM,), tl.int32))
        else:
            exists = queries < num_queries
            reads = 0
            for i in tl.static_range(BM // PACK):
                place = start // PACK + i
                reads |= tl.load(owners_ptr + place, mask=place * PACK < num_queries, other=0)
            owners = tl.load(owners_ptr + queries // PACK, mask=exists, other=0)
        rows = (owners >> 16) * PACK + queries % PACK
        q0, q1 = load_rows(q_ptr + packed * D, rows, D, D0, D1)
        do0, do1 = load_rows(grad_ptr + packed * V, rows, V, V0, V1)
        lse = tl.load(packed_lse_ptr + packed + rows)[:, None]
        delta = tl.load(delta_ptr + packed + rows)[:, None]
        sums, value_sums = (), ()
        for slab in tl.static_range(SLABS):
            dk0, dk1 = dkeys[slab]
            dv0, dv1 = dvalues[slab]
            if (reads >> slab * TILES) & (2**TILES - 1) != 0:
                shift = lse
                if TILES > 1 or PACK % BM != 0:
                    member = slab * TILES + tl.arange(0, SLAB) // SLOTS
                    kept = ((owners[:, None] >> member[None, :]) & 1) != 0
                    shift = tl.where(kept, lse, float("inf"))
                dk0, dk1, dv0, dv1 = add_slab_gradients(
                    keys[slab][0], keys[slab][1], values[slab][0], values[slab][1],
                    q0, q1, do0, do1, shift, delta, scale, dk0, dk1, dv0, dv1,
                    D1, V1, OPERAND, PRECISION,
                )  # fmt: skip
            sums += ((dk0, dk1),)
            value_sums += ((dv0, dv1),)
        dkeys, dvalues = sums, value_sums
    dk_ptr += head_offset(dk_strides, batch, head, ALIGN)
    dv_ptr += head_offset(dv_strides, batch, head, ALIGN)
    for slab in tl.static_range(SLABS):
        _member, tokens, valid = patch_slots(
            patch, slab * SLAB + tl.arange(0, SLAB), box, patches, SLOTS,
            SIZE_T, SIZE_H, SIZE_W, RANK,
        )  # fmt: skip
        dk0, dk1 = tl.trans(dkeys[slab][0]) * factor, tl.trans(dkeys[slab][1]) * factor
        if ROTARY:
            dk0, dk1 = rotate_pieces(dk0, dk1, cos_ptr, sin_ptr, tokens, valid, D, D0, D1, -1)
        dv0, dv1 = tl.trans(dvalues[slab][0]), tl.trans(dvalues[slab][1])
        store_pieces(dk_ptr, dk0, dk1, tokens, valid, dk_strides, D, D0, D1, ALIGN)
        store_pieces(dv_ptr, dv0, dv1, tokens, valid, dv_strides, V, V0, V1, ALIGN)


@triton.jit
def _zeros(SLAB: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr):
    return tl.zeros((B0, SLAB), tl.float32), tl.zeros((B1 if B1 > 0 else 1, SLAB), tl.float32)
