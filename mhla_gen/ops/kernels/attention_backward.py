"""Attention form, backward: one pass over queries and one over keys."""

import triton
import triton.language as tl

from mhla_gen.ops.kernels.attention import (
    add_times,
    features_of_pieces,
    mixing_rows,
    one_hot_columns,
    outer,
)
from mhla_gen.ops.kernels.boxes import block_of_tokens
from mhla_gen.ops.kernels.features import phi_grad
from mhla_gen.ops.kernels.linear import rotate_pieces
from mhla_gen.ops.kernels.pieces import dot, head_offset, load_pieces, rows_exist, store_pieces


@triton.jit
def attention_backward_queries_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    do_ptr,
    cos_ptr,
    sin_ptr,
    mixing_ptr,
    inverse_ptr,
    delta_ptr,
    dq_ptr,
    partial_ptr,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    do_strides,
    dq_strides,
    mixing_strides,
    box,
    seq_len,
    num_heads,
    D: tl.constexpr,
    V: tl.constexpr,
    M: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    BM: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    RANK: tl.constexpr,
    ALIGN: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    ROTARY: tl.constexpr,
    NORMALIZE: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient dq and do·o of BQ queries, and their share of the mixing's gradient.

    The share goes to `partial` [batch, num_heads, query tiles, M, M].
    """
    tiles = tl.cdiv(seq_len, BQ)
    batch = (tl.program_id(0) // tiles // num_heads).to(tl.int64)
    head = tl.program_id(0) // tiles % num_heads
    q_ptr += head_offset(q_strides, batch, head, ALIGN)
    k_ptr += head_offset(k_strides, batch, head, ALIGN)
    v_ptr += head_offset(v_strides, batch, head, ALIGN)
    out_ptr += head_offset(out_strides, batch, head, ALIGN)
    do_ptr += head_offset(do_strides, batch, head, ALIGN)
    dq_ptr += head_offset(dq_strides, batch, head, ALIGN)
    mixing_ptr += head.to(tl.int64) * mixing_strides[0]

    q_rows = tl.program_id(0) % tiles * BQ + tl.arange(0, BQ)
    q_tokens, q_valid = q_rows.to(tl.int64), rows_exist(q_rows, seq_len, EVEN)
    q0, q1 = load_pieces(q_ptr, q_tokens, q_valid, q_strides, D, D0, D1, ALIGN)
    g0, g1 = load_pieces(do_ptr, q_tokens, q_valid, do_strides, V, V0, V1, ALIGN)
    u0, u1, _r0, _r1, qf0, qf1 = features_of_pieces(
        q0, q1, cos_ptr, sin_ptr, q_tokens, q_valid, D, D0, D1, FEATURE_MAP, ROTARY, OPERAND, True
    )
    if NORMALIZE:
        scalars = (batch * num_heads + head) * seq_len + q_rows
        inverse = tl.load(inverse_ptr + scalars, mask=q_valid, other=0.0)
        o0, o1 = load_pieces(out_ptr, q_tokens, q_valid, out_strides, V, V0, V1, ALIGN)
        delta = tl.sum(g0.to(tl.float32) * o0.to(tl.float32), axis=1)
        if V1 > 0:
            delta += tl.sum(g1.to(tl.float32) * o1.to(tl.float32), axis=1)
        tl.store(delta_ptr + scalars, delta, mask=q_valid)
    g0, g1 = g0.to(OPERAND), g1.to(OPERAND)
    q_blocks = block_of_tokens(q_rows, box, RANK)
    rows, scale = mixing_rows(
        mixing_ptr, q_blocks, q_valid, mixing_strides[1], mixing_strides[2], M, BM, OPERAND
    )
    du0 = tl.zeros((BQ, D0), tl.float32)
    du1 = tl.zeros((BQ, D1 if D1 > 0 else 1), tl.float32)
    df0, df1 = du0, du1
    # Sums over the keys of each block, by query.
    drows = tl.zeros((BQ, BM), tl.float32)
    for start in range(0, seq_len, BK):
        k_rows = start + tl.arange(0, BK)
        k_tokens, k_valid = k_rows.to(tl.int64), rows_exist(k_rows, seq_len, EVEN)
        k0, k1 = load_pieces(k_ptr, k_tokens, k_valid, k_strides, D, D0, D1, ALIGN)
        v0, v1 = load_pieces(v_ptr, k_tokens, k_valid, v_strides, V, V0, V1, ALIGN)
        w0, w1, _r2, _r3, kf0, kf1 = features_of_pieces(
            k0, k1, cos_ptr, sin_ptr, k_tokens, k_valid, D, D0, D1,
            FEATURE_MAP, ROTARY, OPERAND, False,
        )  # fmt: skip
        k_blocks = tl.where(k_valid, block_of_tokens(k_rows, box, RANK), -1)
        columns = one_hot_columns(k_blocks, BM, OPERAND)
        weight = dot(rows, columns, tl.zeros((BQ, BK), tl.float32), PRECISION)
        dscores = outer(g0, g1, v0.to(OPERAND), v1.to(OPERAND), V1, PRECISION)
        if NORMALIZE and not ROTARY:
            dscores -= delta[:, None]
        du0, du1 = add_times((dscores * weight).to(OPERAND), w0, w1, du0, du1, D1, PRECISION)
        dweight = dscores * outer(u0, u1, w0, w1, D1, PRECISION)
        if NORMALIZE and ROTARY:
            dplain = (-delta[:, None] * weight).to(OPERAND)
            df0, df1 = add_times(dplain, kf0, kf1, df0, df1, D1, PRECISION)
            dweight -= delta[:, None] * outer(qf0, qf1, kf0, kf1, D1, PRECISION)
        drows = dot(dweight.to(OPERAND), tl.trans(columns.to(OPERAND)), drows, PRECISION)
    if NORMALIZE:
        # Once, on float32 sums, so that gradients enter products unrounded.
        drows *= inverse[:, None]
        scale *= inverse
    du0, du1 = du0 * scale[:, None], du1 * scale[:, None]
    if NORMALIZE and ROTARY:
        df0, df1 = df0 * scale[:, None], df1 * scale[:, None]
    if ROTARY:
        du0, du1 = rotate_pieces(du0, du1, cos_ptr, sin_ptr, q_tokens, q_valid, D, D0, D1, -1)
        du0 += df0
        du1 += df1
    dq0, dq1 = du0 * phi_grad(q0.to(tl.float32), FEATURE_MAP), du1
    if D1 > 0:
        dq1 = du1 * phi_grad(q1.to(tl.float32), FEATURE_MAP)
    store_pieces(dq_ptr, dq0, dq1, q_tokens, q_valid, dq_strides, D, D0, D1, ALIGN)
    blocks = tl.arange(0, BM)
    by_block = (blocks[:, None] == q_blocks[None, :]).to(tl.float32)
    if tl.float32 == OPERAND:
        dmixing = tl.dot(by_block, drows, input_precision=PRECISION)
    else:
        dmixing = tl.dot(by_block, drows, input_precision="tf32")
    tl.store(
        partial_ptr
        + tl.program_id(0).to(tl.int64) * (M * M)
        + blocks[:, None] * M
        + blocks[None, :],
        dmixing,
        mask=(blocks < M)[:, None] & (blocks < M)[None, :],
    )


@triton.jit
def attention_backward_keys_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    cos_ptr,
    sin_ptr,
    mixing_ptr,
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
    mixing_strides,
    box,
    seq_len,
    num_heads,
    D: tl.constexpr,
    V: tl.constexpr,
    M: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    BM: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    RANK: tl.constexpr,
    ALIGN: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    ROTARY: tl.constexpr,
    NORMALIZE: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients dk and dv of BK keys of one head, from all queries."""
    tiles = tl.cdiv(seq_len, BK)
    batch = (tl.program_id(0) // tiles // num_heads).to(tl.int64)
    head = tl.program_id(0) // tiles % num_heads
    q_ptr += head_offset(q_strides, batch, head, ALIGN)
    k_ptr += head_offset(k_strides, batch, head, ALIGN)
    v_ptr += head_offset(v_strides, batch, head, ALIGN)
    do_ptr += head_offset(do_strides, batch, head, ALIGN)
    dk_ptr += head_offset(dk_strides, batch, head, ALIGN)
    dv_ptr += head_offset(dv_strides, batch, head, ALIGN)
    mixing_ptr += head.to(tl.int64) * mixing_strides[0]

    k_rows = tl.program_id(0) % tiles * BK + tl.arange(0, BK)
    k_tokens, k_valid = k_rows.to(tl.int64), rows_exist(k_rows, seq_len, EVEN)
    k0, k1 = load_pieces(k_ptr, k_tokens, k_valid, k_strides, D, D0, D1, ALIGN)
    v0, v1 = load_pieces(v_ptr, k_tokens, k_valid, v_strides, V, V0, V1, ALIGN)
    v0, v1 = v0.to(OPERAND), v1.to(OPERAND)
    w0, w1, r0, r1, _f0, _f1 = features_of_pieces(
        k0, k1, cos_ptr, sin_ptr, k_tokens, k_valid, D, D0, D1, FEATURE_MAP, ROTARY, OPERAND, True
    )
    rows, scale = mixing_rows(
        mixing_ptr, block_of_tokens(k_rows, box, RANK), k_valid,
        mixing_strides[2], mixing_strides[1], M, BM, OPERAND,
    )  # fmt: skip
    dw0 = tl.zeros((BK, D0), tl.float32)
    dw1 = tl.zeros((BK, D1 if D1 > 0 else 1), tl.float32)
    df0, df1 = dw0, dw1
    dv0 = tl.zeros((BK, V0), tl.float32)
    dv1 = tl.zeros((BK, V1 if V1 > 0 else 1), tl.float32)
    for start in range(0, seq_len, BQ):
        q_rows = start + tl.arange(0, BQ)
        q_tokens, q_valid = q_rows.to(tl.int64), rows_exist(q_rows, seq_len, EVEN)
        q0, q1 = load_pieces(q_ptr, q_tokens, q_valid, q_strides, D, D0, D1, ALIGN)
        g0, g1 = load_pieces(do_ptr, q_tokens, q_valid, do_strides, V, V0, V1, ALIGN)
        g0, g1 = g0.to(OPERAND), g1.to(OPERAND)
        u0, u1, _r0, _r1, qf0, qf1 = features_of_pieces(
            q0, q1, cos_ptr, sin_ptr, q_tokens, q_valid, D, D0, D1,
            FEATURE_MAP, ROTARY, OPERAND, False,
        )  # fmt: skip
        q_blocks = tl.where(q_valid, block_of_tokens(q_rows, box, RANK), -1)
        # Transposed: [keys, queries].
        weight = dot(
            rows, one_hot_columns(q_blocks, BM, OPERAND), tl.zeros((BK, BQ), tl.float32), PRECISION
        )
        dscores = outer(v0, v1, g0, g1, V1, PRECISION)
        if NORMALIZE:
            scalars = (batch * num_heads + head) * seq_len + q_rows
            inverse = tl.load(inverse_ptr + scalars, mask=q_valid, other=0.0)
            delta = tl.load(delta_ptr + scalars, mask=q_valid, other=0.0)
            weight *= inverse[None, :]
            if ROTARY:
                dplain = (-delta[None, :] * weight).to(OPERAND)
                df0, df1 = add_times(dplain, qf0, qf1, df0, df1, D1, PRECISION)
            else:
                dscores -= delta[None, :]
        dw0, dw1 = add_times((dscores * weight).to(OPERAND), u0, u1, dw0, dw1, D1, PRECISION)
        scores = outer(w0, w1, u0, u1, D1, PRECISION)
        if ROTARY and tl.float32 != OPERAND:
            scores += outer(r0, r1, u0, u1, D1, PRECISION)
        scores *= weight
        dv0, dv1 = add_times(scores.to(OPERAND), g0, g1, dv0, dv1, V1, PRECISION)
    dw0, dw1 = dw0 * scale[:, None], dw1 * scale[:, None]
    dv0, dv1 = dv0 * scale[:, None], dv1 * scale[:, None]
    if ROTARY:
        df0, df1 = df0 * scale[:, None], df1 * scale[:, None]
        dw0, dw1 = rotate_pieces(dw0, dw1, cos_ptr, sin_ptr, k_tokens, k_valid, D, D0, D1, -1)
        dw0 += df0
        dw1 += df1
    dk0, dk1 = dw0 * phi_grad(k0.to(tl.float32), FEATURE_MAP), dw1
    if D1 > 0:
        dk1 = dw1 * phi_grad(k1.to(tl.float32), FEATURE_MAP)
    store_pieces(dk_ptr, dk0, dk1, k_tokens, k_valid, dk_strides, D, D0, D1, ALIGN)
    store_pieces(dv_ptr, dv0, dv1, k_tokens, k_valid, dv_strides, V, V0, V1, ALIGN)
