"""Depthwise convolution with a small filter: every line of the grid is read once.

A program handles some channels of some lines and columns and moves down the lines. It adds each
line to the sums of the `KH` lines that the filter reaches; registers hold these sums until they are
complete, and the filter. Each of the `T` frames is a separate image.
"""

import triton
import triton.language as tl

from mhla_gen.ops.kernels.depthwise_output import finish, read_after


@triton.jit
def _frame_offset(frame, T, H, W, batch_stride, token_stride):
    """Elements from the start of a tensor to the first token of a frame."""
    return frame // T * batch_stride + frame % T * (H * W) * token_stride


@triton.jit
def _extent(part, line_parts, lines, column_parts, columns, H, W):
    """Number of the frame; its lines [first, last) and columns [left, right) in this part."""
    part_of_frame = part % (line_parts * column_parts)
    first = part_of_frame // column_parts * lines
    left = part_of_frame % column_parts * columns
    frame = (part // (line_parts * column_parts)).to(tl.int64)
    return frame, first, tl.minimum(first + lines, H), left, tl.minimum(left + columns, W)


@triton.jit
def _load(x_ptr, x_token, line, columns, channels, held, first, last, W):
    """Float32 tokens of a line, 0 where it is not in [first, last) or a column not on the grid."""
    inside = (line >= first) & (line < last)
    mask = inside & (columns >= 0) & (columns < W) & held
    offsets = (line * W + columns).to(tl.int64) * x_token + channels
    return tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(x_ptr, x, line, columns, channels, held, first, last, W, C):
    mask = (line >= first) & (line < last) & (columns < W) & held
    offsets = (line * W + columns).to(tl.int64) * C + channels
    tl.store(x_ptr + offsets, x.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _zeros(COUNT: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(COUNT):
        zeros += (tl.zeros((BT, BC), tl.float32),)
    return zeros


@triton.jit
def _filter(weight_ptr, channels, held, TAPS: tl.constexpr):
    """Float32 [1, BC] of every tap."""
    factors = ()
    for tap in tl.static_range(TAPS):
        factor = tl.load(weight_ptr + channels * TAPS + tap, mask=held, other=0.0)
        factors += (factor.to(tl.float32),)
    return factors


@triton.jit
def conv_lines_kernel(
    x_ptr, weight_ptr, bias_ptr, added_ptr, beside_ptr, shares_ptr, logits_ptr, out_ptr, kept_ptr,
    C, T, H, W, line_parts, lines, column_parts, columns, HEADS,
    x_batch, x_token, added_batch, added_token, beside_batch, beside_token, shares_batch,
    shares_token, logits_batch, logits_token,
    KH: tl.constexpr, KW: tl.constexpr, HAS_BIAS: tl.constexpr, ADDS: tl.constexpr,
    BLENDS: tl.constexpr, GATE: tl.constexpr, HEAD_DIM: tl.constexpr, SPAN: tl.constexpr,
    KEEPS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[n] = bias + Σ weight[tap] x[n + tap], and what `finish` makes of it."""
    PH: tl.constexpr = KH // 2
    frame, first, last, left, right = _extent(
        tl.program_id(0), line_parts, lines, column_parts, columns, H, W
    )
    channels = (tl.program_id(1) * BC + tl.arange(0, BC))[None, :]
    held = channels < C
    x_ptr += _frame_offset(frame, T, H, W, x_batch, x_token)
    out_ptr += frame * H * W * C
    if KEEPS:
        kept_ptr += frame * H * W * C
    if ADDS:
        added_ptr += _frame_offset(frame, T, H, W, added_batch, added_token)
    if BLENDS:
        beside_ptr += _frame_offset(frame, T, H, W, beside_batch, beside_token)
        shares_ptr += _frame_offset(frame, T, H, W, shares_batch, shares_token)
    if GATE > 0:
        logits_ptr += _frame_offset(frame, T, H, W, logits_batch, logits_token)
    factors = _filter(weight_ptr, channels, held, KH * KW)
    bias = tl.zeros((1, BC), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channels, mask=held, other=0.0).to(tl.float32)
    for start in range(left, right, BT):
        here = (start + tl.arange(0, BT))[:, None]
        # Of the lines from PH before to PH after the one that is read.
        totals = _zeros(KH, BT, BC)
        for line in tl.range(first - PH, last + PH, num_stages=STAGES):
            added = totals
            for kw in tl.static_range(KW):
                x = _load(x_ptr, x_token, line, here + (kw - KW // 2), channels, held, 0, H, W)
                sums = ()
                for j in tl.static_range(KH):
                    sums += (added[j] + x * factors[(KH - 1 - j) * KW + kw],)
                added = sums
            done = line - PH
            valid = (done >= first) & (done < last) & (here < W)
            rows = (done * W + here).to(tl.int64)
            after = read_after(
                added_ptr, beside_ptr, shares_ptr, logits_ptr, rows, valid, channels, held,
                added_token, beside_token, shares_token, logits_token, HEADS, ADDS, BLENDS, GATE,
                HEAD_DIM, SPAN,
            )  # fmt: skip
            finish(
                added[0] + bias, after, out_ptr, kept_ptr, rows, valid, channels, held, C, ADDS,
                BLENDS, GATE, HEAD_DIM, SPAN, KEEPS,
            )  # fmt: skip
            totals = added[1:] + _zeros(1, BT, BC)


@triton.jit
def backward_lines_kernel(
    x_ptr, grad_ptr, weight_ptr, dx_ptr, partial_ptr, bias_partial_ptr,
    C, T, H, W, line_parts, lines, column_parts, columns, x_batch, x_token, grad_batch, grad_token,
    KH: tl.constexpr, KW: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx[m] = Σ weight[tap] grad[m - tap]; sums over the part of x[m] grad[m - tap] and grad[m]."""
    TAPS: tl.constexpr = KH * KW
    PH: tl.constexpr = KH // 2
    frame, first, last, left, right = _extent(
        tl.program_id(0), line_parts, lines, column_parts, columns, H, W
    )
    channels = (tl.program_id(1) * BC + tl.arange(0, BC))[None, :]
    held = channels < C
    x_ptr += _frame_offset(frame, T, H, W, x_batch, x_token)
    grad_ptr += _frame_offset(frame, T, H, W, grad_batch, grad_token)
    dx_ptr += frame * H * W * C
    factors = _filter(weight_ptr, channels, held, TAPS)
    sums = _zeros(TAPS, BT, BC)
    bias_sum = tl.zeros((BT, BC), tl.float32)
    for start in range(left, right, BT):
        here = (start + tl.arange(0, BT))[:, None]
        # Of the lines from PH before to PH after the one of which the gradient is read.
        totals = _zeros(KH, BT, BC)
        xs = _zeros(KH, BT, BC)
        for line in tl.range(first - PH, last + PH, num_stages=STAGES):
            next_x = _load(x_ptr, x_token, line + PH, here, channels, held, first, last, W)
            # Lines before the first are 0 anyway; but Triton issues no loads ahead in a loop that
            # hands on a value as it is.
            kept = ()
            for j in tl.static_range(KH - 1):
                kept += (tl.where(line + j >= first + PH, xs[j + 1], 0.0),)
            xs = kept
            xs += (next_x,)
            for kw in tl.static_range(KW):
                grad = _load(
                    grad_ptr, grad_token, line, here - (kw - KW // 2), channels, held, 0, H, W
                )
                if kw == KW // 2:
                    own = (line >= first) & (line < last) & (here < W)
                    bias_sum += tl.where(own, grad, 0.0)
                new_totals = ()
                new_sums = ()
                for tap in tl.static_range(TAPS):
                    if tap % KW == kw:
                        new_sums += (sums[tap] + xs[tap // KW] * grad,)
                        new_totals += (totals[tap // KW] + factors[tap] * grad,)
                    else:
                        new_sums += (sums[tap],)
                sums = new_sums
                totals = new_totals
            _store(dx_ptr, totals[0], line - PH, here, channels, held, first, last, W, C)
            totals = totals[1:] + _zeros(1, BT, BC)
    row = tl.program_id(0) * C + channels
    for tap in tl.static_range(TAPS):
        total = tl.sum(sums[tap], axis=0, keep_dims=True)
        tl.store(partial_ptr + row * TAPS + tap, total, mask=held)
    tl.store(bias_partial_ptr + row, tl.sum(bias_sum, axis=0, keep_dims=True), mask=held)
