"""Linear form, forward: summarise keys, mix summaries (`mixing.py`), apply them to queries.

`box` is (T, H, W, LT, LH, LW): the token grid and the blocks along each axis, ones in front where
`RANK` is less than three. Strides are those of [batch, seq_len, num_heads, channels].
`window` is None, or tells which tokens of the grid this process holds (`boxes.held_box`).
"""

import triton
import triton.language as tl

from mhla_gen.ops.kernels.boxes import box_tokens, held_box, in_window, locate_part, part_slots
from mhla_gen.ops.kernels.features import load_angles, phi, rotate
from mhla_gen.ops.kernels.pieces import (
    clear_padding,
    head_offset,
    load_pieces,
    load_vector,
    scale_rows,
    store_pieces,
    store_vector,
    sum_waves,
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
def rotate_pieces(
    x0, x1, cos_ptr, sin_ptr, tokens, valid, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    SIGN: tl.constexpr,
):  # fmt: skip
    """Both pieces rotated, or rotated back with SIGN = -1."""
    cos, sin = load_angles(cos_ptr, sin_ptr, tokens, valid, D, 0, D0)
    x0 = rotate(x0, cos, SIGN * sin)
    if D1 > 0:
        cos, sin = load_angles(cos_ptr, sin_ptr, tokens, valid, D, D0, D1)
        x1 = rotate(x1, cos, SIGN * sin)
    return x0, x1


@triton.jit
def summarise_kernel(
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    summaries_ptr,
    scales_ptr,
    key_sums_ptr,
    k_strides,
    v_strides,
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
    SPARE: tl.constexpr,
    ONE_TILE: tl.constexpr,
    WAVE: tl.constexpr,
    RANK: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGN: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    ROTARY: tl.constexpr,
    NORMALIZE: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """S = Σ R(φ(k)) vᵀ and z = Σ φ(k) over one part of one block: one program a part and head."""
    _T, H, W, LT, LH, LW = box
    batch, head, row, block = locate_part(box, num_heads, num_parts, RANK, GROUP)
    first_t, first_h, first_w, size_t, size_h, size_w = held_box(block, box, window, RANK)
    first, last = part_slots(row, num_parts, size_t * size_h * size_w, BT)
    k_ptr += head_offset(k_strides, batch, head, ALIGN)
    v_ptr += head_offset(v_strides, batch, head, ALIGN)

    # Where values leave a column to spare, ones in it make z by the same products.
    is_spare = (tl.arange(0, V1 if V1 > 0 else V0) == V - V0)[None, :]
    s00, s01, t10, s11 = no_summary(D0, D1, V0, V1)
    z0 = tl.zeros((WAVE, D0), tl.float32)
    z1 = z0
    if D1 > 0:
        z1 = tl.zeros((WAVE, D1), tl.float32)
    for tile in range(0, 1 if ONE_TILE else tl.cdiv(last - first, BT)):
        slots = first + tile * BT + tl.arange(0, BT)
        valid = slots < last
        tokens = box_tokens(slots, first_t, first_h, first_w, size_h, size_w, H, W, RANK)
        tokens, valid = in_window(tokens, valid, window)
        k0, k1 = load_pieces(k_ptr, tokens, valid, k_strides, D, D0, D1, ALIGN)
        v0, v1 = load_pieces(v_ptr, tokens, valid, v_strides, V, V0, V1, ALIGN)
        # Rows past the end hold φ(0), which their values of 0 keep out of the summary.
        f0 = phi(k0.to(tl.float32), FEATURE_MAP)
        f1 = f0
        if D1 > 0:
            f1 = phi(k1.to(tl.float32), FEATURE_MAP)
        if NORMALIZE and not SPARE:
            z0 += sum_waves(tl.where(valid[:, None], f0, 0.0), WAVE)
            if D1 > 0:
                z1 += sum_waves(tl.where(valid[:, None], f1, 0.0), WAVE)
        if ROTARY:
            f0, f1 = rotate_pieces(f0, f1, cos_ptr, sin_ptr, tokens, valid, D, D0, D1, 1)
        f0, f1, v0, v1 = f0.to(OPERAND), f1.to(OPERAND), v0.to(OPERAND), v1.to(OPERAND)
        if SPARE:
            v1 = tl.where(is_spare & valid[:, None], tl.full((BT, V1), 1.0, OPERAND), v1)
        s00, s01, t10, s11 = add_outer(f0, f1, v0, v1, s00, s01, t10, s11, D1, V1, PRECISION)

    matrix = (batch * (LT * LH * LW * num_parts) + row) * num_heads + head
    if NORMALIZE:
        if SPARE:
            z0, z1, s01, s11 = take_column(s01, s11, is_spare, D1)
        else:
            z0, z1 = tl.sum(z0, axis=0), tl.sum(z1, axis=0)
        key_sums_ptr += matrix * D
        store_vector(key_sums_ptr, z0, D, 0)
        if D1 > 0:
            store_vector(key_sums_ptr, z1, D, D0)
    # After the key sums: in the other order it takes 123 registers instead of 96 for 72 channels.
    store_summary(summaries_ptr, scales_ptr, matrix, s00, s01, t10, s11, D, V, D0, D1, V0, V1)


@triton.jit
def apply_kernel(
    q_ptr,
    cos_ptr,
    sin_ptr,
    mixed_ptr,
    mixed_scales_ptr,
    mixed_key_sums_ptr,
    out_ptr,
    q_strides,
    out_strides,
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
    """Output o = R(φ(q))ᵀ S̃ / (φ(q)ᵀ z̃ + eps) for the queries of one part of one block and head."""
    _T, H, W, LT, LH, LW = box
    batch, head, row, block = locate_part(box, num_heads, num_parts, RANK, GROUP)
    first_t, first_h, first_w, size_t, size_h, size_w = held_box(block, box, window, RANK)
    first, last = part_slots(row, num_parts, size_t * size_h * size_w, BT)
    q_ptr += head_offset(q_strides, batch, head, ALIGN)
    out_ptr += head_offset(out_strides, batch, head, ALIGN)

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
    for tile in range(0, 1 if ONE_TILE else tl.cdiv(last - first, BT)):
        slots = first + tile * BT + tl.arange(0, BT)
        valid = slots < last
        tokens = box_tokens(slots, first_t, first_h, first_w, size_h, size_w, H, W, RANK)
        tokens, valid = in_window(tokens, valid, window)
        q0, q1 = load_pieces(q_ptr, tokens, valid, q_strides, D, D0, D1, ALIGN)
        f0 = clear_padding(phi(q0.to(tl.float32), FEATURE_MAP), D, 0)
        f1 = f0
        if D1 > 0:
            f1 = clear_padding(phi(q1.to(tl.float32), FEATURE_MAP), D, D0)
        if NORMALIZE:
            denominators = tl.sum(f0 * z0, axis=1) + eps
            if D1 > 0:
                denominators += tl.sum(f1 * z1, axis=1)
        if ROTARY:
            f0, f1 = rotate_pieces(f0, f1, cos_ptr, sin_ptr, tokens, valid, D, D0, D1, 1)
        factors = tl.full((BT,), mixed_scale, tl.float32)
        if mixed_ptr.dtype.element_ty == tl.float16:
            f0, f1, scales = scale_rows(f0, f1, D1)
            factors = scales * mixed_scale
        out0, out1 = times_summary(f0, f1, s00, s01, s10, s11, D1, V1, PRECISION)
        if NORMALIZE:
            factors = factors / denominators
        out0, out1 = out0 * factors[:, None], out1 * factors[:, None]
        store_pieces(out_ptr, out0, out1, tokens, valid, out_strides, V, V0, V1, ALIGN)
