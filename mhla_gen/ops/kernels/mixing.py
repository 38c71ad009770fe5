"""Mixing of summaries: a matrix product for every head, forward with m and backward with mᵀ."""

import triton
import triton.language as tl

from mhla_gen.ops.kernels.pieces import TINY, dot


@triton.jit
def coefficients_kernel(
    mixing_ptr,
    scales_ptr,
    key_sums_ptr,
    coefficients_ptr,
    mixed_scales_ptr,
    mixed_key_sums_ptr,
    mixing_strides,
    num_heads,
    num_blocks,
    num_rows,
    num_parts,
    padded_blocks,
    padded_rows,
    D: tl.constexpr,
    BD: tl.constexpr,
    BI: tl.constexpr,
    BR: tl.constexpr,
    BZ: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """What `mix_kernel` multiplies summaries by, for BI rows of m and one head; and z̃ = m z.

    Float16 summaries are multiples of their scales, and so is what mixing makes of them: no entry
    of S̃_i exceeds Σ_b |m_ib| scale_b. Coefficients are m_ib scale_b over that bound, at most 1.
    They are stored [batch, num_heads, padded_blocks, padded_rows] with zeros in the padding.
    """
    HALF: tl.constexpr = coefficients_ptr.dtype.element_ty == tl.float16
    tiles = padded_blocks // BI
    batch_head = (tl.program_id(0) // tiles).to(tl.int64)
    batch = batch_head // num_heads
    head = batch_head % num_heads
    rows_i = tl.program_id(0) % tiles * BI + tl.arange(0, BI)
    valid_i = rows_i < num_blocks
    mixing_ptr += head * mixing_strides[0]
    mixing_ptr += rows_i[:, None] * mixing_strides[1]
    coefficients_ptr += (batch_head * padded_blocks + rows_i[:, None]) * padded_rows
    first_matrix = batch * num_rows * num_heads + head
    out_matrices = (batch * num_blocks + rows_i) * num_heads + head

    rows = tl.arange(0, BR)
    valid = rows < num_rows
    inside = (rows < padded_rows)[None, :]
    m = tl.load(
        mixing_ptr + (rows // num_parts)[None, :] * mixing_strides[2],
        mask=valid_i[:, None] & valid[None, :],
        other=0.0,
    ).to(tl.float32)
    if HALF:
        scales = tl.load(scales_ptr + first_matrix + rows * num_heads, mask=valid, other=0.0)
        m *= scales[None, :]
        bound = tl.sum(tl.abs(m), axis=1)
        bound = tl.where(bound > TINY, bound, 1.0)
        tl.store(mixed_scales_ptr + out_matrices, bound, mask=valid_i)
        m *= (1.0 / bound)[:, None]
    tl.store(coefficients_ptr + rows[None, :], m.to(coefficients_ptr.dtype.element_ty), mask=inside)

    if NORMALIZE:
        channels = tl.arange(0, BD)
        key_sums = tl.zeros((BI, BD), tl.float32)
        for start in range(0, num_rows, BZ):
            some = start + tl.arange(0, BZ)
            weights = tl.load(
                mixing_ptr + (some // num_parts)[None, :] * mixing_strides[2],
                mask=valid_i[:, None] & (some < num_rows)[None, :],
                other=0.0,
            ).to(tl.float32)
            z = tl.load(
                key_sums_ptr + (first_matrix + some * num_heads)[:, None] * D + channels[None, :],
                mask=(some < num_rows)[:, None] & (channels < D)[None, :],
                other=0.0,
            )
            key_sums = tl.dot(weights, z, key_sums, input_precision="tf32x3")
        tl.store(
            mixed_key_sums_ptr + out_matrices[:, None] * D + channels[None, :],
            key_sums,
            mask=valid_i[:, None] & (channels < D)[None, :],
        )


@triton.jit
def mix_kernel(
    coefficients_ptr,
    summaries_ptr,
    mixed_ptr,
    num_heads,
    num_blocks,
    num_rows,
    padded_blocks,
    padded_rows,
    D: tl.constexpr,
    V: tl.constexpr,
    TRIANGLE: tl.constexpr,
    BI: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """S̃_i = Σ_b m_ib S_b: a matrix product of BI rows i and BC entries of one head.

    With a `TRIANGLE`, "lower" or "upper", m is 0 on its other side, which is passed over.
    """
    COLUMN_TILES: tl.constexpr = (D * V + BC - 1) // BC
    row_tiles = tl.cdiv(num_blocks, BI)
    program = tl.program_id(0)
    batch_head = (program // row_tiles // COLUMN_TILES).to(tl.int64)
    batch = batch_head // num_heads
    head = batch_head % num_heads
    columns = program // row_tiles % COLUMN_TILES * BC + tl.arange(0, BC)
    valid_c = columns < D * V
    rows_i = program % row_tiles * BI + tl.arange(0, BI)
    coefficients_ptr += (batch_head * padded_blocks + rows_i[:, None]) * padded_rows
    summaries_ptr += (batch * num_rows * num_heads + head) * (D * V) + columns[None, :]
    acc = tl.zeros((BI, BC), tl.float32)
    first, last = 0, padded_rows
    if TRIANGLE == "lower":
        last = tl.minimum(padded_rows, program % row_tiles * BI + BI)
    if TRIANGLE == "upper":
        first = program % row_tiles * BI // BR * BR
    for start in range(first, last, BR):
        rows = start + tl.arange(0, BR)
        coefficients = tl.load(coefficients_ptr + rows[None, :])
        summaries = tl.load(
            summaries_ptr + (rows.to(tl.int64) * num_heads)[:, None] * (D * V),
            mask=(rows < num_rows)[:, None] & valid_c[None, :],
            other=0.0,
        )
        acc = dot(coefficients, summaries, acc, "tf32x3")
    matrices = (batch * num_blocks + rows_i) * num_heads + head
    tl.store(
        mixed_ptr + matrices[:, None] * (D * V) + columns[None, :],
        acc.to(mixed_ptr.dtype.element_ty),
        mask=(rows_i < num_blocks)[:, None] & valid_c[None, :],
    )


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
    num_columns,
    num_splits,
    D: tl.constexpr,
    V: tl.constexpr,
    BI: tl.constexpr,
    BC: tl.constexpr,
    NORMALIZE: tl.constexpr,
    LOWER: tl.constexpr,
):
    """<dS̃_i, S_b> + <dz̃_i, z_b> for BI × BI pairs (i, b) over one split of the columns.

    Partial sums go to `partial` [batch, num_heads, num_splits, num_rows, num_columns], float32. If
    `LOWER`, those of b > i are not asked for.
    """
    HALF: tl.constexpr = left_ptr.dtype.element_ty == tl.float16
    tiles_i, tiles_b = tl.cdiv(num_rows, BI), tl.cdiv(num_columns, BI)
    rows_b = tl.program_id(0) % tiles_b * BI + tl.arange(0, BI)
    rows_i = tl.program_id(0) // tiles_b % tiles_i * BI + tl.arange(0, BI)
    partial = tl.program_id(0) // (tiles_i * tiles_b)
    split = partial % num_splits
    batch = (partial // num_splits // num_heads).to(tl.int64)
    head = partial // num_splits % num_heads
    valid_i, valid_b = rows_i < num_rows, rows_b < num_columns
    left = (batch * num_rows + rows_i) * num_heads + head
    right = (batch * num_columns + rows_b) * num_heads + head

    span = tl.cdiv(tl.cdiv(D * V, num_splits), BC) * BC
    last = tl.minimum((split + 1) * span, D * V)
    if LOWER:
        wanted = tl.program_id(0) % tiles_b <= tl.program_id(0) // tiles_b % tiles_i
        last = tl.where(wanted, last, 0)
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
    partial_ptr += partial.to(tl.int64) * num_rows * num_columns
    tl.store(
        partial_ptr + rows_i[:, None] * num_columns + rows_b[None, :],
        acc,
        mask=valid_i[:, None] & valid_b[None, :],
    )
