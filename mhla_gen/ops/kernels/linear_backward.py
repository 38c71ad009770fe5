"""Linear form, backward: one pass over queries, the mixing's gradient, one pass over keys.

Notation as in `linear.py` and `mhla_gen/ops/README.md`, which derives the equations. Everything is
recomputed from q, k, v and the (mixed) summaries; nothing of the size of the tokens is stored.
"""

import triton
import triton.language as tl

from mhla_gen.ops.kernels.common import (
    block_box,
    box_tokens,
    load_angles,
    part_of_block,
    phi,
    phi_grad,
    rotate,
    scale_rows,
    tile_mask,
    tile_offsets,
)
from mhla_gen.ops.kernels.linear import dot, load_summary, store_summary


@triton.jit
def backward_queries_kernel(
    q_ptr,
    do_ptr,
    cos_ptr,
    sin_ptr,
    mixed_ptr,
    mixed_scales_ptr,
    mixed_key_sums_ptr,
    dq_ptr,
    dmixed_ptr,
    dmixed_scales_ptr,
    dmixed_key_sums_ptr,
    q_strides,
    do_strides,
    dq_strides,
    box,
    num_heads,
    num_parts,
    eps,
    D: tl.constexpr,
    V: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    RANK: tl.constexpr,
    ALIGN: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    ROTARY: tl.constexpr,
    NORMALIZE: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient dq, and dS̃ = Σ R(φ(q)) gᵀ, dz̃ = -Σ δ φ(q) over one part of one block and head."""
    T, H, W, LT, LH, LW = box
    part_matrix = tl.program_id(0).to(tl.int64)
    head = tl.program_id(0) % num_heads
    row = tl.program_id(0) // num_heads
    num_blocks = LT * LH * LW
    batch = (row // (num_blocks * num_parts)).to(tl.int64)
    part = row % (num_blocks * num_parts)
    block = part // num_parts
    t0, h0, w0, size_t, size_h, size_w = block_box(block, T, H, W, LT, LH, LW, RANK)
    first, last = part_of_block(part % num_parts, num_parts, size_t * size_h * size_w, BT)
    q_ptr += tl.multiple_of(batch * q_strides[0] + head.to(tl.int64) * q_strides[2], ALIGN)
    do_ptr += tl.multiple_of(batch * do_strides[0] + head.to(tl.int64) * do_strides[2], ALIGN)
    dq_ptr += tl.multiple_of(batch * dq_strides[0] + head.to(tl.int64) * dq_strides[2], ALIGN)

    matrix = (batch * num_blocks + block) * num_heads + head
    mixed, mixed_scale = load_summary(mixed_ptr, mixed_scales_ptr, matrix, D, V, BD, BV)
    channels = tl.arange(0, BD)
    if NORMALIZE:
        key_sum = tl.load(mixed_key_sums_ptr + matrix * D + channels, channels < D, other=0.0)
    dmixed = tl.zeros((BD, BV), tl.float32)
    dkey_sum = tl.zeros((BD,), tl.float32)
    for start in range(first, last, BT):
        slots = start + tl.arange(0, BT)
        valid = slots < last
        tokens = box_tokens(slots, t0, h0, w0, size_h, size_w, H, W, RANK)
        mask = tile_mask(valid, D, BD)
        q = tl.load(
            q_ptr + tile_offsets(tokens, q_strides[1], q_strides[3], BD, ALIGN), mask, other=0.0
        ).to(tl.float32)
        grad = tl.load(
            do_ptr + tile_offsets(tokens, do_strides[1], do_strides[3], BV, ALIGN),
            tile_mask(valid, V, BV),
            other=0.0,
        ).to(tl.float32)
        features = tl.where(mask, phi(q, FEATURE_MAP), 0.0)
        rotated = features
        if ROTARY:
            cos, sin = load_angles(cos_ptr, sin_ptr, tokens, valid, D, BD)
            rotated = rotate(features, cos, sin)
        if NORMALIZE:
            # Rows past the end are all zero: their eps of possibly 0 must not divide.
            denominators = tl.sum(features * key_sum[None, :], axis=1) + eps
            inverse = 1 / tl.where(valid, denominators, 1.0)
            grad = grad * inverse[:, None]

        # du = S̃ g
        zeros = tl.zeros((BT, BD), tl.float32)
        if mixed_ptr.dtype.element_ty == tl.float16:
            scaled, scales = scale_rows(grad)
            du = dot(scaled, tl.trans(mixed), zeros, PRECISION)
            du = du * (scales * mixed_scale)[:, None]
        else:
            du = dot(grad, tl.trans(mixed), zeros, PRECISION)
        dmixed = dot(tl.trans(rotated.to(OPERAND)), grad.to(OPERAND), dmixed, PRECISION)
        dfeatures = du
        if ROTARY:
            dfeatures = rotate(du, cos, -sin)
        if NORMALIZE:
            # δ = do·o / denominator, and g·numerator = u·du.
            delta = tl.sum(rotated * du, axis=1) * inverse
            dfeatures -= delta[:, None] * key_sum[None, :]
            dkey_sum -= tl.sum(features * delta[:, None], axis=0)
        tl.store(
            dq_ptr + tile_offsets(tokens, dq_strides[1], dq_strides[3], BD, ALIGN),
            (dfeatures * phi_grad(q, FEATURE_MAP)).to(dq_ptr.dtype.element_ty),
            mask=mask,
        )

    store_summary(dmixed, dmixed_ptr, dmixed_scales_ptr, part_matrix, D, V, BD, BV)
    if NORMALIZE:
        tl.store(dmixed_key_sums_ptr + part_matrix * D + channels, dkey_sum, mask=channels < D)


@triton.jit
def correlate_kernel(
    left_ptr,
    left_scales_ptr,
    left_key_sums_ptr,
    right_ptr,
    right_scales_ptr,
    right_key_sums_ptr,
    partial_ptr,
    num_heads,
    num_rows,
    num_splits,
    D: tl.constexpr,
    V: tl.constexpr,
    BI: tl.constexpr,
    BC: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """<dS̃_i, S_b> + <dz̃_i, z_b> for BI × BI pairs (i, b) over one split of the columns.

    Partial sums go to `partial` [batch, num_heads, num_splits, num_rows, num_rows] in float32.
    """
    HALF: tl.constexpr = left_ptr.dtype.element_ty == tl.float16
    tiles = tl.cdiv(num_rows, BI)
    rows_b = tl.program_id(0) % tiles * BI + tl.arange(0, BI)
    rows_i = tl.program_id(0) // tiles % tiles * BI + tl.arange(0, BI)
    partial = tl.program_id(0) // (tiles * tiles)
    split = partial % num_splits
    batch = (partial // num_splits // num_heads).to(tl.int64)
    head = partial // num_splits % num_heads
    valid_i, valid_b = rows_i < num_rows, rows_b < num_rows
    left = (batch * num_rows + rows_i) * num_heads + head
    right = (batch * num_rows + rows_b) * num_heads + head

    span = tl.cdiv(tl.cdiv(D * V, num_splits), BC) * BC
    last = tl.minimum((split + 1) * span, D * V)
    acc = tl.zeros((BI, BI), tl.float32)
    for start in range(split * span, last, BC):
        columns = start + tl.arange(0, BC)
        valid = columns < last
        a = tl.load(
            left_ptr + left[:, None] * (D * V) + columns[None, :],
            mask=valid_i[:, None] & valid[None, :],
            other=0.0,
        )
        b = tl.load(
            right_ptr + right[:, None] * (D * V) + columns[None, :],
            mask=valid_b[:, None] & valid[None, :],
            other=0.0,
        )
        acc = dot(a, tl.trans(b), acc, "tf32x3")
    if HALF:
        left_scales = tl.load(left_scales_ptr + left, mask=valid_i, other=0.0)
        right_scales = tl.load(right_scales_ptr + right, mask=valid_b, other=0.0)
        acc = acc * left_scales[:, None] * right_scales[None, :]
    if NORMALIZE:
        # Only the first split adds the key sums.
        for start in range(0, tl.where(split == 0, D, 0), 16):
            columns = start + tl.arange(0, 16)
            valid = columns < D
            a = tl.load(
                left_key_sums_ptr + left[:, None] * D + columns[None, :],
                mask=valid_i[:, None] & valid[None, :],
                other=0.0,
            )
            b = tl.load(
                right_key_sums_ptr + right[:, None] * D + columns[None, :],
                mask=valid_b[:, None] & valid[None, :],
                other=0.0,
            )
            acc = dot(a, tl.trans(b), acc, "tf32x3")
    partial_ptr += partial.to(tl.int64) * num_rows * num_rows
    tl.store(
        partial_ptr + rows_i[:, None] * num_rows + rows_b[None, :],
        acc,
        mask=valid_i[:, None] & valid_b[None, :],
    )


@triton.jit
def backward_keys_kernel(
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    dsummaries_ptr,
    dscales_ptr,
    dkey_sums_ptr,
    dk_ptr,
    dv_ptr,
    k_strides,
    v_strides,
    dk_strides,
    dv_strides,
    box,
    num_heads,
    num_parts,
    D: tl.constexpr,
    V: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    RANK: tl.constexpr,
    ALIGN: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    ROTARY: tl.constexpr,
    NORMALIZE: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients dk = φ'(k) (Rᵀ dS v + dz), dv = dSᵀ R(φ(k)) of one part of one block and head."""
    HALF: tl.constexpr = dsummaries_ptr.dtype.element_ty == tl.float16
    T, H, W, LT, LH, LW = box
    head = tl.program_id(0) % num_heads
    row = tl.program_id(0) // num_heads
    num_blocks = LT * LH * LW
    batch = (row // (num_blocks * num_parts)).to(tl.int64)
    part = row % (num_blocks * num_parts)
    block = part // num_parts
    t0, h0, w0, size_t, size_h, size_w = block_box(block, T, H, W, LT, LH, LW, RANK)
    first, last = part_of_block(part % num_parts, num_parts, size_t * size_h * size_w, BT)
    k_ptr += tl.multiple_of(batch * k_strides[0] + head.to(tl.int64) * k_strides[2], ALIGN)
    v_ptr += tl.multiple_of(batch * v_strides[0] + head.to(tl.int64) * v_strides[2], ALIGN)
    dk_ptr += tl.multiple_of(batch * dk_strides[0] + head.to(tl.int64) * dk_strides[2], ALIGN)
    dv_ptr += tl.multiple_of(batch * dv_strides[0] + head.to(tl.int64) * dv_strides[2], ALIGN)

    matrix = (batch * num_blocks + block) * num_heads + head
    dsummary, dscale = load_summary(dsummaries_ptr, dscales_ptr, matrix, D, V, BD, BV)
    channels = tl.arange(0, BD)
    if NORMALIZE:
        dkey_sum = tl.load(dkey_sums_ptr + matrix * D + channels, channels < D, other=0.0)
    for start in range(first, last, BT):
        slots = start + tl.arange(0, BT)
        valid = slots < last
        tokens = box_tokens(slots, t0, h0, w0, size_h, size_w, H, W, RANK)
        mask = tile_mask(valid, D, BD)
        value_mask = tile_mask(valid, V, BV)
        k = tl.load(
            k_ptr + tile_offsets(tokens, k_strides[1], k_strides[3], BD, ALIGN), mask, other=0.0
        ).to(tl.float32)
        v = tl.load(
            v_ptr + tile_offsets(tokens, v_strides[1], v_strides[3], BV, ALIGN),
            value_mask,
            other=0.0,
        ).to(tl.float32)
        rotated = tl.where(mask, phi(k, FEATURE_MAP), 0.0)
        if ROTARY:
            cos, sin = load_angles(cos_ptr, sin_ptr, tokens, valid, D, BD)
            rotated = rotate(rotated, cos, sin)

        # dw = dS v and dv = dSᵀ w
        key_zeros = tl.zeros((BT, BD), tl.float32)
        value_zeros = tl.zeros((BT, BV), tl.float32)
        if HALF:
            v, v_scales = scale_rows(v)
            w, w_scales = scale_rows(rotated)
            dw = dot(v, tl.trans(dsummary), key_zeros, PRECISION)
            dw = dw * (v_scales * dscale)[:, None]
            dv = dot(w, dsummary, value_zeros, PRECISION) * (w_scales * dscale)[:, None]
        else:
            dw = dot(v, tl.trans(dsummary), key_zeros, PRECISION)
            dv = dot(rotated, dsummary, value_zeros, PRECISION)
        if ROTARY:
            dw = rotate(dw, cos, -sin)
        if NORMALIZE:
            dw += dkey_sum[None, :]
        tl.store(
            dk_ptr + tile_offsets(tokens, dk_strides[1], dk_strides[3], BD, ALIGN),
            (dw * phi_grad(k, FEATURE_MAP)).to(dk_ptr.dtype.element_ty),
            mask=mask,
        )
        tl.store(
            dv_ptr + tile_offsets(tokens, dv_strides[1], dv_strides[3], BV, ALIGN),
            dv.to(dv_ptr.dtype.element_ty),
            mask=value_mask,
        )
