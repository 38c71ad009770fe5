"""Causal form, forward: summaries of earlier blocks, and scores within a query's own block.

Arguments as in `linear.py`, on one axis: `box` is (1, 1, tokens, 1, 1, blocks). `own` are the
diagonals of the mixing matrices, float32 `[heads or 1, blocks]`, and `own_stride` the entries from
one head to the next. Vectors of one number a token are float32 `[batch, num_heads, tokens]`.
"""

import triton
import triton.language as tl

from mhla_gen.ops.kernels.boxes import block_box, locate_part
from mhla_gen.ops.kernels.features import load_angles, phi, rotate
from mhla_gen.ops.kernels.pieces import (
    clear_padding,
    dot,
    head_offset,
    load_pieces,
    load_vector,
    scale_rows,
    store_pieces,
)
from mhla_gen.ops.kernels.summaries import load_summary


@triton.jit
def load_features(
    x_ptr, cos_ptr, sin_ptr, tokens, valid, strides, D: tl.constexpr, BD: tl.constexpr,
    ALIGN: tl.constexpr, FEATURE_MAP: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    """Rows of queries or keys: unchanged, φ of them, and φ rotated, float32 [BT, BD]."""
    x, _x = load_pieces(x_ptr, tokens, valid, strides, D, BD, 0, ALIGN)
    x = x.to(tl.float32)
    features = clear_padding(phi(x, FEATURE_MAP), D, 0)
    rotated = features
    if ROTARY:
        cos, sin = load_angles(cos_ptr, sin_ptr, tokens, valid, D, 0, BD)
        rotated = rotate(features, cos, sin)
    return x, features, rotated


@triton.jit
def load_rows(
    x_ptr, tokens, valid, strides, V: tl.constexpr, BV: tl.constexpr, ALIGN: tl.constexpr
):
    """Rows of values or of the output's gradient, [BT, BV]."""
    x, _x = load_pieces(x_ptr, tokens, valid, strides, V, BV, 0, ALIGN)
    return x


@triton.jit
def times_matrix(a, matrix, scale, PRECISION: tl.constexpr):
    """`a @ matrix · scale` in float32, for a stored summary (or its transpose) and its scale."""
    zeros = tl.zeros((a.shape[0], matrix.shape[1]), tl.float32)
    if matrix.dtype == tl.float16:
        scaled, _scaled, scales = scale_rows(a, a, 0)
        return dot(scaled, matrix, zeros, PRECISION) * (scales * scale)[:, None]
    else:
        return dot(a, matrix, zeros, PRECISION)


@triton.jit
def narrow(x, OPERAND: tl.constexpr):
    """Rows of a float32 tile as operands of scores, and their scales.

    With 16-bit inputs they are float16, eight times finer than bfloat16, whose rounding errors
    would add up to twice that of the output.
    """
    if tl.float32 == OPERAND:
        return x, tl.full((x.shape[0],), 1.0, tl.float32)
    else:
        scaled, _scaled, scales = scale_rows(x, x, 0)
        return scaled, scales


@triton.jit
def multiply_rows(a, a_scales, b, b_scales, PRECISION: tl.constexpr):
    """Products of all rows of `a` with all rows of `b`, both from `narrow`, in float32."""
    zeros = tl.zeros((a.shape[0], b.shape[0]), tl.float32)
    return dot(a, tl.trans(b), zeros, PRECISION) * (a_scales[:, None] * b_scales[None, :])


@triton.jit
def add_weighed(acc, weights, b, b_scales, PRECISION: tl.constexpr):
    """`acc + weights @ b` in float32, for rows `b` from `narrow`."""
    if b.dtype == tl.float16:
        weights *= b_scales[None, :]
        scaled, _scaled, scales = scale_rows(weights, weights, 0)
        zeros = tl.zeros(acc.shape, tl.float32)
        return acc + dot(scaled, b, zeros, PRECISION) * scales[:, None]
    else:
        return dot(weights, b, acc, PRECISION)


@triton.jit
def causal_apply_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    own_ptr,
    mixed_ptr,
    mixed_scales_ptr,
    mixed_key_sums_ptr,
    out_ptr,
    inverse_ptr,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    own_stride,
    box,
    num_heads,
    eps,
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
    """Output and inverse denominators of the queries of one block and head.

    Numerator uᵀ S̃ + m_ii Σ_{s ≤ n} (u·w_s) v_sᵀ, denominator φ(q)·z̃ + m_ii Σ φ(q)·φ(k_s) + eps.
    """
    _T, _H, W, _LT, _LH, LW = box
    batch, head, block, _block = locate_part(box, num_heads, 1, 1, GROUP)
    _t, _h, first, _size_t, _size_h, size = block_box(block, 1, 1, W, 1, 1, LW, 1)
    last = first + size
    q_ptr += head_offset(q_strides, batch, head, ALIGN)
    k_ptr += head_offset(k_strides, batch, head, ALIGN)
    v_ptr += head_offset(v_strides, batch, head, ALIGN)
    out_ptr += head_offset(out_strides, batch, head, ALIGN)
    inverse_ptr += (batch * num_heads + head) * W

    own = tl.load(own_ptr + head * own_stride + block)
    matrix = (batch * LW + block) * num_heads + head
    for start in range(first, last, BT):
        rows = start + tl.arange(0, BT)
        valid = rows < last
        tokens = rows.to(tl.int64)
        # Loaded again for every tile of queries, since registers are the scarcest resource.
        mixed, _s01, _s10, _s11, mixed_scale = load_summary(
            mixed_ptr, mixed_scales_ptr, matrix, D, V, BD, 0, BV, 0
        )
        _q, features, rotated = load_features(
            q_ptr, cos_ptr, sin_ptr, tokens, valid, q_strides, D, BD, ALIGN, FEATURE_MAP, ROTARY
        )
        out = times_matrix(rotated, mixed, mixed_scale, PRECISION)
        denominators = tl.full((BT,), eps, tl.float32)
        if NORMALIZE:
            key_sum = load_vector(mixed_key_sums_ptr + matrix * D, D, 0, BD)[None, :]
            denominators += tl.sum(features * key_sum, axis=1)
        queries, query_scales = narrow(rotated, OPERAND)
        plain, plain_scales = narrow(features, OPERAND)
        for key_start in range(first, start + 1, BT):
            columns = key_start + tl.arange(0, BT)
            present = columns < last
            key_tokens = columns.to(tl.int64)
            _k, key_features, key_rotated = load_features(
                k_ptr, cos_ptr, sin_ptr, key_tokens, present, k_strides, D, BD, ALIGN,
                FEATURE_MAP, ROTARY,
            )  # fmt: skip
            read = (columns[None, :] <= rows[:, None]) & present[None, :]
            weights = tl.where(read, own, 0.0)
            keys, key_scales = narrow(key_rotated, OPERAND)
            scores = multiply_rows(queries, query_scales, keys, key_scales, PRECISION) * weights
            values = load_rows(v_ptr, key_tokens, present, v_strides, V, BV, ALIGN)
            values, value_scales = narrow(values.to(tl.float32), OPERAND)
            out = add_weighed(out, scores, values, value_scales, PRECISION)
            if NORMALIZE:
                if ROTARY:
                    keys, key_scales = narrow(key_features, OPERAND)
                    scores = multiply_rows(plain, plain_scales, keys, key_scales, PRECISION)
                    scores *= weights
                denominators += tl.sum(scores, axis=1)
        if NORMALIZE:
            # Avoid 0 / 0 past the end.
            inverse = 1 / tl.where(valid, denominators, 1.0)
            out *= inverse[:, None]
            tl.store(inverse_ptr + rows, inverse, mask=valid)
        store_pieces(out_ptr, out, out, tokens, valid, out_strides, V, BV, 0, ALIGN)
