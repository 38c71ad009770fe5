"""Depthwise convolution with a small filter over frames: a line of several frames at a time.

A program handles some channels of some lines and columns of `F` frames, and moves down the lines.
It adds each line, of these frames and those beside them, to the sums of the `KH` lines of every
frame that the filter reaches from it. So it reads a token (F + KT - 1) · KW / F times for each of
its outputs, not KT · KH · KW times. Registers hold the sums until they are complete; factors are
read again at every line, for all frames.
"""

import triton
import triton.language as tl

from mhla_gen.ops.kernels.depthwise_output import finish, float32, read_after
from mhla_gen.ops.kernels.depthwise_window import own_tokens, read_shared


@triton.jit
def conv_frames_kernel(
    x_ptr, halo_ptr, weight_ptr, bias_ptr, added_ptr, beside_ptr, shares_ptr, logits_ptr, out_ptr,
    kept_ptr, C, T, H, W, line_parts, lines, HEADS, x_batch, x_token, window, added_batch,
    added_token, beside_batch, beside_token, shares_batch, shares_token, logits_batch, logits_token,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, HAS_BIAS: tl.constexpr,
    ADDS: tl.constexpr, BLENDS: tl.constexpr, GATE: tl.constexpr, HEAD_DIM: tl.constexpr,
    SPAN: tl.constexpr, KEEPS: tl.constexpr, ROW: tl.constexpr, F: tl.constexpr, BT: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """out[n] = bias + Σ weight[tap] x[n + tap], and what `finish` makes of it.

    `weight` is [taps, ROW], float32; its rows hold whole tiles of channels. Neighbouring
    programs handle the same tokens. For `window` see `depthwise_window.py`.
    """
    column_parts, frame_parts = tl.cdiv(W, BT), tl.cdiv(T, F)
    tiles: tl.constexpr = ROW // BC
    part, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    here = (part % column_parts * BT + tl.arange(0, BT))[:, None]
    first = part // column_parts % line_parts * lines
    last = tl.minimum(first + lines, H)
    part = part // (column_parts * line_parts)
    frame = part % frame_parts * F
    batch = (part // frame_parts).to(tl.int64)
    channels = (tile * BC + tl.arange(0, BC))[None, :]
    held = channels < C
    seq_len = T * H * W
    if window is not None:
        seq_len = window[1]
        halo_ptr += batch * window[4]
    x_ptr += batch * x_batch
    out_ptr += batch * seq_len * C
    if KEEPS:
        kept_ptr += batch * seq_len * C
    if ADDS:
        added_ptr += batch * added_batch
    if BLENDS:
        beside_ptr += batch * beside_batch
        shares_ptr += batch * shares_batch
    if GATE > 0:
        logits_ptr += batch * logits_batch
    bias = tl.zeros((1, BC), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channels, mask=held, other=0.0).to(tl.float32)
    read = x_ptr, x_token, halo_ptr, window, weight_ptr, bias
    rest = added_ptr, beside_ptr, shares_ptr, logits_ptr, out_ptr, kept_ptr
    strides = added_token, beside_token, shares_token, logits_token
    part = frame, first, last, here, channels
    sizes = C, T, H, W, HEADS
    if window is None:
        _move_down(
            read, rest, strides, part, sizes, KT, KH, KW, ADDS, BLENDS, GATE, HEAD_DIM, SPAN, KEEPS,
            ROW, F, BT, BC, True,
        )  # fmt: skip
    else:
        # Received tokens take longer to find, and most programs read none.
        origin, _seq_len, before, after, _batch, _token = window
        start, stop = (frame - KT // 2) * H * W, (frame + F + KT // 2) * H * W
        start = tl.where(before == 0, tl.maximum(start, 0), start)
        stop = tl.where(after == 0, tl.minimum(stop, T * H * W), stop)
        if (start >= origin) & (stop <= origin + seq_len):
            _move_down(
                read, rest, strides, part, sizes, KT, KH, KW, ADDS, BLENDS, GATE, HEAD_DIM, SPAN,
                KEEPS, ROW, F, BT, BC, True,
            )  # fmt: skip
        else:
            _move_down(
                read, rest, strides, part, sizes, KT, KH, KW, ADDS, BLENDS, GATE, HEAD_DIM, SPAN,
                KEEPS, ROW, F, BT, BC, False,
            )  # fmt: skip


@triton.jit
def _move_down(
    read, rest, strides, part, sizes,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, ADDS: tl.constexpr, BLENDS: tl.constexpr,
    GATE: tl.constexpr, HEAD_DIM: tl.constexpr, SPAN: tl.constexpr, KEEPS: tl.constexpr,
    ROW: tl.constexpr, F: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """A part of the frames, from line to line; `OWN`: no token that it reads was received."""
    x_ptr, x_token, halo_ptr, window, weight_ptr, bias = read
    added_ptr, beside_ptr, shares_ptr, logits_ptr, out_ptr, kept_ptr = rest
    added_token, beside_token, shares_token, logits_token = strides
    frame, first, last, here, channels = part
    C, T, H, W, HEADS = sizes
    held = channels < C
    PH: tl.constexpr = KH // 2
    origin = 0
    if window is not None:
        origin = window[0]
    plane = tl.cast(H * W, tl.int64) * x_token
    # Of every frame, the lines from PH before to PH after the one that is read.
    totals = ()
    for _ in tl.static_range(F * KH):
        totals += (tl.zeros((BT, BC), tl.float32),)
    for line in range(first - PH, last + PH):
        place = (frame * H + line) * W + here
        x_line = x_ptr + (place - origin).to(tl.int64) * x_token + channels
        for kw in tl.static_range(KW):
            columns = here + (kw - KW // 2)
            inside = (line >= 0) & (line < H) & (columns >= 0) & (columns < W) & held
            xs = ()
            for index in tl.static_range(F + KT - 1):
                dt, dw = index - KT // 2, kw - KW // 2
                if OWN:
                    near = frame + dt
                    apart = dt * plane + dw * x_token
                    x = tl.load(x_line + apart, mask=inside & (near >= 0) & (near < T), other=0.0)
                else:
                    near = place + (dt * H * W + dw)
                    x = read_shared(x_ptr, x_token, halo_ptr, near, channels, inside, window)
                xs += (float32(x),)
            for kt in tl.static_range(KT):
                factors = ()
                for kh in tl.static_range(KH):
                    tap = ((kt * KH + kh) * KW + kw) * ROW
                    # Loaded by every thread that needs them, not exchanged among threads.
                    factors += (tl.load(tl.broadcast_to(weight_ptr + tap + channels, (BT, BC))),)
                added = ()
                for index in tl.static_range(F * KH):
                    # The sums of a frame are in the order of its lines.
                    x, factor = xs[index // KH + kt], factors[KH - 1 - index % KH]
                    added += (totals[index] + x * factor,)
                totals = added
        done = line - PH
        # Read for all frames before any is stored: nothing may be loaded ahead of a store.
        afters = ()
        for index in tl.static_range(F):
            valid = (done >= first) & (frame + index < T) & (here < W)
            rows, valid = own_tokens(((frame + index) * H + done) * W + here, valid, window)
            after = read_after(
                added_ptr, beside_ptr, shares_ptr, logits_ptr, rows.to(tl.int64), valid, channels,
                held, added_token, beside_token, shares_token, logits_token, HEADS, ADDS, BLENDS,
                GATE, HEAD_DIM, SPAN,
            )  # fmt: skip
            afters += (after,)
        moved = ()
        for index in tl.static_range(F):
            valid = (done >= first) & (frame + index < T) & (here < W)
            rows, valid = own_tokens(((frame + index) * H + done) * W + here, valid, window)
            finish(
                totals[index * KH] + bias, afters[index], out_ptr, kept_ptr, rows.to(tl.int64),
                valid, channels, held, C, ADDS, BLENDS, GATE, HEAD_DIM, SPAN, KEEPS,
            )  # fmt: skip
            for j in tl.static_range(1, KH):
                moved += (totals[index * KH + j],)
            moved += (tl.zeros((BT, BC), tl.float32),)
        totals = moved
