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
    head_offset,
    load_pieces,
    load_vector,
    scale_rows,
    store_pieces,
    store_vector,
)
from mhla_gen.ops.kernels.summaries import (
    add_outer,
    load_summary,
    no_summary,
    store_summary,
    take_column,
    times_summary,
)


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
    D0: tl.constexpr,
    D1: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    BT: tl.constexpr,
    SPARE: tl.constexpr,
    ONE_TILE: tl.constexpr,
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
    s00, s01, s10, s11, mixed_scale = load_summary(
        mixed_ptr, mixed_scales_ptr, matrix, D, V, D0, D1, V0, V1
    )
    if NORMALIZE:
        mixed_key_sums_ptr += matrix * D
        z0 = load_vector(mixed_key_sums_ptr, D, 0, D0)[None, :]
        z1 = z0
        if D1 > 0:
            z1 = load_vector(mixed_key_sums_ptr, D, D0, D1)[None, :]
    # As in `summarise_kernel`, dz̃ is made in a column to spare.
    is_spare = (tl.arange(0, V1 if V1 > 0 else V0) == V - V0)[None, :]
    ds00, ds01, dt10, ds11 = no_summary(D0, D1, V0, V1)
    dz0 = tl.zeros((D0,), tl.float32)
    dz1 = dz0
    if D1 > 0:
        dz1 = tl.zeros((D1,), tl.float32)
    for tile in range(0, 1 if ONE_TILE else tl.cdiv(last - first, BT)):
        slots = first + tile * BT + tl.arange(0, BT)
        valid = slots < last
        tokens = box_tokens(slots, first_t, first_h, first_w, size_h, size_w, H, W, RANK)
        tokens, valid = in_window(tokens, valid, window)
        q0, q1 = load_pieces(q_ptr, tokens, valid, q_strides, D, D0, D1, ALIGN)
        g0, g1 = load_pieces(do_ptr, tokens, valid, do_strides, V, V0, V1, ALIGN)
        q0, q1, g0, g1 = (
            q0.to(tl.float32), q1.to(tl.float32), g0.to(tl.float32), g1.to(tl.float32),
        )  # fmt: skip
        # Rows past the end hold φ(0), which their gradients of 0 keep out of every sum.
        f0 = phi(q0, FEATURE_MAP)
        f1 = f0
        if D1 > 0:
            f1 = phi(q1, FEATURE_MAP)
        u0, u1 = f0, f1
        if ROTARY:
            cos0, sin0 = load_angles(cos_ptr, sin_ptr, tokens, valid, D, 0, D0)
            u0 = rotate(f0, cos0, sin0)
            if D1 > 0:
                cos1, sin1 = load_angles(cos_ptr, sin_ptr, tokens, valid, D, D0, D1)
                u1 = rotate(f1, cos1, sin1)
        if NORMALIZE:
            denominators = tl.sum(f0 * z0, axis=1) + eps
            if D1 > 0:
                denominators += tl.sum(f1 * z1, axis=1)
            # Past the end no gradient may become 0 / 0.
            inverse = 1 / tl.where(valid, denominators, 1.0)
            g0, g1 = g0 * inverse[:, None], g1 * inverse[:, None]

        # du = S̃ g
        factors = tl.full((BT,), mixed_scale, tl.float32)
        a0, a1 = g0, g1
        if mixed_ptr.dtype.element_ty == tl.float16:
            a0, a1, scales = scale_rows(g0, g1, V1)
            factors = scales * mixed_scale
        du0, du1 = times_summary(
            a0, a1, tl.trans(s00), tl.trans(s10), tl.trans(s01), tl.trans(s11), V1, D1, PRECISION
        )
        if mixed_ptr.dtype.element_ty == tl.float16:
            du0, du1 = du0 * factors[:, None], du1 * factors[:, None]
        if NORMALIZE:
            # δ = do·o / denominator, and g·numerator = u·du.
            delta = tl.sum(u0 * du0, axis=1)
            if D1 > 0:
                delta += tl.sum(u1 * du1, axis=1)
            delta = (delta * inverse)[:, None]
        if ROTARY:
            du0 = rotate(du0, cos0, -sin0)
            if D1 > 0:
                du1 = rotate(du1, cos1, -sin1)
        if NORMALIZE:
            du0 -= delta * z0
            if D1 > 0:
                du1 -= delta * z1
            if SPARE:
                g1 = tl.where(is_spare, -delta, g1)
            else:
                dz0 -= tl.sum(f0 * delta, axis=0)
                if D1 > 0:
                    dz1 -= tl.sum(f1 * delta, axis=0)
        dq0, dq1 = du0 * phi_grad(q0, FEATURE_MAP), du1
        if D1 > 0:
            dq1 = du1 * phi_grad(q1, FEATURE_MAP)
        store_pieces(dq_ptr, dq0, dq1, tokens, valid, dq_strides, D, D0, D1, ALIGN)
        ds00, ds01, dt10, ds11 = add_outer(
            u0.to(OPERAND), u1.to(OPERAND), g0.to(OPERAND), g1.to(OPERAND),
            ds00, ds01, dt10, ds11, D1, V1, PRECISION,
        )  # fmt: skip

    matrix = (batch * (LT * LH * LW * num_parts) + row) * num_heads + head
    if SPARE:
        dz0, dz1, ds01, ds11 = take_column(ds01, ds11, is_spare, D1)
    store_summary(
        dmixed_ptr, dmixed_scales_ptr, matrix, ds00, ds01, dt10, ds11, D, V, D0, D1, V0, V1
    )
    if NORMALIZE:
        dmixed_key_sums_ptr += matrix * D
        store_vector(dmixed_key_sums_ptr, dz0, D, 0)
        if D1 > 0:
            store_vector(dmixed_key_sums_ptr, dz1, D, D0)


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
    ONE_TILE: tl.constexpr,
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
    for tile in range(0, 1 if ONE_TILE else tl.cdiv(last - first, BT)):
        slots = first + tile * BT + tl.arange(0, BT)
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

        # dv = dSᵀ w and dw = dS v; the pieces of a transpose change places. One is stored before
        # the other is computed, since both at once need more registers.
        w_scales = tl.full((BT,), 1.0, tl.float32)
        v_scales = w_scales
        if dsummaries_ptr.dtype.element_ty == tl.float16:
            w0, w1, w_scales = scale_rows(w0, w1, D1)
            v0, v1, v_scales = scale_rows(v0, v1, V1)
            w_scales, v_scales = w_scales * dscale, v_scales * dscale
        dv0, dv1 = times_summary(w0, w1, s00, s01, s10, s11, D1, V1, PRECISION)
        dv0, dv1 = dv0 * w_scales[:, None], dv1 * w_scales[:, None]
        store_pieces(dv_ptr, dv0, dv1, tokens, valid, dv_strides, V, V0, V1, ALIGN)
        dw0, dw1 = times_summary(
            v0, v1, tl.trans(s00), tl.trans(s10), tl.trans(s01), tl.trans(s11), V1, D1, PRECISION
        )
        dw0, dw1 = dw0 * v_scales[:, None], dw1 * v_scales[:, None]
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
