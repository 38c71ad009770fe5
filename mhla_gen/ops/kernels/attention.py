"""Attention form: `((φ(Q) φ(K)ᵀ) ∘ m[block(q), block(k)]) V`, scores in registers only.

The weight tile m[block(q), block(k)] is a matrix product too: one-hot rows of query blocks times
the columns of m gathered by key. It lands in the layout of the scores, where a gather would not.
"""

import triton
import triton.language as tl

from mhla_gen.ops.kernels.common import (
    block_of_tokens,
    load_angles,
    phi,
    phi_grad,
    rotate,
    tile_mask,
    tile_offsets,
)
from mhla_gen.ops.kernels.linear import dot


@triton.jit
def one_hot(blocks, BM: tl.constexpr, OPERAND: tl.constexpr):
    """Rows [tokens, BM] with a one at each token's block."""
    return (blocks[:, None] == tl.arange(0, BM)[None, :]).to(OPERAND)


@triton.jit
def weights(rows, m, OPERAND: tl.constexpr):
    """`rows @ m` for one-hot rows and float32 `m`, exact to 16 bits at least."""
    zeros = tl.zeros((rows.shape[0], m.shape[1]), tl.float32)
    high = m.to(OPERAND)
    out = dot(rows, high, zeros, "tf32x3")
    if high.dtype != tl.float32:
        out = dot(rows, (m - high.to(tl.float32)).to(OPERAND), out, "tf32x3")
    return out


@triton.jit
def load_tile(
    x_ptr, tokens, valid, strides, D: tl.constexpr, BD: tl.constexpr, ALIGN: tl.constexpr
):
    """Rows `tokens` of one batch element and head, [tokens, BD]; 0 outside."""
    offsets = tile_offsets(tokens, strides[1], strides[3], BD, ALIGN)
    return tl.load(x_ptr + offsets, tile_mask(valid, D, BD), other=0.0)


@triton.jit
def load_features(
    x_ptr,
    cos_ptr,
    sin_ptr,
    tokens,
    valid,
    strides,
    D: tl.constexpr,
    BD: tl.constexpr,
    ALIGN: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    ROTARY: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """x, R(φ(x)) and φ(x) of a tile, [tokens, BD]."""
    x = load_tile(x_ptr, tokens, valid, strides, D, BD, ALIGN).to(tl.float32)
    features = tl.where(tile_mask(valid, D, BD), phi(x, FEATURE_MAP), 0.0)
    rotated = features
    if ROTARY:
        cos, sin = load_angles(cos_ptr, sin_ptr, tokens, valid, D, BD)
        rotated = rotate(features, cos, sin)
    return x, rotated.to(OPERAND), features.to(OPERAND)


@triton.jit
def head_offset(strides, batch, head, ALIGN: tl.constexpr):
    """Elements from the start of a tensor to its first token of `batch` and `head`."""
    return tl.multiple_of(batch * strides[0] + head.to(tl.int64) * strides[2], ALIGN)


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
    BD: tl.constexpr,
    BV: tl.constexpr,
    BM: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    RANK: tl.constexpr,
    ALIGN: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    ROTARY: tl.constexpr,
    NORMALIZE: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Output and 1 / denominator [batch, num_heads, seq_len] of BQ queries of one head."""
    T, H, W, LT, LH, LW = box
    tiles = tl.cdiv(seq_len, BQ)
    batch = (tl.program_id(0) // tiles // num_heads).to(tl.int64)
    head = tl.program_id(0) // tiles % num_heads
    q_ptr += head_offset(q_strides, batch, head, ALIGN)
    k_ptr += head_offset(k_strides, batch, head, ALIGN)
    v_ptr += head_offset(v_strides, batch, head, ALIGN)
    out_ptr += head_offset(out_strides, batch, head, ALIGN)
    mixing_ptr += head.to(tl.int64) * mixing_strides[0]

    q_tokens = tl.program_id(0) % tiles * BQ + tl.arange(0, BQ)
    q_valid = q_tokens < seq_len
    _q, u, q_features = load_features(
        q_ptr, cos_ptr, sin_ptr, q_tokens.to(tl.int64), q_valid, q_strides,
        D, BD, ALIGN, FEATURE_MAP, ROTARY, OPERAND,
    )  # fmt: skip
    q_rows = one_hot(block_of_tokens(q_tokens, H, W, T, LT, LH, LW, RANK), BM, OPERAND)
    m_rows = tl.arange(0, BM)
    out = tl.zeros((BQ, BV), tl.float32)
    denominators = tl.zeros((BQ,), tl.float32)
    for start in range(0, seq_len, BK):
        k_tokens = start + tl.arange(0, BK)
        k_valid = k_tokens < seq_len
        _k, w, k_features = load_features(
            k_ptr, cos_ptr, sin_ptr, k_tokens.to(tl.int64), k_valid, k_strides,
            D, BD, ALIGN, FEATURE_MAP, ROTARY, OPERAND,
        )  # fmt: skip
        v = load_tile(v_ptr, k_tokens.to(tl.int64), k_valid, v_strides, V, BV, ALIGN).to(OPERAND)
        k_blocks = block_of_tokens(k_tokens, H, W, T, LT, LH, LW, RANK)
        m = tl.load(
            mixing_ptr
            + m_rows[:, None] * mixing_strides[1]
            + k_blocks[None, :] * mixing_strides[2],
            mask=(m_rows < M)[:, None] & k_valid[None, :],
            other=0.0,
        ).to(tl.float32)
        weight = weights(q_rows, m, OPERAND)
        zeros = tl.zeros((BQ, BK), tl.float32)
        scores = dot(u, tl.trans(w), zeros, PRECISION) * weight
        if NORMALIZE:
            if ROTARY:
                plain = dot(q_features, tl.trans(k_features), zeros, PRECISION) * weight
                denominators += tl.sum(plain, axis=1)
            else:
                denominators += tl.sum(scores, axis=1)
        out = dot(scores.to(OPERAND), v, out, PRECISION)
    if NORMALIZE:
        inverse = 1 / tl.where(q_valid, denominators + eps, 1.0)
        out = out * inverse[:, None]
        tl.store(
            inverse_ptr + (batch * num_heads + head) * seq_len + q_tokens, inverse, mask=q_valid
        )
    tl.store(
        out_ptr + tile_offsets(q_tokens.to(tl.int64), out_strides[1], out_strides[3], BV, ALIGN),
        out.to(out_ptr.dtype.element_ty),
        mask=tile_mask(q_valid, V, BV),
    )


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
    BD: tl.constexpr,
    BV: tl.constexpr,
    BM: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    RANK: tl.constexpr,
    ALIGN: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    ROTARY: tl.constexpr,
    NORMALIZE: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients dq and δ of BQ queries, and their share of the mixing's gradient.

    The share goes to `partial` [batch, num_heads, query tiles, M, M].
    """
    T, H, W, LT, LH, LW = box
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

    q_tokens = tl.program_id(0) % tiles * BQ + tl.arange(0, BQ)
    q_rows64 = q_tokens.to(tl.int64)
    q_valid = q_tokens < seq_len
    q, u, q_features = load_features(
        q_ptr, cos_ptr, sin_ptr, q_rows64, q_valid, q_strides,
        D, BD, ALIGN, FEATURE_MAP, ROTARY, OPERAND,
    )  # fmt: skip
    grad = load_tile(do_ptr, q_rows64, q_valid, do_strides, V, BV, ALIGN).to(tl.float32)
    if NORMALIZE:
        scalars = (batch * num_heads + head) * seq_len + q_tokens
        inverse = tl.load(inverse_ptr + scalars, mask=q_valid, other=0.0)
        grad *= inverse[:, None]
        out = load_tile(out_ptr, q_rows64, q_valid, out_strides, V, BV, ALIGN).to(tl.float32)
        delta = tl.sum(grad * out, axis=1)
        tl.store(delta_ptr + scalars, delta, mask=q_valid)
    grad = grad.to(OPERAND)
    q_rows = one_hot(block_of_tokens(q_tokens, H, W, T, LT, LH, LW, RANK), BM, OPERAND)
    m_rows = tl.arange(0, BM)
    du = tl.zeros((BQ, BD), tl.float32)
    dfeatures = tl.zeros((BQ, BD), tl.float32)
    dmixing = tl.zeros((BM, BM), tl.float32)
    for start in range(0, seq_len, BK):
        k_tokens = start + tl.arange(0, BK)
        k_valid = k_tokens < seq_len
        _k, w, k_features = load_features(
            k_ptr, cos_ptr, sin_ptr, k_tokens.to(tl.int64), k_valid, k_strides,
            D, BD, ALIGN, FEATURE_MAP, ROTARY, OPERAND,
        )  # fmt: skip
        v = load_tile(v_ptr, k_tokens.to(tl.int64), k_valid, v_strides, V, BV, ALIGN).to(OPERAND)
        k_blocks = block_of_tokens(k_tokens, H, W, T, LT, LH, LW, RANK)
        m = tl.load(
            mixing_ptr
            + m_rows[:, None] * mixing_strides[1]
            + k_blocks[None, :] * mixing_strides[2],
            mask=(m_rows < M)[:, None] & k_valid[None, :],
            other=0.0,
        ).to(tl.float32)
        weight = weights(q_rows, m, OPERAND)
        zeros = tl.zeros((BQ, BK), tl.float32)
        dscores = dot(grad, tl.trans(v), zeros, PRECISION)
        if NORMALIZE and not ROTARY:
            dscores -= delta[:, None]
        du = dot((dscores * weight).to(OPERAND), w, du, PRECISION)
        dweight = dscores * dot(u, tl.trans(w), zeros, PRECISION)
        if NORMALIZE and ROTARY:
            dfeatures = dot(
                (-delta[:, None] * weight).to(OPERAND), k_features, dfeatures, PRECISION
            )
            plain = dot(q_features, tl.trans(k_features), zeros, PRECISION)
            dweight -= delta[:, None] * plain
        by_block = dot(
            tl.trans(q_rows), dweight.to(OPERAND), tl.zeros((BM, BK), tl.float32), PRECISION
        )
        dmixing = dot(by_block.to(OPERAND), one_hot(k_blocks, BM, OPERAND), dmixing, PRECISION)
    if ROTARY:
        cos, sin = load_angles(cos_ptr, sin_ptr, q_rows64, q_valid, D, BD)
        du = rotate(du, cos, -sin) + dfeatures
    tl.store(
        dq_ptr + tile_offsets(q_rows64, dq_strides[1], dq_strides[3], BD, ALIGN),
        (du * phi_grad(q, FEATURE_MAP)).to(dq_ptr.dtype.element_ty),
        mask=tile_mask(q_valid, D, BD),
    )
    partial_ptr += tl.program_id(0).to(tl.int64) * (M * M)
    tl.store(
        partial_ptr + m_rows[:, None] * M + m_rows[None, :],
        dmixing,
        mask=(m_rows < M)[:, None] & (m_rows < M)[None, :],
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
    BD: tl.constexpr,
    BV: tl.constexpr,
    BM: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    RANK: tl.constexpr,
    ALIGN: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    ROTARY: tl.constexpr,
    NORMALIZE: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients dk and dv of BK keys of one head, from all queries."""
    T, H, W, LT, LH, LW = box
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

    k_tokens = tl.program_id(0) % tiles * BK + tl.arange(0, BK)
    k_rows64 = k_tokens.to(tl.int64)
    k_valid = k_tokens < seq_len
    k, w, _k_features = load_features(
        k_ptr, cos_ptr, sin_ptr, k_rows64, k_valid, k_strides,
        D, BD, ALIGN, FEATURE_MAP, ROTARY, OPERAND,
    )  # fmt: skip
    v = load_tile(v_ptr, k_rows64, k_valid, v_strides, V, BV, ALIGN).to(OPERAND)
    k_rows = one_hot(block_of_tokens(k_tokens, H, W, T, LT, LH, LW, RANK), BM, OPERAND)
    m_columns = tl.arange(0, BM)
    dw = tl.zeros((BK, BD), tl.float32)
    dfeatures = tl.zeros((BK, BD), tl.float32)
    dv = tl.zeros((BK, BV), tl.float32)
    for start in range(0, seq_len, BQ):
        q_tokens = start + tl.arange(0, BQ)
        q_rows64 = q_tokens.to(tl.int64)
        q_valid = q_tokens < seq_len
        _q, u, q_features = load_features(
            q_ptr, cos_ptr, sin_ptr, q_rows64, q_valid, q_strides,
            D, BD, ALIGN, FEATURE_MAP, ROTARY, OPERAND,
        )  # fmt: skip
        grad = load_tile(do_ptr, q_rows64, q_valid, do_strides, V, BV, ALIGN)
        if NORMALIZE:
            scalars = (batch * num_heads + head) * seq_len + q_tokens
            inverse = tl.load(inverse_ptr + scalars, mask=q_valid, other=0.0)
            delta = tl.load(delta_ptr + scalars, mask=q_valid, other=0.0)
            grad = grad.to(tl.float32) * inverse[:, None]
        grad = grad.to(OPERAND)
        q_blocks = block_of_tokens(q_tokens, H, W, T, LT, LH, LW, RANK)
        m = tl.load(
            mixing_ptr
            + q_blocks[None, :] * mixing_strides[1]
            + m_columns[:, None] * mixing_strides[2],
            mask=(m_columns < M)[:, None] & q_valid[None, :],
            other=0.0,
        ).to(tl.float32)
        weight = weights(k_rows, m, OPERAND)  # transposed: [keys, queries]
        zeros = tl.zeros((BK, BQ), tl.float32)
        scores = dot(w, tl.trans(u), zeros, PRECISION) * weight
        dv = dot(scores.to(OPERAND), grad, dv, PRECISION)
        dscores = dot(v, tl.trans(grad), zeros, PRECISION)
        if NORMALIZE and not ROTARY:
            dscores -= delta[None, :]
        dw = dot((dscores * weight).to(OPERAND), u, dw, PRECISION)
        if NORMALIZE and ROTARY:
            dfeatures = dot(
                (-delta[None, :] * weight).to(OPERAND), q_features, dfeatures, PRECISION
            )
    if ROTARY:
        cos, sin = load_angles(cos_ptr, sin_ptr, k_rows64, k_valid, D, BD)
        dw = rotate(dw, cos, -sin) + dfeatures
    tl.store(
        dk_ptr + tile_offsets(k_rows64, dk_strides[1], dk_strides[3], BD, ALIGN),
        (dw * phi_grad(k, FEATURE_MAP)).to(dk_ptr.dtype.element_ty),
        mask=tile_mask(k_valid, D, BD),
    )
    tl.store(
        dv_ptr + tile_offsets(k_rows64, dv_strides[1], dv_strides[3], BV, ALIGN),
        dv.to(dv_ptr.dtype.element_ty),
        mask=tile_mask(k_valid, V, BV),
    )
