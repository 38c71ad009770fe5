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
        near, exists, own, owned = (), (), (), ()
        for index in tl.static_range((F + KT - 1) * NEAR):
            t, h = frame + index // NEAR - KT // 2, top + index % NEAR - KH // 2
            near += (((t * H + h) * W).to(tl.int64) * x_token,)
            exists += ((t >= 0) & (t < T) & (h >= 0) & (h < H),)
        for index in tl.static_range(F * R):
            t, h = frame + index // R, top + index % R
            own += (((t * H + h) * W).to(tl.int64) * grad_token,)
            owned += ((t < T) & (h < last),)
        # By frame, line and column; a column is loaded a step before the filter reaches it.
        window = _zeros((F + KT - 1) * NEAR * KW, BC)
        ahead = _column(x_ptr, near, exists, 0, x_token, W, held)
        for column in range(0, W + KW // 2):
            moved = ()
            for index in tl.static_range((F + KT - 1) * NEAR):
                moved += window[index * KW + 1 : index * KW + KW]
                moved += (ahead[index].to(tl.float32),)
            window = moved
            ahead = _column(x_ptr, near, exists, column + 1, x_token, W, held)
            here = column - KW // 2
            found = _column(grad_ptr, own, owned, here, grad_token, W, held)
            grads = ()
            for index in tl.static_range(F * R):
                grads += (found[index].to(tl.float32),)
                bias_sum += grads[index]
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
def _column(x_ptr, lines, exists, column, x_token, W, held):
    """Tokens of one column in several lines, 0 where there is none."""
    inside = (column >= 0) & (column < W)
    found = ()
    for index in tl.static_range(len(lines)):
        offset = lines[index] + column * x_token
        found += (tl.load(x_ptr + offset, mask=exists[index] & inside & held, other=0.0),)
    return found


@triton.jit
def _zeros(COUNT: tl.constexpr, BC: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(COUNT):
        zeros += (tl.zeros((BC,), tl.float32),)
    return zeros
