"""Gradients of a small depthwise filter and its bias, summed along lines of the grid.

A program handles some channels of `R` lines of `F` frames at a time and moves along the columns.
What the filter reaches stays in registers, as do the sums, so that a step loads one column: a token
is read (F + KT - 1) (R + KH - 1) / (F R) times, not once for every tap.
"""

import triton
import triton.language as tl


@triton.jit
def sums_columns_kernel(
    x_ptr, grad_ptr, partial_ptr, bias_partial_ptr,
    C, T, H, W, frame_parts, line_parts, lines, x_batch, x_token, grad_batch, grad_token,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, F: tl.constexpr, R: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Sums over a part of x[n + tap] grad[n], for every tap, and of grad[n]."""
    NEAR: tl.constexpr = R + KH - 1
    TAPS: tl.constexpr = KT * KH * KW
    part = tl.program_id(0) // line_parts
    first = tl.program_id(0) % line_parts * lines
    last = tl.minimum(first + lines, H)
    frame = part % frame_parts * F
    batch = (part // frame_parts).to(tl.int64)
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    held = channels < C
    x_ptr += batch * x_batch + channels
    grad_ptr += batch * grad_batch + channels
    bias_sum = tl.zeros((BC,), tl.float32)
    sums = _zeros(TAPS, BC)
    for top in range(first, last, R):
        # By frame, line and column, the last of which is about to be read.
        window = _zeros((F + KT - 1) * NEAR * KW, BC)
        for column in range(0, W + KW // 2):
            moved = ()
            for index in tl.static_range((F + KT - 1) * NEAR):
                t, h = frame + index // NEAR - KT // 2, top + index % NEAR - KH // 2
                inside = (t >= 0) & (t < T) & (h >= 0) & (h < H) & (column < W)
                offset = ((t * H + h) * W + column).to(tl.int64) * x_token
                x = tl.load(x_ptr + offset, mask=inside & held, other=0.0).to(tl.float32)
                moved += window[index * KW + 1 : index * KW + KW]
                moved += (x,)
            window = moved
            here = column - KW // 2
            grads = ()
            for index in tl.static_range(F * R):
                t, h = frame + index // R, top + index % R
                inside = (t < T) & (h < last) & (here >= 0)
                offset = ((t * H + h) * W + here).to(tl.int64) * grad_token
                grad = tl.load(grad_ptr + offset, mask=inside & held, other=0.0).to(tl.float32)
                bias_sum += grad
                grads += (grad,)
            added = ()
            for tap in tl.static_range(TAPS):
                total = sums[tap]
                for f in tl.static_range(F):
                    for r in tl.static_range(R):
                        x = window[
                            ((f + tap // (KH * KW)) * NEAR + r + tap // KW % KH) * KW + tap % KW
                        ]
                        total += x * grads[f * R + r]
                added += (total,)
            sums = added
    row = tl.program_id(0) * C + channels
    for tap in tl.static_range(TAPS):
        tl.store(partial_ptr + row * TAPS + tap, sums[tap], mask=held)
    tl.store(bias_partial_ptr + row, bias_sum, mask=held)


@triton.jit
def _zeros(COUNT: tl.constexpr, BC: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(COUNT):
        zeros += (tl.zeros((BC,), tl.float32),)
    return zeros
