"""Tiles in registers: how channels are cut into pieces, loaded, multiplied and stored.

Names in kernels: `BT` tokens of a tile, `OPERAND` the dtype of tiles in a matrix product. Tiles are
powers of two, so the `D` channels of a key come in two pieces of `D0` and `D1` columns (72 = 64 +
16, half of the second one empty), `D1 = 0` if one will do; those of a value in `V0` and `V1`.
Without a second piece, functions of two take the first one twice.
"""

import triton
import triton.language as tl

# Below this a row or a summary counts as zero and is not scaled up.
TINY = tl.constexpr(1e-30)


@triton.jit
def rows_exist(rows, last, EVEN: tl.constexpr):
    """Whether rows come before `last`; a constant if `EVEN`."""
    if EVEN:
        return tl.full(rows.shape, True, tl.int1)
    else:
        return rows < last


@triton.jit
def piece_mask(valid, D: tl.constexpr, START: tl.constexpr, B: tl.constexpr):
    """Rows `valid` of those of B channels from START on that exist."""
    if START + B <= D:
        return tl.broadcast_to(valid[:, None], (valid.shape[0], B))
    else:
        return valid[:, None] & (START + tl.arange(0, B) < D)[None, :]


@triton.jit
def piece_offsets(tokens, strides, START: tl.constexpr, B: tl.constexpr, ALIGN: tl.constexpr):
    """Element offsets [tokens, B] in one head; every row starts at a multiple of `ALIGN`."""
    rows = tl.multiple_of(tokens * strides[1], ALIGN)
    return rows[:, None] + ((START + tl.arange(0, B)) * strides[3])[None, :]


@triton.jit
def load_pieces(
    x_ptr, tokens, valid, strides, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Both pieces of rows `tokens` of one head, 0 outside."""
    x0 = tl.load(
        x_ptr + piece_offsets(tokens, strides, 0, D0, ALIGN), piece_mask(valid, D, 0, D0), other=0.0
    )
    x1 = x0
    if D1 > 0:
        x1 = tl.load(
            x_ptr + piece_offsets(tokens, strides, D0, D1, ALIGN),
            piece_mask(valid, D, D0, D1),
            other=0.0,
        )
    return x0, x1


@triton.jit
def store_pieces(
    x_ptr, x0, x1, tokens, valid, strides, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Inverse of `load_pieces`."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    tl.store(
        x_ptr + piece_offsets(tokens, strides, 0, D0, ALIGN),
        x0.to(dtype),
        mask=piece_mask(valid, D, 0, D0),
    )
    if D1 > 0:
        tl.store(
            x_ptr + piece_offsets(tokens, strides, D0, D1, ALIGN),
            x1.to(dtype),
            mask=piece_mask(valid, D, D0, D1),
        )


@triton.jit
def clear_padding(x, D: tl.constexpr, START: tl.constexpr):
    """`x` [rows, B] with 0 in channels that do not exist, where features are φ(0)."""
    B: tl.constexpr = x.shape[1]
    if START + B <= D:
        return x
    else:
        return tl.where((START + tl.arange(0, B) < D)[None, :], x, 0.0)


@triton.jit
def load_vector(x_ptr, D: tl.constexpr, START: tl.constexpr, B: tl.constexpr):
    """Entries [START, START + B) of a contiguous float32 vector of D."""
    channels = START + tl.arange(0, B)
    return tl.load(x_ptr + channels, mask=channels < D, other=0.0)


@triton.jit
def store_vector(x_ptr, x, D: tl.constexpr, START: tl.constexpr):
    """Inverse of `load_vector`."""
    channels = START + tl.arange(0, x.shape[0])
    tl.store(x_ptr + channels, x, mask=channels < D)


@triton.jit
def head_offset(strides, batch, head, ALIGN: tl.constexpr):
    """Elements from the start of a tensor to its first token of `batch` and `head`."""
    return tl.multiple_of(batch * strides[0] + head.to(tl.int64) * strides[2], ALIGN)


@triton.jit
def scale_rows(x0, x1, D1: tl.constexpr):
    """Rows brought into the range of float16: both pieces scaled, and the scales."""
    scale = tl.max(tl.abs(x0), axis=1)
    if D1 > 0:
        scale = tl.maximum(scale, tl.max(tl.abs(x1), axis=1))
    scale = tl.maximum(scale, TINY)
    inverse = (1.0 / scale)[:, None]
    return (x0 * inverse).to(tl.float16), (x1 * inverse).to(tl.float16), scale


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """`a @ b + acc` in float32. `PRECISION` says how float32 operands are multiplied."""
    if a.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision=PRECISION)
    else:
        return tl.dot(a, b, acc)


@triton.jit
def sum_waves(x, WAVE: tl.constexpr):
    """Sums [WAVE, BD] of every WAVE-th row of `x` [BT, BD].

    With the rows that a program loads at once as WAVE, each thread sums its own rows; the sum over
    threads can wait until the end of a loop.
    """
    return tl.sum(tl.reshape(x, (x.shape[0] // WAVE, WAVE, x.shape[1])), axis=0)
