"""Loading summaries, in up to two by two pieces, and storing them.

Summaries are stored [batch, parts of blocks, num_heads, D, V]. In float16 they carry one float32
scale per matrix (`scales`), which keeps them in range whatever the inputs are.
"""

import triton
import triton.language as tl

from mhla_gen.ops.kernels.pieces import TINY, dot


@triton.jit
def _piece(
    D: tl.constexpr,
    V: tl.constexpr,
    ROW: tl.constexpr,
    COLUMN: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
):
    rows, columns = ROW + tl.arange(0, BD), COLUMN + tl.arange(0, BV)
    return rows[:, None] * V + columns[None, :], (rows < D)[:, None] & (columns < V)[None, :]


@triton.jit
def _load_piece(
    ptr,
    D: tl.constexpr,
    V: tl.constexpr,
    ROW: tl.constexpr,
    COLUMN: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
):
    offsets, mask = _piece(D, V, ROW, COLUMN, BD, BV)
    return tl.load(ptr + offsets, mask=mask, other=0.0)


@triton.jit
def load_summary(
    summaries_ptr,
    scales_ptr,
    matrix,
    D: tl.constexpr,
    V: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
):
    """Pieces 00, 01, 10, 11 of matrix number `matrix` as stored, and its scale."""
    summaries_ptr += matrix * (D * V)
    s00 = _load_piece(summaries_ptr, D, V, 0, 0, D0, V0)
    s01, s10, s11 = s00, s00, s00
    if V1 > 0:
        s01 = _load_piece(summaries_ptr, D, V, 0, V0, D0, V1)
    if D1 > 0:
        s10 = _load_piece(summaries_ptr, D, V, D0, 0, D1, V0)
        if V1 > 0:
            s11 = _load_piece(summaries_ptr, D, V, D0, V0, D1, V1)
    scale = 1.0
    if summaries_ptr.dtype.element_ty == tl.float16:
        scale = tl.load(scales_ptr + matrix)
    return s00, s01, s10, s11, scale


@triton.jit
def store_summary(summaries_ptr, scales_ptr, matrix, summary, D: tl.constexpr, V: tl.constexpr):
    """Write a float32 tile as matrix number `matrix` (int64), with its scale if in float16."""
    BD: tl.constexpr = summary.shape[0]
    if summaries_ptr.dtype.element_ty == tl.float16:
        by_row = tl.max(tl.abs(summary), axis=1)
        # φ(0) of channels that do not exist must not set the scale.
        scale = tl.max(tl.where(tl.arange(0, BD) < D, by_row, 0.0), axis=0)
        # A scale of 0 keeps an empty matrix out of the bound that scales what it is mixed into.
        scale = tl.where(scale > TINY, scale, 0.0)
        tl.store(scales_ptr + matrix, scale)
        summary *= 1.0 / tl.where(scale > 0, scale, 1.0)
    offsets, mask = _piece(D, V, 0, 0, BD, summary.shape[1])
    dtype: tl.constexpr = summaries_ptr.dtype.element_ty
    tl.store(summaries_ptr + matrix * (D * V) + offsets, summary.to(dtype), mask=mask)


@triton.jit
def times_summary(
    a0, a1, s00, s01, s10, s11, D1: tl.constexpr, V1: tl.constexpr, PRECISION: tl.constexpr
):
    """Both pieces of `a S` in float32 for a tile a [BT, D]."""
    BT: tl.constexpr = a0.shape[0]
    b0 = dot(a0, s00, tl.zeros((BT, s00.shape[1]), tl.float32), PRECISION)
    if D1 > 0:
        b0 = dot(a1, s10, b0, PRECISION)
    b1 = b0
    if V1 > 0:
        b1 = dot(a0, s01, tl.zeros((BT, s01.shape[1]), tl.float32), PRECISION)
        if D1 > 0:
            b1 = dot(a1, s11, b1, PRECISION)
    return b0, b1
