"""What may follow a depthwise convolution in the same pass: a sum with other tokens and a gate."""

import triton
import triton.language as tl


@triton.jit
def finish(
    total, out_ptr, kept_ptr, added_ptr, logits_ptr, rows, valid, channels, held,
    added_token, logits_token, C, HEADS,
    ADDS: tl.constexpr, GATE: tl.constexpr, HEAD_DIM: tl.constexpr, SPAN: tl.constexpr,
    KEEPS: tl.constexpr,
):  # fmt: skip
    """Store `total`, or (added + total) · SiLU(logits), of rows [BT, 1] and channels [1, BC].

    Rows count from the pointers' positions; `valid` and `held` tell which rows and channels exist.
    `GATE`: 0 for none, 1 for one number per channel, 2 for one per head of `HEAD_DIM` channels, of
    which a tile touches at most `SPAN`. With `KEEPS`, what the gate multiplies is also stored.
    """
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    mask = valid & held
    if ADDS:
        added = tl.load(added_ptr + rows * added_token + channels, mask=mask, other=0.0)
        total += added.to(tl.float32)
    if KEEPS:
        tl.store(kept_ptr + rows * C + channels, total.to(dtype), mask=mask)
    if GATE == 1:
        logits = tl.load(logits_ptr + rows * logits_token + channels, mask=mask, other=0.0)
        total *= _silu(logits)
    elif GATE == 2:
        heads = channels // HEAD_DIM
        first = tl.min(heads, axis=1, keep_dims=True)
        factors = tl.zeros(total.shape, tl.float32)
        for index in tl.static_range(SPAN):
            head = first + index
            exists = valid & (head < HEADS)
            logits = tl.load(logits_ptr + rows * logits_token + head, mask=exists, other=0.0)
            factors = tl.where(heads == head, _silu(logits), factors)
        total *= factors
    tl.store(out_ptr + rows * C + channels, total.to(dtype), mask=mask)


@triton.jit
def _silu(logits):
    """Float32, rounded as the logits are: a gate that starts at one is one in every dtype."""
    x = logits.to(tl.float32)
    return (x * tl.sigmoid(x)).to(logits.dtype).to(tl.float32)
