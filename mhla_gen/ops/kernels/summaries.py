"""Loading summaries, in up to two by two pieces, and storing them.

Summaries are stored [batch, parts of blocks, num_heads, D, V]. In float16 they carry one float32
scale per matrix (`scales`), which keeps them in range whatever the inputs are.
"""

import triton
import triton.language as tl

from mhla_gen.ops.kernels.pieces import TINY, dot, rows_exist


@triton.jit
def _piece(
    D: tl.constexpr,
    V: tl.constexpr,
    ROW: tl.constexpr,
    COLUMN: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
):
    """Offsets of the entries of a piece, and which of them exist."""
    rows, columns = ROW + tl.arange(0, BD), COLUMN + tl.arange(0, BV)
    offsets = rows[:, None] * V + columns[None, :]
    # Constants where all rows or columns exist.
    valid_rows = rows_exist(rows, D, ROW + BD <= D)[:, None]
    return offsets, valid_rows & rows_exist(columns, V, COLUMN + BV <= V)[None, :]


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
def add_outer(
    a0, a1, b0, b1, s00, s01, t10, s11, D1: tl.constexpr, V1: tl.constexpr, PRECISION: tl.constexpr
):
    """Pieces of a float32 summary with those of `aᵀ b` added, for tiles a [BT, D] and b [BT, V].

    Piece 10 is kept transposed: so most of the narrow pieces are products of many rows.
    """
    s00 = dot(tl.trans(a0), b0, s00, PRECISION)
    if V1 > 0:
        s01 = dot(tl.trans(a0), b1, s01, PRECISION)
    if D1 > 0:
        t10 = dot(tl.trans(b0), a1, t10, PRECISION)
        if V1 > 0:
            s11 = dot(tl.trans(a1), b1, s11, PRECISION)
    return s00, s01, t10, s11


@triton.jit
def no_summary(D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr):
    """Zeros, for `add_outer` to begin with."""
    s00 = tl.zeros((D0, V0), tl.float32)
    s01, t10, s11 = s00, s00, s00
    if V1 > 0:
        s01 = tl.zeros((D0, V1), tl.float32)
    if D1 > 0:
        t10 = tl.zeros((V0, D1), tl.float32)
        if V1 > 0:
            s11 = tl.zeros((D1, V1), tl.float32)
    return s00, s01, t10, s11


@triton.jit
def take_column(s01, s11, is_column, D1: tl.constexpr):
    """A column of the second pieces, as two vectors, and these pieces with 0 in its place."""
    z0 = tl.sum(tl.where(is_column, s01, 0.0), axis=1)
    s01 = tl.where(is_column, 0.0, s01)
    z1 = z0
    if D1 > 0:
        z1 = tl.sum(tl.where(is_column, s11, 0.0), axis=1)
        s11 = tl.where(is_column, 0.0, s11)
    return z0, z1, s01, s11


@triton.jit
def _largest(piece, D: tl.constexpr, ROW: tl.constexpr):
    """Largest magnitude of a piece; φ(0) of channels that do not exist does not count."""
    sizes = tl.abs(piece)
    if ROW + piece.shape[0] > D:
        sizes = tl.where((ROW + tl.arange(0, piece.shape[0]) < D)[:, None], sizes, 0.0)
    return tl.max(sizes)


@triton.jit
def _store_piece(
    ptr, piece, D: tl.constexpr, V: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr
):
    offsets, mask = _piece(D, V, ROW, COLUMN, piece.shape[0], piece.shape[1])
    tl.store(ptr + offsets, piece.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_summary(
    summaries_ptr, scales_ptr, matrix, s00, s01, t10, s11, D: tl.constexpr, V: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
):  # fmt: skip
    """Write the pieces of `add_outer` as matrix number `matrix` (int64), and a float16 scale."""
    if summaries_ptr.dtype.element_ty == tl.float16:
        scale = _largest(s00, D, 0)
        if V1 > 0:
            scale = tl.maximum(scale, _largest(s01, D, 0))
        if D1 > 0:
            scale = tl.maximum(scale, _largest(tl.trans(t10), D, D0))
            if V1 > 0:
                scale = tl.maximum(scale, _largest(s11, D, D0))
        # A scale of 0 keeps an empty matrix out of the bound that scales what it is mixed into.
        scale = tl.where(scale > TINY, scale, 0.0)
        tl.store(scales_ptr + matrix, scale)
        inverse = 1.0 / tl.where(scale > 0, scale, 1.0)
        s00, s01, t10, s11 = s00 * inverse, s01 * inverse, t10 * inverse, s11 * inverse
    summaries_ptr += matrix * (D * V)
    _store_piece(summaries_ptr, s00, D, V, 0, 0)
    if V1 > 0:
        _store_piece(summaries_ptr, s01, D, V, 0, V0)
    if D1 > 0:
        _store_piece(summaries_ptr, tl.trans(t10), D, V, D0, 0)
        if V1 > 0:
            _store_piece(summaries_ptr, s11, D, V, D0, V0)


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
