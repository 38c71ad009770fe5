"""Linear form, forward: summarise keys, mix summaries, apply them to queries.

`box` is (T, H, W, LT, LH, LW): the token grid and the blocks along each axis, ones in front where
`RANK` is less than three. Strides are those of [batch, seq_len, num_heads, channels]. Programs of
neighbouring heads are neighbours in the launch grid, so that they share rotary tables in L2.

Summaries are stored [batch, parts of blocks, num_heads, D, V]. In float16 they carry one float32
scale per matrix (`scales`), which keeps them in range whatever the inputs are.
"""

import triton
import triton.language as tl

from mhla_gen.ops.kernels.common import (
    TINY,
    block_box,
    box_tokens,
    load_angles,
    matrix_mask,
    part_of_block,
    phi,
    rotate,
    scale_rows,
    tile_mask,
    tile_offsets,
)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """`a @ b + acc` in float32. `PRECISION` says how float32 operands are multiplied."""
    if a.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision=PRECISION)
    else:
        return tl.dot(a, b, acc)


@triton.jit
def store_summary(
    summary,
    summaries_ptr,
    scales_ptr,
    matrix,
    D: tl.constexpr,
    V: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
):
    """Write the float32 tile `summary` [BD, BV] as matrix number `matrix` (int64)."""
    if summaries_ptr.dtype.element_ty == tl.float16:
        scale = tl.max(tl.max(tl.abs(summary), axis=1), axis=0)
        scale = tl.where(scale > TINY, scale, 1.0)
        summary = summary * (1.0 / scale)
        tl.store(scales_ptr + matrix, scale)
    offsets = tl.arange(0, BD)[:, None] * V + tl.arange(0, BV)[None, :]
    tl.store(
        summaries_ptr + matrix * (D * V) + offsets,
        summary.to(summaries_ptr.dtype.element_ty),
        mask=matrix_mask(D, V, BD, BV),
    )


@triton.jit
def load_summary(
    summaries_ptr,
    scales_ptr,
    matrix,
    D: tl.constexpr,
    V: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
):
    """Matrix number `matrix` as stored [BD, BV], and its scale (1 if not float16)."""
    offsets = tl.arange(0, BD)[:, None] * V + tl.arange(0, BV)[None, :]
    summary = tl.load(
        summaries_ptr + matrix * (D * V) + offsets, mask=matrix_mask(D, V, BD, BV), other=0.0
    )
    scale = 1.0
    if summaries_ptr.dtype.element_ty == tl.float16:
        scale = tl.load(scales_ptr + matrix)
    return summary, scale


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
    """S = Σ R(φ(k)) vᵀ and z = Σ φ(k) over one part of one block: one program a part and head."""
    T, H, W, LT, LH, LW = box
    matrix = tl.program_id(0).to(tl.int64)
    head = tl.program_id(0) % num_heads
    row = tl.program_id(0) // num_heads
    num_rows = LT * LH * LW * num_parts
    batch = (row // num_rows).to(tl.int64)
    part = row % num_rows
    t0, h0, w0, size_t, size_h, size_w = block_box(part // num_parts, T, H, W, LT, LH, LW, RANK)
    first, last = part_of_block(part % num_parts, num_parts, size_t * size_h * size_w, BT)
    k_ptr += tl.multiple_of(batch * k_strides[0] + head.to(tl.int64) * k_strides[2], ALIGN)
    v_ptr += tl.multiple_of(batch * v_strides[0] + head.to(tl.int64) * v_strides[2], ALIGN)

    summary = tl.zeros((BD, BV), tl.float32)
    key_sum = tl.zeros((BD,), tl.float32)
    for start in range(first, last, BT):
        slots = start + tl.arange(0, BT)
        valid = slots < last
        tokens = box_tokens(slots, t0, h0, w0, size_h, size_w, H, W, RANK)
        mask = tile_mask(valid, D, BD)
        k = tl.load(
            k_ptr + tile_offsets(tokens, k_strides[1], k_strides[3], BD, ALIGN), mask, other=0.0
        )
        v = tl.load(
            v_ptr + tile_offsets(tokens, v_strides[1], v_strides[3], BV, ALIGN),
            tile_mask(valid, V, BV),
            other=0.0,
        )
        features = tl.where(mask, phi(k.to(tl.float32), FEATURE_MAP), 0.0)
        if NORMALIZE:
            key_sum += tl.sum(features, axis=0)
        if ROTARY:
            cos, sin = load_angles(cos_ptr, sin_ptr, tokens, valid, D, BD)
            features = rotate(features, cos, sin)
        summary = dot(tl.trans(features.to(OPERAND)), v.to(OPERAND), summary, PRECISION)

    store_summary(summary, summaries_ptr, scales_ptr, matrix, D, V, BD, BV)
    if NORMALIZE:
        channels = tl.arange(0, BD)
        tl.store(key_sums_ptr + matrix * D + channels, key_sum, mask=channels < D)


@triton.jit
def mix_kernel(
    mixing_ptr,
    summaries_ptr,
    scales_ptr,
    key_sums_ptr,
    mixed_ptr,
    mixed_scales_ptr,
    mixed_key_sums_ptr,
    mixing_strides,
    num_heads,
    num_blocks,
    num_parts,
    D: tl.constexpr,
    V: tl.constexpr,
    BI: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """S̃_i = Σ_b m_ib S_b and z̃_i = Σ_b m_ib z_b for BI rows i and BC columns of one head.

    Columns are the entries of a key sum, then the D * V of a summary. `mixing_strides` are
    (head, row, column); swapping the last two mixes with the transpose.
    """
    HALF: tl.constexpr = summaries_ptr.dtype.element_ty == tl.float16
    if NORMALIZE:
        KEY_TILES: tl.constexpr = (D + BC - 1) // BC
    else:
        KEY_TILES: tl.constexpr = 0
    COLUMN_TILES: tl.constexpr = KEY_TILES + (D * V + BC - 1) // BC
    row_tiles = tl.cdiv(num_blocks, BI)
    column_tile = tl.program_id(0) // row_tiles % COLUMN_TILES
    batch_head = tl.program_id(0) // row_tiles // COLUMN_TILES
    batch = (batch_head // num_heads).to(tl.int64)
    head = batch_head % num_heads
    num_rows = num_blocks * num_parts
    rows_i = tl.program_id(0) % row_tiles * BI + tl.arange(0, BI)
    valid_i = rows_i < num_blocks
    mixing_ptr += head.to(tl.int64) * mixing_strides[0] + rows_i[:, None] * mixing_strides[1]
    # Matrix number of row r: (batch * num_rows + r) * num_heads + head, and so for the output.
    first_matrix = batch * num_rows * num_heads + head
    out_matrices = (batch * num_blocks + rows_i) * num_heads + head

    acc = tl.zeros((BI, BC), tl.float32)
    if column_tile < KEY_TILES:
        columns = column_tile * BC + tl.arange(0, BC)
        valid_c = columns < D
        for start in range(0, num_rows, BR):
            rows = start + tl.arange(0, BR)
            valid = rows < num_rows
            matrices = first_matrix + rows * num_heads
            m = tl.load(
                mixing_ptr + (rows // num_parts)[None, :] * mixing_strides[2],
                mask=valid_i[:, None] & valid[None, :],
                other=0.0,
            ).to(tl.float32)
            z = tl.load(
                key_sums_ptr + matrices[:, None] * D + columns[None, :],
                mask=valid[:, None] & valid_c[None, :],
                other=0.0,
            )
            acc = tl.dot(m, z, acc, input_precision="tf32x3")
        tl.store(
            mixed_key_sums_ptr + out_matrices[:, None] * D + columns[None, :],
            acc,
            mask=valid_i[:, None] & valid_c[None, :],
        )
    else:
        columns = (column_tile - KEY_TILES) * BC + tl.arange(0, BC)
        valid_c = columns < D * V
        bound = tl.zeros((BI,), tl.float32)
        if HALF:
            # No entry of S̃_i exceeds Σ_b |m_ib| scale_b: the output's scale, known beforehand.
            for start in range(0, num_rows, BR):
                rows = start + tl.arange(0, BR)
                valid = rows < num_rows
                m = tl.load(
                    mixing_ptr + (rows // num_parts)[None, :] * mixing_strides[2],
                    mask=valid_i[:, None] & valid[None, :],
                    other=0.0,
                ).to(tl.float32)
                scales = tl.load(scales_ptr + first_matrix + rows * num_heads, valid, other=0.0)
                bound += tl.sum(tl.abs(m) * scales[None, :], axis=1)
            bound = tl.where(bound > TINY, bound, 1.0)
            if column_tile == KEY_TILES:
                tl.store(mixed_scales_ptr + out_matrices, bound, mask=valid_i)
        for start in range(0, num_rows, BR):
            rows = start + tl.arange(0, BR)
            valid = rows < num_rows
            matrices = first_matrix + rows * num_heads
            m = tl.load(
                mixing_ptr + (rows // num_parts)[None, :] * mixing_strides[2],
                mask=valid_i[:, None] & valid[None, :],
                other=0.0,
            ).to(tl.float32)
            summaries = tl.load(
                summaries_ptr + matrices[:, None] * (D * V) + columns[None, :],
                mask=valid[:, None] & valid_c[None, :],
                other=0.0,
            )
            if HALF:
                scales = tl.load(scales_ptr + matrices, mask=valid, other=0.0)
                m = (m * scales[None, :]) * (1.0 / bound)[:, None]
            acc = dot(m.to(summaries.dtype), summaries, acc, "tf32x3")
        tl.store(
            mixed_ptr + out_matrices[:, None] * (D * V) + columns[None, :],
            acc.to(mixed_ptr.dtype.element_ty),
            mask=valid_i[:, None] & valid_c[None, :],
        )


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
    """Output o = R(φ(q))ᵀ S̃ / (φ(q)ᵀ z̃ + eps) for the queries of one part of one block and head."""
    T, H, W, LT, LH, LW = box
    head = tl.program_id(0) % num_heads
    row = tl.program_id(0) // num_heads
    num_blocks = LT * LH * LW
    batch = (row // (num_blocks * num_parts)).to(tl.int64)
    part = row % (num_blocks * num_parts)
    block = part // num_parts
    t0, h0, w0, size_t, size_h, size_w = block_box(block, T, H, W, LT, LH, LW, RANK)
    first, last = part_of_block(part % num_parts, num_parts, size_t * size_h * size_w, BT)
    q_ptr += tl.multiple_of(batch * q_strides[0] + head.to(tl.int64) * q_strides[2], ALIGN)
    out_ptr += tl.multiple_of(batch * out_strides[0] + head.to(tl.int64) * out_strides[2], ALIGN)

    matrix = (batch * num_blocks + block) * num_heads + head
    mixed, mixed_scale = load_summary(mixed_ptr, mixed_scales_ptr, matrix, D, V, BD, BV)
    channels = tl.arange(0, BD)
    if NORMALIZE:
        key_sum = tl.load(mixed_key_sums_ptr + matrix * D + channels, channels < D, other=0.0)
    for start in range(first, last, BT):
        slots = start + tl.arange(0, BT)
        valid = slots < last
        tokens = box_tokens(slots, t0, h0, w0, size_h, size_w, H, W, RANK)
        mask = tile_mask(valid, D, BD)
        q = tl.load(
            q_ptr + tile_offsets(tokens, q_strides[1], q_strides[3], BD, ALIGN), mask, other=0.0
        )
        features = phi(q.to(tl.float32), FEATURE_MAP)
        if D != BD:
            features = tl.where(mask, features, 0.0)
        if NORMALIZE:
            factors = 1 / (tl.sum(features * key_sum[None, :], axis=1) + eps)
        else:
            factors = tl.full((BT,), 1.0, tl.float32)
        if ROTARY:
            cos, sin = load_angles(cos_ptr, sin_ptr, tokens, valid, D, BD)
            features = rotate(features, cos, sin)
        zeros = tl.zeros((BT, BV), tl.float32)
        if mixed_ptr.dtype.element_ty == tl.float16:
            features, scales = scale_rows(features)
            out = dot(features, mixed, zeros, PRECISION)
            factors *= scales * mixed_scale
        else:
            out = dot(features, mixed, zeros, PRECISION)
        tl.store(
            out_ptr + tile_offsets(tokens, out_strides[1], out_strides[3], BV, ALIGN),
            (out * factors[:, None]).to(out_ptr.dtype.element_ty),
            mask=tile_mask(valid, V, BV),
        )
