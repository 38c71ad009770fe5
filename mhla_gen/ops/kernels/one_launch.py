"""Linear form, forward, in one launch: a program summarises, mixes and applies for its own head.

For blocks of one tile: a program loads the next block while it works on the current one. Summaries
pass through memory as between launches, mostly in the cache, and are kept for backward.
"""

import triton
import triton.language as tl

from mhla_gen.ops.kernels.boxes import block_box, box_tokens
from mhla_gen.ops.kernels.linear import apply_tile, load_key_sums, summarise_tile
from mhla_gen.ops.kernels.pieces import TINY, dot, head_offset, store_vector
from mhla_gen.ops.kernels.summaries import load_summary, store_summary


@triton.jit
def _block_tokens(block, box, BT: tl.constexpr, RANK: tl.constexpr):
    """Raster-order tokens of a block of up to BT, and which of them exist."""
    T, H, W, LT, LH, LW = box
    first_t, first_h, first_w, size_t, size_h, size_w = block_box(block, T, H, W, LT, LH, LW, RANK)
    slots = tl.arange(0, BT)
    tokens = box_tokens(slots, first_t, first_h, first_w, size_h, size_w, H, W, RANK)
    return tokens, slots < size_t * size_h * size_w


@triton.jit
def _mix(
    mixing_ptr, summaries_ptr, scales_ptr, key_sums_ptr, mixed_ptr, mixed_scales_ptr,
    mixed_key_sums_ptr, mixing_strides, first, num_heads, num_blocks,
    D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BI: tl.constexpr, BC: tl.constexpr,
    NORMALIZE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """S̃_i = Σ_b m_ib S_b and z̃_i likewise, for all blocks of one head; see `mixing.py`."""
    rows = tl.arange(0, BI)
    valid = rows < num_blocks
    matrices = first + rows * num_heads
    m = tl.load(
        mixing_ptr + rows[:, None] * mixing_strides[1] + rows[None, :] * mixing_strides[2],
        mask=valid[:, None] & valid[None, :],
        other=0.0,
    ).to(tl.float32)
    if NORMALIZE:
        channels = tl.arange(0, BD)
        inside = valid[:, None] & (channels < D)[None, :]
        offsets = matrices[:, None] * D + channels[None, :]
        z = tl.load(key_sums_ptr + offsets, mask=inside, other=0.0)
        mixed_z = tl.dot(m, z, input_precision="tf32x3")
        tl.store(mixed_key_sums_ptr + offsets, mixed_z, mask=inside)
    scales = tl.load(scales_ptr + matrices, mask=valid, other=0.0)
    m *= scales[None, :]
    bound = tl.sum(tl.abs(m), axis=1)
    bound = tl.where(bound > TINY, bound, 1.0)
    tl.store(mixed_scales_ptr + matrices, bound, mask=valid)
    coefficients = (m * (1.0 / bound)[:, None]).to(tl.float16)
    for start in tl.range(0, D * V, BC, num_stages=STAGES):
        columns = start + tl.arange(0, BC)
        inside = valid[:, None] & (columns < D * V)[None, :]
        offsets = matrices[:, None] * (D * V) + columns[None, :]
        summaries = tl.load(summaries_ptr + offsets, mask=inside, other=0.0)
        mixed = dot(coefficients, summaries, tl.zeros((BI, BC), tl.float32), "tf32x3")
        tl.store(mixed_ptr + offsets, mixed.to(mixed_ptr.dtype.element_ty), mask=inside)


@triton.jit
def one_launch_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mixing_ptr,
    cos_ptr,
    sin_ptr,
    summaries_ptr,
    scales_ptr,
    key_sums_ptr,
    mixed_ptr,
    mixed_scales_ptr,
    mixed_key_sums_ptr,
    out_ptr,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    mixing_strides,
    box,
    num_heads,
    eps,
    D: tl.constexpr,
    V: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    BT: tl.constexpr,
    BI: tl.constexpr,
    BC: tl.constexpr,
    WAVE: tl.constexpr,
    RANK: tl.constexpr,
    ALIGN: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    ROTARY: tl.constexpr,
    NORMALIZE: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Output, summaries and mixed summaries of one head of one sequence."""
    _T, _H, _W, LT, LH, LW = box
    num_blocks = LT * LH * LW
    batch = (tl.program_id(0) // num_heads).to(tl.int64)
    head = tl.program_id(0) % num_heads
    q_ptr += head_offset(q_strides, batch, head, ALIGN)
    k_ptr += head_offset(k_strides, batch, head, ALIGN)
    v_ptr += head_offset(v_strides, batch, head, ALIGN)
    out_ptr += head_offset(out_strides, batch, head, ALIGN)
    # Number of the first block's matrix; those of the others follow `num_heads` apart.
    first = batch * num_blocks * num_heads + head

    for block in tl.range(0, num_blocks, num_stages=STAGES):
        tokens, valid = _block_tokens(block, box, BT, RANK)
        summary, key_sums = summarise_tile(
            k_ptr, v_ptr, cos_ptr, sin_ptr, k_strides, v_strides, tokens, valid,
            tl.zeros((BD, BV), tl.float32), tl.zeros((WAVE, BD), tl.float32),
            D, V, BD, BV, WAVE, ALIGN, FEATURE_MAP, ROTARY, NORMALIZE, OPERAND, PRECISION,
        )  # fmt: skip
        matrix = first + block * num_heads
        store_summary(summaries_ptr, scales_ptr, matrix, summary, D, V)
        if NORMALIZE:
            store_vector(key_sums_ptr + matrix * D, tl.sum(key_sums, axis=0), D, 0)

    # Other threads of this program load next what one thread has stored.
    tl.debug_barrier()
    _mix(
        mixing_ptr + head * mixing_strides[0], summaries_ptr, scales_ptr, key_sums_ptr, mixed_ptr,
        mixed_scales_ptr, mixed_key_sums_ptr, mixing_strides, first, num_heads, num_blocks,
        D, V, BD, BI, BC, NORMALIZE, STAGES,
    )  # fmt: skip
    tl.debug_barrier()

    for block in tl.range(0, num_blocks, num_stages=STAGES):
        tokens, valid = _block_tokens(block, box, BT, RANK)
        matrix = first + block * num_heads
        s00, s01, s10, s11, scale = load_summary(
            mixed_ptr, mixed_scales_ptr, matrix, D, V, D0, D1, V0, V1
        )
        z0, z1 = load_key_sums(mixed_key_sums_ptr, matrix, D, D0, D1, NORMALIZE)
        apply_tile(
            q_ptr, cos_ptr, sin_ptr, out_ptr, q_strides, out_strides, tokens, valid,
            s00, s01, s10, s11, scale, z0, z1, eps,
            D, V, D0, D1, V0, V1, ALIGN, FEATURE_MAP, ROTARY, NORMALIZE, PRECISION,
        )  # fmt: skip
