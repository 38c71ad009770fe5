"""What may follow a depthwise convolution in the same pass: a sum with attention and a gate."""

import triton
import triton.language as tl


@triton.jit
def read_after(
    added_ptr, beside_ptr, shares_ptr, logits_ptr, rows, valid, channels, held, added_token,
    beside_token, shares_token, logits_token, HEADS, ADDS: tl.constexpr, BLENDS: tl.constexpr,
    GATE: tl.constexpr, HEAD_DIM: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """What `finish` adds and multiplies by, of rows [BT, 1] and channels [1, BC].

    Rows count from the pointers' positions; `valid` and `held` tell which rows and channels exist.
    `GATE`: 0 for none, 1 for one number per channel, 2 for one per head of `HEAD_DIM` channels, of
    which a tile touches at most `SPAN`.
    """
    mask = valid & held
    added, beside, logits = (), (), ()
    shares = ()
    if ADDS:
        added += (tl.load(added_ptr + rows * added_token + channels, mask=mask, other=0.0),)
    if BLENDS:
        beside += (tl.load(beside_ptr + rows * beside_token + channels, mask=mask, other=0.0),)
        shares = _of_heads(shares_ptr + rows * shares_token, valid, channels, HEADS, HEAD_DIM, SPAN)
    if GATE == 1:
        logits += (tl.load(logits_ptr + rows * logits_token + channels, mask=mask, other=0.0),)
    elif GATE == 2:
        logits = _of_heads(logits_ptr + rows * logits_token, valid, channels, HEADS, HEAD_DIM, SPAN)
    return added, beside, shares, logits


@triton.jit
def finish(
    total, after, out_ptr, kept_ptr, rows, valid, channels, held, C, ADDS: tl.constexpr,
    BLENDS: tl.constexpr, GATE: tl.constexpr, HEAD_DIM: tl.constexpr, SPAN: tl.constexpr,
    KEEPS: tl.constexpr,
):  # fmt: skip
    """Store `total`, or (added + total) · SiLU(logits), with what `read_after` returned.

    With `BLENDS`, what is added is σ(shares) · added + σ(−shares) · beside, with a share per head.
    With `KEEPS`, what the gate multiplies is also stored.
    """
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    mask = valid & held
    added, beside, shares, logits = after
    if ADDS:
        first = float32(added[0])
        if BLENDS:
            weights = _by_head(shares, channels, HEAD_DIM, SPAN, False, dtype)
            first += (float32(beside[0]) - first) * weights
        total += first
    if KEEPS:
        tl.store(kept_ptr + rows * C + channels, total.to(dtype), mask=mask)
    if GATE == 1:
        total *= _silu(logits[0])
    elif GATE == 2:
        total *= _by_head(logits, channels, HEAD_DIM, SPAN, True, dtype)
    tl.store(out_ptr + rows * C + channels, total.to(dtype), mask=mask)


@triton.jit
def _of_heads(x_ptr, valid, channels, HEADS, HEAD_DIM: tl.constexpr, SPAN: tl.constexpr):
    """The number of every row for each head that the channels touch, [BT, 1]."""
    first = tl.min(channels // HEAD_DIM, axis=1, keep_dims=True)
    found = ()
    for index in tl.static_range(SPAN):
        exists = valid & (first + index < HEADS)
        found += (tl.load(x_ptr + first + index, mask=exists, other=0.0),)
    return found


@triton.jit
def _by_head(
    xs, channels, HEAD_DIM: tl.constexpr, SPAN: tl.constexpr, GATE: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """SiLU(x) if `GATE`, else σ(−x), for every channel of the number of its head."""
    heads = channels // HEAD_DIM
    first = tl.min(heads, axis=1, keep_dims=True)
    factors = tl.zeros((xs[0].shape[0], channels.shape[1]), tl.float32)
    for index in tl.static_range(SPAN):
        x = xs[index]
        factor = _silu(x) if GATE else sigmoid(-x).to(dtype).to(tl.float32)
        factors = tl.where(heads == first + index, factor, factors)
    return factors


@triton.jit
def _silu(logits):
    """Float32, rounded as the logits are: a gate that starts at one is one in every dtype."""
    return (float32(logits) * sigmoid(logits)).to(logits.dtype).to(tl.float32)


@triton.jit
def sigmoid(x):
    """σ(x) in float32; for bfloat16 to about 22 bits, in four operations."""
    if x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 t;
            mul.f32 t, $1, 0fBFB8AA3B;
            ex2.approx.ftz.f32 t, t;
            add.f32 t, t, 0f3F800000;
            rcp.approx.ftz.f32 $0, t;
            }""",
            "=f,f",
            [float32(x)],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return tl.sigmoid(x.to(tl.float32))


@triton.jit
def float32(x):
    """Float32 of any dtype; of bfloat16 in one operation for each number."""
    if x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=f,=f,r",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        return x.to(tl.float32)
