"""Attention form: `((φ(Q) φ(K)ᵀ) ∘ m[block(q), block(k)]) V`, scores in registers only.

The weight tile m[block(q), block(k)] is also a matrix product: rows m[block(q), :], gathered once
per program, times one-hot columns of key blocks. Unlike a gather, it has the layout of the scores.
`EVEN` means that tiles divide the sequence, so that none needs a mask.
"""

import triton
import triton.language as tl

from mhla_gen.ops.kernels.boxes import block_of_tokens
from mhla_gen.ops.kernels.features import features, phi
from mhla_gen.ops.kernels.linear import rotate_pieces
from mhla_gen.ops.kernels.pieces import (
    TINY,
    clear_padding,
    dot,
    head_offset,
    load_pieces,
    rows_exist,
    store_pieces,
)


@triton.jit
def one_hot_columns(blocks, BM: tl.constexpr, OPERAND: tl.constexpr):
    """Columns [BM, tokens] with a one at each token's block, none at block -1."""
    WEIGHT: tl.constexpr = tl.float32 if tl.float32 == OPERAND else tl.float16
    return (tl.arange(0, BM)[:, None] == blocks[None, :]).to(WEIGHT)


@triton.jit
def mixing_rows(
    mixing_ptr, blocks, valid, stride, stride_other, M: tl.constexpr, BM: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    """m[block, :] of every token as a row [tokens, BM] times a scale [tokens].

    Rows are float16 next to 16-bit operands, with eight times the resolution of bfloat16; the scale
    keeps them in range.
    """
    others = tl.arange(0, BM)
    m = tl.load(
        mixing_ptr + blocks[:, None] * stride + others[None, :] * stride_other,
        mask=valid[:, None] & (others < M)[None, :],
        other=0.0,
    ).to(tl.float32)
    scale = tl.full((blocks.shape[0],), 1.0, tl.float32)
    if tl.float32 != OPERAND:
        largest = tl.max(tl.abs(m), axis=1)
        scale = tl.where(largest > TINY, largest, 1.0)
        m = (m * (1 / scale)[:, None]).to(tl.float16)
    return m, scale


@triton.jit
def features_of_pieces(
    x0, x1, cos_ptr, sin_ptr, tokens, valid, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    FEATURE_MAP: tl.constexpr, ROTARY: tl.constexpr, OPERAND: tl.constexpr, CLEAR: tl.constexpr,
):  # fmt: skip
    """R(φ(x)), what rounding took from it, and φ(x), two pieces each.

    With `CLEAR`, channels that do not exist are 0.
    """
    f0, f1 = features(x0, FEATURE_MAP, OPERAND), features(x1, FEATURE_MAP, OPERAND)
    if CLEAR:
        f0 = clear_padding(f0, D, 0).to(OPERAND)
        if D1 > 0:
            f1 = clear_padding(f1, D, D0).to(OPERAND)
    u0, u1, r0, r1 = f0, f1, f0, f1
    if ROTARY:
        exact0, exact1 = phi(x0.to(tl.float32), FEATURE_MAP), phi(x1.to(tl.float32), FEATURE_MAP)
        if CLEAR:
            exact0 = clear_padding(exact0, D, 0)
            if D1 > 0:
                exact1 = clear_padding(exact1, D, D0)
        exact0, exact1 = rotate_pieces(
            exact0, exact1, cos_ptr, sin_ptr, tokens, valid, D, D0, D1, 1
        )
        u0, u1 = exact0.to(OPERAND), exact1.to(OPERAND)
        r0 = (exact0 - u0.to(tl.float32)).to(OPERAND)
        r1 = (exact1 - u1.to(tl.float32)).to(OPERAND)
    return u0, u1, r0, r1, f0, f1


@triton.jit
def outer(a0, a1, b0, b1, SECOND: tl.constexpr, PRECISION: tl.constexpr):
    """`a bᵀ` of two tiles in pieces."""
    out = tl.zeros((a0.shape[0], b0.shape[0]), tl.float32)
    out = dot(a0, tl.trans(b0), out, PRECISION)
    if SECOND > 0:
        out = dot(a1, tl.trans(b1), out, PRECISION)
    return out


@triton.jit
def add_times(a, b0, b1, acc0, acc1, SECOND: tl.constexpr, PRECISION: tl.constexpr):
    """Both pieces of `acc + a b`."""
    acc0 = dot(a, b0, acc0, PRECISION)
    if SECOND > 0:
        acc1 = dot(a, b1, acc1, PRECISION)
    return acc0, acc1


@triton.jit
def attend_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    mixing_ptr,
    out_ptr,
    inverse_ptr,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    mixing_strides,
    box,
    seq_len,
    num_heads,
    eps,
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
    """Output and 1 / denominator [batch, num_heads, seq_len] of BQ queries of one head."""
    tiles = tl.cdiv(seq_len, BQ)
    batch = (tl.program_id(0) // tiles // num_heads).to(tl.int64)
    head = tl.program_id(0) // tiles % num_heads
    q_ptr += head_offset(q_strides, batch, head, ALIGN)
    k_ptr += head_offset(k_strides, batch, head, ALIGN)
    v_ptr += head_offset(v_strides, batch, head, ALIGN)
    out_ptr += head_offset(out_strides, batch, head, ALIGN)
    mixing_ptr += head.to(tl.int64) * mixing_strides[0]

    q_rows = tl.program_id(0) % tiles * BQ + tl.arange(0, BQ)
    q_tokens, q_valid = q_rows.to(tl.int64), rows_exist(q_rows, seq_len, EVEN)
    q0, q1 = load_pieces(q_ptr, q_tokens, q_valid, q_strides, D, D0, D1, ALIGN)
    u0, u1, r0, r1, qf0, qf1 = features_of_pieces(
        q0, q1, cos_ptr, sin_ptr, q_tokens, q_valid, D, D0, D1, FEATURE_MAP, ROTARY, OPERAND, True
    )
    rows, scale = mixing_rows(
        mixing_ptr, block_of_tokens(q_rows, box, RANK), q_valid,
        mixing_strides[1], mixing_strides[2], M, BM, OPERAND,
    )  # fmt: skip
    out0 = tl.zeros((BQ, V0), tl.float32)
    out1 = tl.zeros((BQ, V1 if V1 > 0 else 1), tl.float32)
    denominators = tl.zeros((BQ,), tl.float32)
    for start in range(0, seq_len, BK):
        k_rows = start + tl.arange(0, BK)
        k_tokens, k_valid = k_rows.to(tl.int64), rows_exist(k_rows, seq_len, EVEN)
        k0, k1 = load_pieces(k_ptr, k_tokens, k_valid, k_strides, D, D0, D1, ALIGN)
        v0, v1 = load_pieces(v_ptr, k_tokens, k_valid, v_strides, V, V0, V1, ALIGN)
        w0, w1, _r0, _r1, kf0, kf1 = features_of_pieces(
            k0, k1, cos_ptr, sin_ptr, k_tokens, k_valid, D, D0, D1,
            FEATURE_MAP, ROTARY, OPERAND, False,
        )  # fmt: skip
        # Keys past the end have no block, so their weights are 0.
        k_blocks = tl.where(k_valid, block_of_tokens(k_rows, box, RANK), -1)
        weight = dot(
            rows, one_hot_columns(k_blocks, BM, OPERAND), tl.zeros((BQ, BK), tl.float32), PRECISION
        )
        scores = outer(u0, u1, w0, w1, D1, PRECISION)
        if ROTARY and tl.float32 != OPERAND:
            # Rotation rounds queries and keys; rounding the scores as well would lose too much.
            scores += outer(r0, r1, w0, w1, D1, PRECISION)
        scores *= weight
        if NORMALIZE:
            if ROTARY:
                plain = outer(qf0, qf1, kf0, kf1, D1, PRECISION) * weight
                denominators += tl.sum(plain, axis=1)
            else:
                denominators += tl.sum(scores, axis=1)
        out0, out1 = add_times(
            scores.to(OPERAND), v0.to(OPERAND), v1.to(OPERAND), out0, out1, V1, PRECISION
        )
    if NORMALIZE:
        inverse = 1 / tl.where(q_valid, denominators * scale + eps, 1.0)
        scalars = (batch * num_heads + head) * seq_len + q_rows
        tl.store(inverse_ptr + scalars, inverse, mask=q_valid)
        scale *= inverse
    out0, out1 = out0 * scale[:, None], out1 * scale[:, None]
    store_pieces(out_ptr, out0, out1, q_tokens, q_valid, out_strides, V, V0, V1, ALIGN)
