"""Gradients of a small depthwise filter and its bias, summed along lines of the grid.

A program handles some channels of `R` lines of `F` frames at a time and moves along the columns.
What the filter reaches stays in registers, as do the sums, so that a step loads one column: a token
is read (F + KT - 1) (R + KH - 1) / (F R) times, not once for every tap.
"""

import triton
import triton.language as tl

from mhla_gen.ops.kernels.depthwise_window import own_tokens, read_shared


@triton.jit
def sums_columns_kernel(
    x_ptr, halo_ptr, grad_ptr, partial_ptr, bias_partial_ptr,
    C, T, H, W, frame_parts, line_parts, lines, x_batch, x_token, window, grad_batch, grad_token,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, F: tl.constexpr, R: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Sums over a part of x[n + tap] grad[n], for every tap, and of grad[n].

    For `window` see `depthwise_window.py`.
    """
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
    if window is not None:
        halo_ptr += batch * window[4] + channels
    bias_sum = tl.zeros((BC,), tl.float32)
    sums = _zeros(TAPS, BC)
    for top in range(first, last, R):
        near, exists, own, owned = (), (), (), ()
        for index in tl.static_range((F + KT - 1) * NEAR):
            t, h = frame + index // NEAR - KT // 2, top + index % NEAR - KH // 2
            valid, start = (h >= 0) & (h < H), (t * H + h) * W
            if window is None:
                valid, start = valid & (t >= 0) & (t < T), start.to(tl.int64) * x_token
            near += (start,)
            exists += (valid,)
        for index in tl.static_range(F * R):
            t, h = frame + index // R, top + index % R
            start = (t * H + h) * W
            if window is None:
                start = start.to(tl.int64) * grad_token
            own += (start,)
            owned += ((t < T) & (h < last),)
        # By frame, line and column; a column is loaded a step before the filter reaches it.
        reached = _zeros((F + KT - 1) * NEAR * KW, BC)
        ahead = _column(x_ptr, x_token, halo_ptr, near, exists, 0, W, held, window)
        for column in range(0, W + KW // 2):
            moved = ()
            for index in tl.static_range((F + KT - 1) * NEAR):
                moved += reached[index * KW + 1 : index * KW + KW]
                moved += (ahead[index].to(tl.float32),)
            reached = moved
            ahead = _column(x_ptr, x_token, halo_ptr, near, exists, column + 1, W, held, window)
            here = column - KW // 2
            found = _column(grad_ptr, grad_token, None, own, owned, here, W, held, window)
            grads = ()
            for index in tl.static_range(F * R):
                grads += (found[index].to(tl.float32),)
                bias_sum += grads[index]
            added = ()
            for tap in tl.static_range(TAPS):
                total = sums[tap]
                for f in tl.static_range(F):
                    for r in tl.static_range(R):
                        x = reached[
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
def _column(x_ptr, x_token, halo_ptr, lines, exists, column, W, held, window):
    """Tokens of one column in several lines, 0 where there is none; without a halo own ones only.

    Lines are where they begin: elements of `x`, with a window places on the grid.
    """
    inside = (column >= 0) & (column < W)
    found = ()
    for index in tl.static_range(len(lines)):
        valid = exists[index] & inside & held
        if window is None:
            offset = lines[index] + column * x_token
            found += (tl.load(x_ptr + offset, mask=valid, other=0.0),)
        elif halo_ptr is None:
            token, valid = own_tokens(lines[index] + column, valid, window)
            found += (tl.load(x_ptr + token.to(tl.int64) * x_token, mask=valid, other=0.0),)
        else:
            place = lines[index] + column
            found += (read_shared(x_ptr, x_token, halo_ptr, place, 0, valid, window),)
    return found


@triton.jit
def _zeros(COUNT: tl.constexpr, BC: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(COUNT):
        zeros += (tl.zeros((BC,), tl.float32),)
    return zeros
