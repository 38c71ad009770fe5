"""Triton kernels of the depthwise convolution over tokens, as torch custom operators.

A program takes some channels of one part of one sequence and goes through its tokens tile by tile;
neighbours come from cache. One pass over the gradient finds those of tokens, filter and bias where
the registers hold all taps; a larger filter is cut into groups of taps, and the gradient of the
tokens is the same convolution with the filter turned around. Sums over tokens are taken in two
steps, so that they do not depend on the order of programs.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mhla_gen.ops.kernels.compiled import launch
from mhla_gen.ops.kernels.launch import quotient_up

INTERPRETED = triton.knobs.runtime.interpret
# Tokens and channels of a tile: whole 128-byte lines of half-precision channels, 8 for a thread.
_TOKENS, _CHANNELS = 16, 64
# A thread's registers hold this many taps of its channels.
_MOST_HELD_TAPS = 9
# Programs that keep a large GPU busy: several for each of 132 multiprocessors.
_ENOUGH_PROGRAMS = 2048


@triton.jit
def _part(parts, part_size, seq_len, C, BC: tl.constexpr):
    """What a program works on: its sequence, tokens [first, last) and channels."""
    batch = (tl.program_id(0) // parts).to(tl.int64)
    first = tl.program_id(0) % parts * part_size
    channels = (tl.program_id(1) * BC + tl.arange(0, BC))[None, :]
    return batch, first, tl.minimum(first + part_size, seq_len), channels, channels < C


@triton.jit
def _neighbours(
    x_ptr, x_token, tokens, valid, channels, held, T, H, W, tap,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SIGN: tl.constexpr,
):  # fmt: skip
    """Float32 `x` where each token's filter, turned around if SIGN is -1, has `tap`; 0 outside."""
    dt = SIGN * (tap // (KH * KW) - KT // 2)
    dh, dw = SIGN * (tap // KW % KH - KH // 2), SIGN * (tap % KW - KW // 2)
    h, w = tokens // W % H + dh, tokens % W + dw
    valid = valid & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    if KT > 1:
        t = tokens // (H * W) + dt
        valid = valid & (t >= 0) & (t < T)
    near = (tokens + (dt * H + dh) * W + dw).to(tl.int64)
    return tl.load(x_ptr + near * x_token + channels, mask=valid & held, other=0.0).to(tl.float32)


@triton.jit
def _factor(weight_ptr, tap, weight_tap, weight_channel, channels, held):
    """Float32 [1, BC] of one tap."""
    offsets = tap * weight_tap + channels * weight_channel
    return tl.load(weight_ptr + offsets, mask=held, other=0.0).to(tl.float32)


@triton.jit
def _factors(weight_ptr, weight_tap, weight_channel, channels, held, TAPS: tl.constexpr):
    """Those of all taps."""
    factors = ()
    for tap in tl.static_range(TAPS):
        factor = _factor(weight_ptr, tap, weight_tap, weight_channel, channels, held)
        factors += (factor,)
    return factors


@triton.jit
def _conv_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr,
    C, T, H, W, parts, part_size, x_batch, x_token, weight_tap, weight_channel,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    HAS_BIAS: tl.constexpr, SIGN: tl.constexpr, HOLD: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    TAPS: tl.constexpr = KT * KH * KW
    seq_len = T * H * W
    batch, first, last, channels, held = _part(parts, part_size, seq_len, C, BC)
    x_ptr += batch * x_batch
    out_ptr += batch * seq_len * C
    bias = tl.zeros((1, BC), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channels, mask=held, other=0.0).to(tl.float32)
    HELD_TAPS: tl.constexpr = TAPS if HOLD else 0
    factors = _factors(weight_ptr, weight_tap, weight_channel, channels, held, HELD_TAPS)
    for start in range(first, last, BT):
        tokens = (start + tl.arange(0, BT))[:, None]
        valid = tokens < last
        total = tl.zeros((BT, BC), tl.float32) + bias
        for tap in tl.static_range(TAPS):
            x = _neighbours(
                x_ptr, x_token, tokens, valid, channels, held, T, H, W, tap, KT, KH, KW, SIGN
            )
            if HOLD:
                total += x * factors[tap]
            else:
                total += x * _factor(weight_ptr, tap, weight_tap, weight_channel, channels, held)
        offsets = tokens.to(tl.int64) * C + channels
        tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=valid & held)


@triton.jit
def _backward_kernel(
    x_ptr, grad_ptr, weight_ptr, dx_ptr, partial_ptr, bias_partial_ptr,
    C, T, H, W, parts, part_size, x_batch, x_token, grad_batch, grad_token,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, GROUP: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Sums over a part for `GROUP` taps of the filter; with all taps dx too."""
    TAPS: tl.constexpr = KT * KH * KW
    WHOLE: tl.constexpr = GROUP == TAPS
    seq_len = T * H * W
    batch, first, last, channels, held = _part(parts, part_size, seq_len, C, BC)
    x_ptr += batch * x_batch
    grad_ptr += batch * grad_batch
    dx_ptr += batch * seq_len * C
    first_tap = 0 if WHOLE else tl.program_id(2) * GROUP
    factors = _factors(weight_ptr, 1, TAPS, channels, held, TAPS if WHOLE else 0)
    bias_sum = tl.zeros((BT, BC), tl.float32)
    sums = ()
    for _ in tl.static_range(GROUP):
        sums += (tl.zeros((BT, BC), tl.float32),)
    for start in range(first, last, BT):
        tokens = (start + tl.arange(0, BT))[:, None]
        valid = tokens < last
        x = tl.load(
            x_ptr + tokens.to(tl.int64) * x_token + channels, mask=valid & held, other=0.0
        ).to(tl.float32)
        dx = tl.zeros((BT, BC), tl.float32)
        added = ()
        for index in tl.static_range(GROUP):
            # Of the output that this token reaches through this tap.
            grad = _neighbours(
                grad_ptr, grad_token, tokens, valid, channels, held, T, H, W, first_tap + index,
                KT, KH, KW, -1,
            )  # fmt: skip
            added += (sums[index] + x * grad,)
            if WHOLE:
                dx += grad * factors[index]
            if index == GROUP // 2:
                # The centre, if this group has it.
                bias_sum += grad
        sums = added
        if WHOLE:
            offsets = tokens.to(tl.int64) * C + channels
            tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=valid & held)
    row = tl.program_id(0) * C + channels
    for index in tl.static_range(GROUP):
        total = tl.sum(sums[index], axis=0, keep_dims=True)
        tl.store(partial_ptr + row * TAPS + first_tap + index, total, mask=held)
    centre = first_tap + GROUP // 2 == TAPS // 2
    tl.store(bias_partial_ptr + row, tl.sum(bias_sum, axis=0, keep_dims=True), mask=held & centre)


@torch.library.custom_op("mhla_gen::depthwise_tokens", mutates_args=())
def depthwise_tokens(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, grid: list[int]
) -> Tensor:
    """See `mhla_gen.ops.depthwise.depthwise_conv`."""
    return _convolve(tokens, weight, bias, grid, sign=1)


@depthwise_tokens.register_fake
def _(tokens, weight, bias, grid):
    return tokens.new_empty(tokens.shape)


@torch.library.custom_op("mhla_gen::depthwise_tokens_backward", mutates_args=())
def depthwise_tokens_backward(
    grad: Tensor, tokens: Tensor, weight: Tensor, grid: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of tokens, weight and bias, the last in float32."""
    grad, tokens, weight = _unit_channels(grad), _unit_channels(tokens), weight.contiguous()
    batch, seq_len, channels = tokens.shape
    box, sizes = _box(weight, grid)
    taps = math.prod(sizes)
    whole = taps <= _MOST_HELD_TAPS
    group = taps if whole else _group(sizes)
    tiles = quotient_up(channels, _CHANNELS)
    parts, part_size = _parts(seq_len, batch * tiles * (taps // group))
    rows = batch * parts
    # In the order of the weight: compiled code relies on the strides of its gradient.
    partial = tokens.new_empty((rows, channels, taps), dtype=torch.float32)
    bias_partial = tokens.new_empty((rows, channels), dtype=torch.float32)
    tokens_grad = tokens.new_empty(tokens.shape) if whole else tokens
    with torch.cuda.device_of(tokens):
        launch(
            _backward_kernel,
            (rows, tiles, taps // group),
            (tokens, grad, weight, tokens_grad, partial, bias_partial),
            (channels, *box, parts, part_size, *tokens.stride()[:2], *grad.stride()[:2]),
            {**_named(sizes), "GROUP": group, "BT": _TOKENS, "BC": _CHANNELS},
        )
    if not whole:
        tokens_grad = _convolve(grad, weight, None, grid, sign=-1)
    weight_grad = partial.sum(dim=0).view(weight.shape).to(weight.dtype)
    return tokens_grad, weight_grad, bias_partial.sum(dim=0)


@depthwise_tokens_backward.register_fake
def _(grad, tokens, weight, grid):
    bias_grad = weight.new_empty(weight.shape[0], dtype=torch.float32)
    return tokens.new_empty(tokens.shape), weight.new_empty(weight.shape), bias_grad


def _setup(ctx, inputs, output):
    tokens, weight, bias, ctx.grid = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(tokens, weight)


def _backward(ctx, grad):
    tokens, weight = ctx.saved_tensors
    *gradients, bias_grad = depthwise_tokens_backward(grad, tokens, weight, ctx.grid)
    return *gradients, None if ctx.bias_dtype is None else bias_grad.to(ctx.bias_dtype), None


depthwise_tokens.register_autograd(_backward, setup_context=_setup)


def _convolve(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, grid: list[int], sign: int
) -> Tensor:
    tokens = _unit_channels(tokens)
    batch, seq_len, channels = tokens.shape
    out = tokens.new_empty(tokens.shape)
    box, sizes = _box(weight, grid)
    tiles = quotient_up(channels, _CHANNELS)
    hold = math.prod(sizes) <= _MOST_HELD_TAPS
    factors = weight.reshape(channels, -1).t()
    if hold:
        tile = _TOKENS
        parts, part_size = _parts(seq_len, batch * tiles)
    else:
        # Read again for every tile: a tap's factors should lie together, and tiles be large.
        factors = factors.contiguous()
        tile = part_size = 2 * _TOKENS
        parts = quotient_up(seq_len, tile)
    with torch.cuda.device_of(tokens):
        launch(
            _conv_kernel,
            (batch * parts, tiles),
            (tokens, factors, bias, out),
            (channels, *box, parts, part_size, *tokens.stride()[:2], *factors.stride()),
            {
                **_named(sizes),
                "HAS_BIAS": bias is not None,
                "SIGN": sign,
                "HOLD": hold,
                "BT": tile,
                "BC": _CHANNELS,
            },
        )
    return out


def _parts(seq_len: int, programs: int) -> tuple[int, int]:
    """Parts to cut a sequence into, and the tokens of each."""
    parts = quotient_up(_ENOUGH_PROGRAMS, programs)
    part_size = quotient_up(quotient_up(seq_len, parts), _TOKENS) * _TOKENS
    return quotient_up(seq_len, part_size), part_size


def _group(sizes: list[int]) -> int:
    """Taps of a larger filter that one program sums: those of a plane, or of a line."""
    plane = sizes[1] * sizes[2]
    return plane if plane <= _MOST_HELD_TAPS else sizes[2]


def _named(sizes: list[int]) -> dict[str, int]:
    return dict(zip(("KT", "KH", "KW"), sizes, strict=True))


def _unit_channels(tokens: Tensor) -> Tensor:
    """Kernels read rows of channels; any stride between rows and batches will do."""
    return tokens if tokens.stride(2) == 1 else tokens.contiguous()


def _box(weight: Tensor, grid: list[int]) -> tuple[list[int], list[int]]:
    """Grid and filter sizes with ones in front, so that there are always three axes."""
    ones = [1] * (3 - len(grid))
    return [*ones, *grid], [*ones, *weight.shape[2:]]
