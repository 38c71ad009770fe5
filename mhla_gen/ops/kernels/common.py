"""Pieces every kernel shares: feature maps, rotation, and where the tokens of a block lie.

Names in kernels: `BT` tokens of a tile, `BD` and `BV` channels of keys and values padded to powers
of two, `RANK` axes of the token grid. `OPERAND` is the dtype of tiles in a matrix product.
"""

import triton
import triton.language as tl

# Below this a row or a summary counts as zero and is not scaled up.
TINY = tl.constexpr(1e-30)


@triton.jit
def phi(x, FEATURE_MAP: tl.constexpr):
    """The feature map, elementwise in float32; see `mhla_gen.ops.feature_maps`."""
    if FEATURE_MAP == "relu":
        return tl.maximum(x, 0.0) + 1e-6
    elif FEATURE_MAP == "squared_relu":
        positive = tl.maximum(x, 0.0)
        return positive * positive + 1e-6
    elif FEATURE_MAP == "elu+1":
        return tl.where(x > 0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))
    elif FEATURE_MAP == "softplus":
        # log(1 + y) cancels for small y, where its series is exact.
        y = tl.exp(-tl.abs(x))
        log1p = tl.where(y < 1e-2, y * (1 - y * (0.5 - y * (1 / 3 - y * 0.25))), tl.log(1.0 + y))
        return tl.maximum(x, 0.0) + log1p
    else:
        tl.static_assert(FEATURE_MAP == "identity", "unknown feature map")
        return x


@triton.jit
def phi_grad(x, FEATURE_MAP: tl.constexpr):
    """Derivative of `phi`."""
    if FEATURE_MAP == "relu":
        return tl.where(x > 0, 1.0, 0.0)
    elif FEATURE_MAP == "squared_relu":
        return 2 * tl.maximum(x, 0.0)
    elif FEATURE_MAP == "elu+1":
        return tl.where(x > 0, 1.0, tl.exp(tl.minimum(x, 0.0)))
    elif FEATURE_MAP == "softplus":
        return 1 / (1 + tl.exp(-x))
    else:
        tl.static_assert(FEATURE_MAP == "identity", "unknown feature map")
        return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def rotate(x, cos, sin):
    """Rotate interleaved pairs of channels of `x` [BT, BD] by `cos`, `sin` [BT, BD / 2]."""
    BT: tl.constexpr = x.shape[0]
    BD: tl.constexpr = x.shape[1]
    even, odd = tl.split(tl.reshape(x, (BT, BD // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (BT, BD))


@triton.jit
def load_angles(cos_ptr, sin_ptr, tokens, valid, D: tl.constexpr, BD: tl.constexpr):
    """Rows `tokens` of the contiguous tables [seq_len, D / 2], in float32."""
    pairs = tl.arange(0, BD // 2)
    offsets = tokens[:, None] * (D // 2) + pairs[None, :]
    mask = valid[:, None] & (pairs < D // 2)[None, :]
    cos = tl.load(cos_ptr + offsets, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + offsets, mask=mask, other=0.0)
    return cos.to(tl.float32), sin.to(tl.float32)


@triton.jit
def tile_offsets(tokens, stride_token, stride_channel, B: tl.constexpr, ALIGN: tl.constexpr):
    """Element offsets [BT, B] of rows `tokens`; every row starts at a multiple of `ALIGN`."""
    rows = tl.multiple_of(tokens * stride_token, ALIGN)
    return rows[:, None] + (tl.arange(0, B) * stride_channel)[None, :]


@triton.jit
def tile_mask(valid, D: tl.constexpr, B: tl.constexpr):
    """Rows `valid` of the first `D` of `B` channels."""
    if D == B:
        return tl.broadcast_to(valid[:, None], (valid.shape[0], B))
    else:
        return valid[:, None] & (tl.arange(0, B) < D)[None, :]


@triton.jit
def matrix_mask(D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr):
    """The part [D, V] of a summary padded to [BD, BV]."""
    return (tl.arange(0, BD) < D)[:, None] & (tl.arange(0, BV) < V)[None, :]


@triton.jit
def scale_rows(x):
    """Rows of `x` brought into the range of float16: (scaled float16 rows, their scales)."""
    scale = tl.maximum(tl.max(tl.abs(x), axis=1), TINY)
    return (x * (1.0 / scale)[:, None]).to(tl.float16), scale


@triton.jit
def _axis_start(block, length, num_blocks):
    # block * length // num_blocks, split so that no product leaves 32 bits.
    return block * (length // num_blocks) + block * (length % num_blocks) // num_blocks


@triton.jit
def _divide(x, divisor):
    # Integer division is slow; a float quotient is off by one at most.
    quotient = (x.to(tl.float32) / divisor.to(tl.float32)).to(tl.int32)
    rest = x - quotient * divisor
    step = tl.where(rest < 0, -1, tl.where(rest >= divisor, 1, 0))
    return quotient + step, rest - step * divisor


@triton.jit
def block_box(block, T, H, W, LT, LH, LW, RANK: tl.constexpr):
    """The box of tokens of `block` on the grid T×H×W cut into LT×LH×LW blocks.

    Returns:
        Its first position along each axis, then its size along each axis.
    """
    first_w = _axis_start(block % LW, W, LW)
    size_w = _axis_start(block % LW + 1, W, LW) - first_w
    first_t, first_h, size_t, size_h = 0, 0, 1, 1
    if RANK > 1:
        row = block // LW
        first_h = _axis_start(row % LH, H, LH)
        size_h = _axis_start(row % LH + 1, H, LH) - first_h
        if RANK > 2:
            first_t = _axis_start(row // LH, T, LT)
            size_t = _axis_start(row // LH + 1, T, LT) - first_t
    return first_t, first_h, first_w, size_t, size_h, size_w


@triton.jit
def box_tokens(slots, first_t, first_h, first_w, size_h, size_w, H, W, RANK: tl.constexpr):
    """Raster-order tokens (int64) of `slots`, which enumerate a box in raster order."""
    if RANK == 1:
        return (first_w + slots).to(tl.int64)
    else:
        row, w = _divide(slots, size_w)
        if RANK == 2:
            return ((first_h + row) * W + first_w + w).to(tl.int64)
        else:
            t, h = _divide(row, size_h)
            return (((first_t + t) * H + first_h + h) * W + first_w + w).to(tl.int64)


@triton.jit
def part_of_block(part, num_parts, count, BT: tl.constexpr):
    """Slots [first, last) of one of `num_parts` parts, whole tiles each, of `count` slots."""
    span = tl.cdiv(tl.cdiv(count, num_parts), BT) * BT
    first = part * span
    return first, tl.minimum(first + span, count)


@triton.jit
def block_of_tokens(tokens, H, W, T, LT, LH, LW, RANK: tl.constexpr):
    """Block of each raster-order token (int32), the inverse of `box_tokens`."""
    w = tokens % W
    block = ((w + 1) * LW - 1) // W
    if RANK > 1:
        rest = tokens // W
        h = rest % H
        block += ((h + 1) * LH - 1) // H * LW
        if RANK > 2:
            t = rest // H
            block += ((t + 1) * LT - 1) // T * (LH * LW)
    return block
