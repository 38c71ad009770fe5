"""Causal form, backward: one pass over queries and one over keys (mixing is in `mixing.py`).

Notation as in `causal.py` and `mhla_gen/ops/README.md`, which derives the equations.
"""

import triton
import triton.language as tl

from mhla_gen.ops.kernels.boxes import block_box, locate_part
from mhla_gen.ops.kernels.causal import (
    add_weighed,
    load_features,
    load_rows,
    multiply_rows,
    narrow,
    times_matrix,
)
from mhla_gen.ops.kernels.features import load_angles, phi_grad, rotate
from mhla_gen.ops.kernels.pieces import (
    dot,
    head_offset,
    load_vector,
    store_pieces,
    store_vector,
)
from mhla_gen.ops.kernels.summaries import load_summary, store_summary


@triton.jit
def causal_backward_queries_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    cos_ptr,
    sin_ptr,
    own_ptr,
    mixed_ptr,
    mixed_scales_ptr,
    mixed_key_sums_ptr,
    inverse_ptr,
    dq_ptr,
    dmixed_ptr,
    dmixed_scales_ptr,
    dmixed_key_sums_ptr,
    down_ptr,
    delta_ptr,
    q_strides,
    k_strides,
    v_strides,
    do_strides,
    dq_strides,
    own_stride,
    box,
    num_heads,
    D: tl.constexpr,
    V: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGN: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    ROTARY: tl.constexpr,
    NORMALIZE: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient dq, δ, and of one block and head dS̃ = Σ u gᵀ, dz̃ = -Σ δ φ(q) and that of m_ii."""
    _T, _H, W, _LT, _LH, LW = box
    batch, head, block, _block = locate_part(box, num_heads, 1, 1, GROUP)
    _t, _h, first, _size_t, _size_h, size = block_box(block, 1, 1, W, 1, 1, LW, 1)
    last = first + size
    q_ptr += head_offset(q_strides, batch, head, ALIGN)
    k_ptr += head_offset(k_strides, batch, head, ALIGN)
    v_ptr += head_offset(v_strides, batch, head, ALIGN)
    do_ptr += head_offset(do_strides, batch, head, ALIGN)
    dq_ptr += head_offset(dq_strides, batch, head, ALIGN)
    inverse_ptr += (batch * num_heads + head) * W
    delta_ptr += (batch * num_heads + head) * W

    own = tl.load(own_ptr + head * own_stride + block)
    matrix = (batch * LW + block) * num_heads + head
    dmixed = tl.zeros((BD, BV), tl.float32)
    dkey_sum = tl.zeros((BD,), tl.float32)
    down = tl.zeros((BT,), tl.float32)
    for start in range(first, last, BT):
        rows = start + tl.arange(0, BT)
        valid = rows < last
        tokens = rows.to(tl.int64)
        inverse = tl.full((BT,), 1.0, tl.float32)
        if NORMALIZE:
            inverse = tl.load(inverse_ptr + rows, mask=valid, other=0.0)
        grad = load_rows(do_ptr, tokens, valid, do_strides, V, BV, ALIGN).to(tl.float32)
        grads, grad_scales = narrow(grad * inverse[:, None], OPERAND)
        du_own = tl.zeros((BT, BD), tl.float32)
        own_sums = tl.zeros((BT, BD), tl.float32)
        for key_start in range(first, start + 1, BT):
            columns = key_start + tl.arange(0, BT)
            present = columns < last
            key_tokens = columns.to(tl.int64)
            read = (columns[None, :] <= rows[:, None]) & present[None, :]
            values = load_rows(v_ptr, key_tokens, present, v_strides, V, BV, ALIGN)
            values, value_scales = narrow(values.to(tl.float32), OPERAND)
            products = multiply_rows(grads, grad_scales, values, value_scales, PRECISION)
            products = tl.where(read, products, 0.0)
            _k, key_features, key_rotated = load_features(
                k_ptr, cos_ptr, sin_ptr, key_tokens, present, k_strides, D, BD, ALIGN,
                FEATURE_MAP, ROTARY,
            )  # fmt: skip
            keys, key_scales = narrow(key_rotated, OPERAND)
            du_own = add_weighed(du_own, products, keys, key_scales, PRECISION)
            if NORMALIZE:
                keys, key_scales = narrow(key_features, OPERAND)
                ones = tl.where(read, 1.0, 0.0)
                own_sums = add_weighed(own_sums, ones, keys, key_scales, PRECISION)

        # Loaded for every tile, and not before: registers are what a program has least of.
        mixed, _s01, _s10, _s11, mixed_scale = load_summary(
            mixed_ptr, mixed_scales_ptr, matrix, D, V, BD, 0, BV, 0
        )
        grad = load_rows(do_ptr, tokens, valid, do_strides, V, BV, ALIGN).to(tl.float32)
        grad *= inverse[:, None]
        du = own * du_own + times_matrix(grad, tl.trans(mixed), mixed_scale, PRECISION)
        q, features, rotated = load_features(
            q_ptr, cos_ptr, sin_ptr, tokens, valid, q_strides, D, BD, ALIGN, FEATURE_MAP, ROTARY
        )
        dmixed = dot(tl.trans(rotated.to(OPERAND)), grad.to(OPERAND), dmixed, PRECISION)
        by_own = tl.sum(rotated * du_own, axis=1)
        dfeatures = du
        if ROTARY:
            cos, sin = load_angles(cos_ptr, sin_ptr, tokens, valid, D, 0, BD)
            dfeatures = rotate(du, cos, -sin)
        if NORMALIZE:
            # δ = do·o / denominator, and g·numerator = u·du.
            delta = tl.sum(rotated * du, axis=1) * inverse
            tl.store(delta_ptr + rows, delta, mask=valid)
            key_sum = load_vector(mixed_key_sums_ptr + matrix * D, D, 0, BD)[None, :]
            dfeatures -= delta[:, None] * (key_sum + own * own_sums)
            dkey_sum -= tl.sum(features * delta[:, None], axis=0)
            by_own -= delta * tl.sum(features * own_sums, axis=1)
        down += tl.where(valid, by_own, 0.0)
        dq = dfeatures * phi_grad(q, FEATURE_MAP)
        store_pieces(dq_ptr, dq, dq, tokens, valid, dq_strides, D, BD, 0, ALIGN)

    pieces = dmixed, dmixed, dmixed, dmixed
    store_summary(dmixed_ptr, dmixed_scales_ptr, matrix, *pieces, D, V, BD, 0, BV, 0)
    tl.store(down_ptr + matrix, tl.sum(down, axis=0))
    if NORMALIZE:
        store_vector(dmixed_key_sums_ptr + matrix * D, dkey_sum, D, 0)


@triton.jit
def causal_backward_keys_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    cos_ptr,
    sin_ptr,
    own_ptr,
    dsummaries_ptr,
    dscales_ptr,
    dkey_sums_ptr,
    inverse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    q_strides,
    k_strides,
    v_strides,
    do_strides,
    dk_strides,
    dv_strides,
    own_stride,
    box,
    num_heads,
    D: tl.constexpr,
    V: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGN: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    ROTARY: tl.constexpr,
    NORMALIZE: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of the keys and values of one block and head, from later blocks and its own."""
    _T, _H, W, _LT, _LH, LW = box
    batch, head, block, _block = locate_part(box, num_heads, 1, 1, GROUP)
    _t, _h, first, _size_t, _size_h, size = block_box(block, 1, 1, W, 1, 1, LW, 1)
    last = first + size
    q_ptr += head_offset(q_strides, batch, head, ALIGN)
    k_ptr += head_offset(k_strides, batch, head, ALIGN)
    v_ptr += head_offset(v_strides, batch, head, ALIGN)
    do_ptr += head_offset(do_strides, batch, head, ALIGN)
    dk_ptr += head_offset(dk_strides, batch, head, ALIGN)
    dv_ptr += head_offset(dv_strides, batch, head, ALIGN)
    inverse_ptr += (batch * num_heads + head) * W
    delta_ptr += (batch * num_heads + head) * W

    own = tl.load(own_ptr + head * own_stride + block)
    matrix = (batch * LW + block) * num_heads + head
    for start in range(first, last, BT):
        columns = start + tl.arange(0, BT)
        present = columns < last
        tokens = columns.to(tl.int64)
        _k, _features, rotated = load_features(
            k_ptr, cos_ptr, sin_ptr, tokens, present, k_strides, D, BD, ALIGN, FEATURE_MAP, ROTARY
        )
        keys, key_scales = narrow(rotated, OPERAND)
        values = load_rows(v_ptr, tokens, present, v_strides, V, BV, ALIGN)
        values, value_scales = narrow(values.to(tl.float32), OPERAND)
        dv = tl.zeros((BT, BV), tl.float32)
        dw = tl.zeros((BT, BD), tl.float32)
        dz = tl.zeros((BT, BD), tl.float32)
        for query_start in range(start, last, BT):
            rows = query_start + tl.arange(0, BT)
            valid = rows < last
            query_tokens = rows.to(tl.int64)
            read = (columns[:, None] <= rows[None, :]) & valid[None, :]
            _q, query_features, query_rotated = load_features(
                q_ptr, cos_ptr, sin_ptr, query_tokens, valid, q_strides, D, BD, ALIGN,
                FEATURE_MAP, ROTARY,
            )  # fmt: skip
            grad = load_rows(do_ptr, query_tokens, valid, do_strides, V, BV, ALIGN).to(tl.float32)
            if NORMALIZE:
                delta = tl.load(delta_ptr + rows, mask=valid, other=0.0)
                deltas = tl.where(read, delta[None, :], 0.0)
                queries, query_scales = narrow(query_features, OPERAND)
                dz = add_weighed(dz, deltas, queries, query_scales, PRECISION)
                inverse = tl.load(inverse_ptr + rows, mask=valid, other=0.0)
                grad *= inverse[:, None]
            queries, query_scales = narrow(query_rotated, OPERAND)
            grads, grad_scales = narrow(grad, OPERAND)
            scores = multiply_rows(keys, key_scales, queries, query_scales, PRECISION)
            dv = add_weighed(dv, tl.where(read, scores, 0.0), grads, grad_scales, PRECISION)
            products = multiply_rows(values, value_scales, grads, grad_scales, PRECISION)
            products = tl.where(read, products, 0.0)
            dw = add_weighed(dw, products, queries, query_scales, PRECISION)

        # Loaded for every tile, and not before: registers are what a program has least of.
        dsummary, _s01, _s10, _s11, dscale = load_summary(
            dsummaries_ptr, dscales_ptr, matrix, D, V, BD, 0, BV, 0
        )
        k, _features, rotated = load_features(
            k_ptr, cos_ptr, sin_ptr, tokens, present, k_strides, D, BD, ALIGN, FEATURE_MAP, ROTARY
        )
        dv = own * dv + times_matrix(rotated, dsummary, dscale, PRECISION)
        store_pieces(dv_ptr, dv, dv, tokens, present, dv_strides, V, BV, 0, ALIGN)
        value = load_rows(v_ptr, tokens, present, v_strides, V, BV, ALIGN).to(tl.float32)
        dw = own * dw + times_matrix(value, tl.trans(dsummary), dscale, PRECISION)
        if ROTARY:
            cos, sin = load_angles(cos_ptr, sin_ptr, tokens, present, D, 0, BD)
            dw = rotate(dw, cos, -sin)
        if NORMALIZE:
            dw += load_vector(dkey_sums_ptr + matrix * D, D, 0, BD)[None, :] - own * dz
        dk = dw * phi_grad(k, FEATURE_MAP)
        store_pieces(dk_ptr, dk, dk, tokens, present, dk_strides, D, BD, 0, ALIGN)
