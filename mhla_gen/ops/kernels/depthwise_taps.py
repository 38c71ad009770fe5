"""Depthwise convolution with any filter: every tap reads the tokens again, mostly from cache.

A program handles some channels of some tokens in raster order.
"""

import triton
import triton.language as tl

from mhla_gen.ops.kernels.depthwise_output import finish, read_after
from mhla_gen.ops.kernels.depthwise_window import read_shared


@triton.jit
def _neighbours(
    x_ptr, x_token, halo_ptr, places, valid, channels, held, T, H, W, tap, window,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
):  # fmt: skip
    """Float32 `x` where the filters of tokens at these places of the grid have `tap`; 0 outside."""
    dt, dh, dw = tap // (KH * KW) - KT // 2, tap // KW % KH - KH // 2, tap % KW - KW // 2
    t, h, w = places // (H * W) + dt, places // W % H + dh, places % W + dw
    valid = valid & held & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    near = places + (dt * H + dh) * W + dw
    if window is None:
        valid = valid & (t >= 0) & (t < T)
        x = tl.load(x_ptr + near.to(tl.int64) * x_token + channels, mask=valid, other=0.0)
    else:
        x = read_shared(x_ptr, x_token, halo_ptr, near, channels, valid, window)
    return x.to(tl.float32)


@triton.jit
def conv_taps_kernel(
    x_ptr, halo_ptr, weight_ptr, bias_ptr, added_ptr, beside_ptr, shares_ptr, logits_ptr, out_ptr,
    kept_ptr, C, T, H, W, HEADS, x_batch, x_token, window, added_batch, added_token, beside_batch,
    beside_token, shares_batch, shares_token, logits_batch, logits_token,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    HAS_BIAS: tl.constexpr, ADDS: tl.constexpr, BLENDS: tl.constexpr, GATE: tl.constexpr,
    HEAD_DIM: tl.constexpr, SPAN: tl.constexpr, KEEPS: tl.constexpr, BT: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """out[n] = bias + Σ weight[tap] x[n + tap], and what `finish` makes of it.

    `weight` is [taps, channels]. For `window` see `depthwise_window.py`.
    """
    origin, seq_len = 0, T * H * W
    if window is not None:
        origin, seq_len = window[0], window[1]
    tokens = (tl.program_id(0) * BT + tl.arange(0, BT))[:, None]
    channels = (tl.program_id(1) * BC + tl.arange(0, BC))[None, :]
    batch = tl.program_id(2).to(tl.int64)
    valid, held = tokens < seq_len, channels < C
    x_ptr += batch * x_batch
    if window is not None:
        halo_ptr += batch * window[4]
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
    total = tl.zeros((BT, BC), tl.float32)
    if HAS_BIAS:
        total += tl.load(bias_ptr + channels, mask=held, other=0.0).to(tl.float32)
    for tap in tl.static_range(KT * KH * KW):
        x = _neighbours(
            x_ptr, x_token, halo_ptr, tokens + origin, valid, channels, held, T, H, W, tap, window,
            KT, KH, KW,
        )  # fmt: skip
        factor = tl.load(weight_ptr + tap * C + channels, mask=held, other=0.0)
        total += x * factor.to(tl.float32)
    rows = tokens.to(tl.int64)
    after = read_after(
        added_ptr, beside_ptr, shares_ptr, logits_ptr, rows, valid, channels, held, added_token,
        beside_token, shares_token, logits_token, HEADS, ADDS, BLENDS, GATE, HEAD_DIM, SPAN,
    )  # fmt: skip
    finish(
        total, after, out_ptr, kept_ptr, rows, valid, channels, held, C, ADDS, BLENDS, GATE,
        HEAD_DIM, SPAN, KEEPS,
    )  # fmt: skip


@triton.jit
def sums_taps_kernel(
    x_ptr, halo_ptr, grad_ptr, partial_ptr, bias_partial_ptr,
    C, T, H, W, parts, part_size, x_batch, x_token, window, grad_batch, grad_token,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, GROUP: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Sums over a part of x[n + tap] grad[n], for GROUP taps in a row, and of grad[n].

    For `window` see `depthwise_window.py`.
    """
    TAPS: tl.constexpr = KT * KH * KW
    origin, seq_len = 0, T * H * W
    batch = (tl.program_id(0) // parts).to(tl.int64)
    if window is not None:
        origin, seq_len = window[0], window[1]
        halo_ptr += batch * window[4]
    first = tl.program_id(0) % parts * part_size
    last = tl.minimum(first + part_size, seq_len)
    channels = (tl.program_id(1) * BC + tl.arange(0, BC))[None, :]
    held = channels < C
    x_ptr += batch * x_batch
    grad_ptr += batch * grad_batch
    first_tap = tl.program_id(2) * GROUP
    bias_sum = tl.zeros((BT, BC), tl.float32)
    sums = ()
    for _ in tl.static_range(GROUP):
        sums += (tl.zeros((BT, BC), tl.float32),)
    for start in range(first, last, BT):
        tokens = (start + tl.arange(0, BT))[:, None]
        valid = tokens < last
        offsets = tokens.to(tl.int64) * grad_token + channels
        grad = tl.load(grad_ptr + offsets, mask=valid & held, other=0.0).to(tl.float32)
        bias_sum += grad
        added = ()
        for index in tl.static_range(GROUP):
            x = _neighbours(
                x_ptr, x_token, halo_ptr, tokens + origin, valid, channels, held, T, H, W,
                first_tap + index, window, KT, KH, KW,
            )  # fmt: skip
            added += (sums[index] + x * grad,)
        sums = added
    row = tl.program_id(0) * C + channels
    for index in tl.static_range(GROUP):
        total = tl.sum(sums[index], axis=0, keep_dims=True)
        tl.store(partial_ptr + row * TAPS + first_tap + index, total, mask=held)
    centre = first_tap + GROUP // 2 == TAPS // 2
    tl.store(bias_partial_ptr + row, tl.sum(bias_sum, axis=0, keep_dims=True), mask=held & centre)
