"""Linear form, backward: one pass over queries and one over keys (mixing is in `mixing.py`).

Notation as in `linear.py` and `mhla_gen/ops/README.md`, which derives the equations. Everything is
recomputed from q, k, v and the (mixed) summaries; nothing of the size of the tokens is stored.
"""

import triton
import triton.language as tl

from mhla_gen.ops.kernels.boxes import box_tokens, held_box, in_window, locate_part, part_slots
from mhla_gen.ops.kernels.features import load_angles, phi, phi_grad, rotate
from mhla_gen.ops.kernels.linear import rotate_pieces
from mhla_gen.ops.kernels.pieces import (
    clear_padding,
    dot,
    head_offset,
    load_pieces,
    load_vector,
    scale_rows,
    store_pieces,
    store_vector,
)
from mhla_gen.ops.kernels.summaries import load_summary, store_summary, times_summary


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
    window,
    num_heads,
    num_parts,
    eps,
    D: tl.constexpr,
    V: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    RANK: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGN: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    ROTARY: tl.constexpr,
    NORMALIZE: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient dq, and dS̃ = Σ R(φ(q)) gᵀ, dz̃ = -Σ δ φ(q) over one part of one block and head."""
    _T, H, W, LT, LH, LW = box
    batch, head, row, block = locate_part(box, num_heads, num_parts, RANK, GROUP)
    first_t, first_h, first_w, size_t, size_h, size_w = held_box(block, box, window, RANK)
    first, last = part_slots(row, num_parts, size_t * size_h * size_w, BT)
    q_ptr += head_offset(q_strides, batch, head, ALIGN)
    do_ptr += head_offset(do_strides, batch, head, ALIGN)
    dq_ptr += head_offset(dq_strides, batch, head, ALIGN)

    matrix = (batch * (LT * LH * LW) + block) * num_heads + head
    mixed, _s01, _s10, _s11, mixed_scale = load_summary(
        mixed_ptr, mixed_scales_ptr, matrix, D, V, BD, 0, BV, 0
    )
    if NORMALIZE:
        key_sum = load_vector(mixed_key_sums_ptr + matrix * D, D, 0, BD)[None, :]
    dmixed = tl.zeros((BD, BV), tl.float32)
    dkey_sum = tl.zeros((BD,), tl.float32)
    for start in range(first, last, BT):
        slots = start + tl.arange(0, BT)
        valid = slots < last
        tokens = box_tokens(slots, first_t, first_h, first_w, size_h, size_w, H, W, RANK)
        tokens, valid = in_window(tokens, valid, window)
        q, _q = load_pieces(q_ptr, tokens, valid, q_strides, D, BD, 0, ALIGN)
        grad, _g = load_pieces(do_ptr, tokens, valid, do_strides, V, BV, 0, ALIGN)
        q, grad = q.to(tl.float32), grad.to(tl.float32)
        # Rows past the end hold φ(0), which their gradients of 0 keep out of every sum.
        features = phi(q, FEATURE_MAP)
        rotated = features
        if ROTARY:
            cos, sin = load_angles(cos_ptr, sin_ptr, tokens, valid, D, 0, BD)
            rotated = rotate(features, cos, sin)
        if NORMALIZE:
            denominators = tl.sum(features * key_sum, axis=1) + eps
            # Past the end no gradient may become 0 / 0.
            inverse = 1 / tl.where(valid, denominators, 1.0)
            grad *= inverse[:, None]

        # du = S̃ g
        zeros = tl.zeros((BT, BD), tl.float32)
        if mixed_ptr.dtype.element_ty == tl.float16:
            scaled, _scaled, scales = scale_rows(grad, grad, 0)
            du = dot(scaled, tl.trans(mixed), zeros, PRECISION)
            du *= (scales * mixed_scale)[:, None]
        else:
            du = dot(grad, tl.trans(mixed), zeros, PRECISION)
        dmixed = dot(tl.trans(rotated.to(OPERAND)), grad.to(OPERAND), dmixed, PRECISION)
        dfeatures = du
        if ROTARY:
            dfeatures = rotate(du, cos, -sin)
        if NORMALIZE:
            # δ = do·o / denominator, and g·numerator = u·du.
            delta = (tl.sum(rotated * du, axis=1) * inverse)[:, None]
            dfeatures -= delta * key_sum
            dkey_sum -= tl.sum(features * delta, axis=0)
        dq = dfeatures * phi_grad(q, FEATURE_MAP)
        store_pieces(dq_ptr, dq, dq, tokens, valid, dq_strides, D, BD, 0, ALIGN)

    matrix = (batch * (LT * LH * LW * num_parts) + row) * num_heads + head
    store_summary(dmixed_ptr, dmixed_scales_ptr, matrix, dmixed, D, V)
    if NORMALIZE:
        store_vector(dmixed_key_sums_ptr + matrix * D, dkey_sum, D, 0)


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
    window,
    num_heads,
    num_parts,
    D: tl.constexpr,
    V: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    BT: tl.constexpr,
    RANK: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGN: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    ROTARY: tl.constexpr,
    NORMALIZE: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients dk = φ'(k) (Rᵀ dS v + dz), dv = dSᵀ R(φ(k)) of one part of one block and head."""
    _T, H, W, LT, LH, LW = box
    batch, head, row, block = locate_part(box, num_heads, num_parts, RANK, GROUP)
    first_t, first_h, first_w, size_t, size_h, size_w = held_box(block, box, window, RANK)
    first, last = part_slots(row, num_parts, size_t * size_h * size_w, BT)
    k_ptr += head_offset(k_strides, batch, head, ALIGN)
    v_ptr += head_offset(v_strides, batch, head, ALIGN)
    dk_ptr += head_offset(dk_strides, batch, head, ALIGN)
    dv_ptr += head_offset(dv_strides, batch, head, ALIGN)

    matrix = (batch * (LT * LH * LW) + block) * num_heads + head
    s00, s01, s10, s11, dscale = load_summary(
        dsummaries_ptr, dscales_ptr, matrix, D, V, D0, D1, V0, V1
    )
    if NORMALIZE:
        dkey_sums_ptr += matrix * D
        z0 = load_vector(dkey_sums_ptr, D, 0, D0)[None, :]
        z1 = z0
        if D1 > 0:
            z1 = load_vector(dkey_sums_ptr, D, D0, D1)[None, :]
    for start in range(first, last, BT):
        slots = start + tl.arange(0, BT)
        valid = slots < last
        tokens = box_tokens(slots, first_t, first_h, first_w, size_h, size_w, H, W, RANK)
        tokens, valid = in_window(tokens, valid, window)
        k0, k1 = load_pieces(k_ptr, tokens, valid, k_strides, D, D0, D1, ALIGN)
        v0, v1 = load_pieces(v_ptr, tokens, valid, v_strides, V, V0, V1, ALIGN)
        k0, k1, v0, v1 = (
            k0.to(tl.float32), k1.to(tl.float32), v0.to(tl.float32), v1.to(tl.float32),
        )  # fmt: skip
        w0 = clear_padding(phi(k0, FEATURE_MAP), D, 0)
        w1 = w0
        if D1 > 0:
            w1 = clear_padding(phi(k1, FEATURE_MAP), D, D0)
        if ROTARY:
            w0, w1 = rotate_pieces(w0, w1, cos_ptr, sin_ptr, tokens, valid, D, D0, D1, 1)

        # dv = dSᵀ w and dw = dS v; the pieces of a transpose change places.
        if dsummaries_ptr.dtype.element_ty == tl.float16:
            w0, w1, w_scales = scale_rows(w0, w1, D1)
            v0, v1, v_scales = scale_rows(v0, v1, V1)
            w_scales, v_scales = w_scales * dscale, v_scales * dscale
        dv0, dv1 = times_summary(w0, w1, s00, s01, s10, s11, D1, V1, PRECISION)
        dw0, dw1 = times_summary(
            v0, v1, tl.trans(s00), tl.trans(s10), tl.trans(s01), tl.trans(s11), V1, D1, PRECISION
        )
        if dsummaries_ptr.dtype.element_ty == tl.float16:
            dv0, dv1 = dv0 * w_scales[:, None], dv1 * w_scales[:, None]
            dw0, dw1 = dw0 * v_scales[:, None], dw1 * v_scales[:, None]
        store_pieces(dv_ptr, dv0, dv1, tokens, valid, dv_strides, V, V0, V1, ALIGN)
        if ROTARY:
            dw0, dw1 = rotate_pieces(dw0, dw1, cos_ptr, sin_ptr, tokens, valid, D, D0, D1, -1)
        if NORMALIZE:
            dw0 += z0
            if D1 > 0:
                dw1 += z1
        dk0, dk1 = dw0 * phi_grad(k0, FEATURE_MAP), dw1
        if D1 > 0:
            dk1 = dw1 * phi_grad(k1, FEATURE_MAP)
        store_pieces(dk_ptr, dk0, dk1, tokens, valid, dk_strides, D, D0, D1, ALIGN)
