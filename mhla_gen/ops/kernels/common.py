"""What every kernel shares: feature maps, rotation, channels, and where the tokens of a block lie.

Names in kernels: `BT` tokens of a tile, `RANK` axes of the token grid, `OPERAND` the dtype of tiles
in a matrix product. Tiles are powers of two, so the `D` channels of a key come in two pieces of
`D0` and `D1` columns (72 = 64 + 16, half of the second one empty), `D1 = 0` if one will do; those
of a value in `V0` and `V1`. Without a second piece, functions of two take the first one twice.
"""

import triton
import triton.language as tl

# Below this a row or a summary counts as zero and is not scaled up.
TINY = tl.constexpr(1e-30)


@triton.jit
def phi(x, FEATURE_MAP: tl.constexpr):
    """The feature map, elementwise in float32; see `mhla_gen.ops.feature_maps`."""
    if FEATURE_MAP == "relu":
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + 1e-6
    elif FEATURE_MAP == "squared_relu":
        positive = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
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
def features(x, FEATURE_MAP: tl.constexpr, OPERAND: tl.constexpr):
    """φ(x) as an operand."""
    if FEATURE_MAP == "relu" and x.dtype == tl.bfloat16 and tl.bfloat16 == OPERAND:
        # The same numbers as below, two at once: one addition, rounded once either way.
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 zero, one, small, positive;
            mov.b32 zero, 0;
            mov.b32 one, 0x3f803f80;
            mov.b32 small, 0x35863586;
            max.NaN.bf16x2 positive, $1, zero;
            fma.rn.bf16x2 $0, positive, one, small;
            }""",
            "=r,r",
            [x],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    else:
        return phi(x.to(tl.float32), FEATURE_MAP).to(OPERAND)


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
def load_angles(
    cos_ptr, sin_ptr, tokens, valid, D: tl.constexpr, START: tl.constexpr, B: tl.constexpr
):
    """Float32 cos and sin [tokens, B / 2] of channels [START, START + B)."""
    pairs = START // 2 + tl.arange(0, B // 2)
    offsets = tokens[:, None] * (D // 2) + pairs[None, :]
    mask = valid[:, None] & (pairs < D // 2)[None, :]
    cos = tl.load(cos_ptr + offsets, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + offsets, mask=mask, other=0.0)
    return cos.to(tl.float32), sin.to(tl.float32)


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


@triton.jit
def _axis_start(block, length, num_blocks):
    # block * length // num_blocks, split so that no product leaves 32 bits.
    return block * (length // num_blocks) + block * (length % num_blocks) // num_blocks


@triton.jit
def _divide(x, divisor):
    # Integer division is slow. A float quotient is exact below 2**21; `Call` checks the size.
    inverse = 1.0 / tl.cast(divisor, tl.float32)
    quotient = ((x.to(tl.float32) + 0.5) * inverse).to(tl.int32)
    return quotient, x - quotient * divisor


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
def held_box(block, box, window, RANK: tl.constexpr):
    """`block_box` of one of the blocks of `box`, or, with a window, what it may hold of a block.

    A window is (blocks along the first axis, the first of them that `box` counts, first token,
    token past the last): the blocks of `box` are some of all, and their boxes are cut to the planes
    that hold tokens of the window. It takes three axes.
    """
    T, H, W, LT, LH, LW = box
    first_t, first_h, first_w, size_t, size_h, size_w = block_box(block, T, H, W, LT, LH, LW, RANK)
    if window is not None:
        num_blocks, first_block, first, last = window
        block_t = first_block + block // (LH * LW)
        first_t = tl.maximum(_axis_start(block_t, T, num_blocks), first // (H * W))
        last_t = tl.minimum(_axis_start(block_t + 1, T, num_blocks), tl.cdiv(last, H * W))
        size_t = tl.maximum(last_t - first_t, 0)
    return first_t, first_h, first_w, size_t, size_h, size_w


@triton.jit
def in_window(tokens, valid, window):
    """Tokens counted from the first one of a window, and which of the valid ones are in it."""
    if window is not None:
        valid = valid & (tokens >= window[2]) & (tokens < window[3])
        tokens -= window[2]
    return tokens, valid


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
def locate_part(box, num_heads, num_parts, RANK: tl.constexpr, GROUP: tl.constexpr):
    """What a program works on: batch element, head, number of its part, block.

    `GROUP` heads are neighbours in the launch grid, to share rotary tables and memory pages.
    """
    num_rows = box[3] * box[4] * box[5] * num_parts
    group = tl.program_id(0) // (GROUP * num_rows)
    inside = tl.program_id(0) % (GROUP * num_rows)
    groups = num_heads // GROUP
    batch = (group // groups).to(tl.int64)
    head = group % groups * GROUP + inside % GROUP
    row = inside // GROUP
    return batch, head, row, row // num_parts


@triton.jit
def part_slots(row, num_parts, count, BT: tl.constexpr):
    """Slots [first, last) of part `row`, whole tiles each, of a block of `count` slots."""
    span = tl.cdiv(tl.cdiv(count, num_parts), BT) * BT
    first = tl.minimum(row % num_parts * span, count)
    return first, tl.minimum(first + span, count)


@triton.jit
def block_of_tokens(tokens, box, RANK: tl.constexpr):
    """Block of each raster-order token (int32), the inverse of `box_tokens`; below 2**21 tokens."""
    T, H, W, LT, LH, LW = box
    row, w = _divide(tokens, W)
    block, _rest = _divide((w + 1) * LW - 1, W)
    if RANK > 1:
        t, h = _divide(row, H)
        block_h, _rest = _divide((h + 1) * LH - 1, H)
        block += block_h * LW
        if RANK > 2:
            block_t, _rest = _divide((t + 1) * LT - 1, T)
            block += block_t * (LH * LW)
    return block
