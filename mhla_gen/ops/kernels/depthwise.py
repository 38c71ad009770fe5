"""Triton kernels of the depthwise convolution over tokens, as torch custom operators.

A program takes a tile of tokens and channels and reads every neighbour of the tile from cache; the
gradient of the tokens is the same convolution with the filter turned around. The gradient of the
filter is summed in two steps, so that it does not depend on the order of programs.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
# Tokens and channels of a tile: whole 128-byte lines of half-precision channels.
_TOKENS, _CHANNELS = 32, 64
# Parts of a sequence that the sum over tokens of the filter's gradient is cut into.
_PARTS = 32


@triton.jit
def _neighbour(tokens, t, h, w, T, H, W, tap, KH: tl.constexpr, KW: tl.constexpr, PT, PH, PW):
    """Token at `tap` of the filter around each token, and whether it lies on the grid."""
    dt, dh, dw = tap // (KH * KW) - PT, tap // KW % KH - PH, tap % KW - PW
    inside = (t + dt >= 0) & (t + dt < T) & (h + dh >= 0) & (h + dh < H)
    inside = inside & (w + dw >= 0) & (w + dw < W)
    return tokens + (dt * H + dh) * W + dw, inside


@triton.jit
def _conv_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr,
    C, T, H, W, x_batch, x_token,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    HAS_BIAS: tl.constexpr, TURNED: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    seq_len = T * H * W
    tokens = tl.program_id(0) * BT + tl.arange(0, BT)
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    batch = tl.program_id(2).to(tl.int64)
    t, h, w = tokens // (H * W), tokens // W % H, tokens % W
    held = channels < C
    total = tl.zeros((BT, BC), tl.float32)
    if HAS_BIAS:
        total += tl.load(bias_ptr + channels, mask=held, other=0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(KT * KH * KW):
        near, inside = _neighbour(tokens, t, h, w, T, H, W, tap, KH, KW, KT // 2, KH // 2, KW // 2)
        mask = (inside & (tokens < seq_len))[:, None] & held[None, :]
        offsets = near.to(tl.int64)[:, None] * x_token + channels[None, :]
        x = tl.load(x_ptr + batch * x_batch + offsets, mask=mask, other=0.0).to(tl.float32)
        entry = KT * KH * KW - 1 - tap if TURNED else tap
        factor = tl.load(weight_ptr + entry * C + channels, mask=held, other=0.0)
        total += x * factor.to(tl.float32)[None, :]
    mask = (tokens < seq_len)[:, None] & held[None, :]
    offsets = (batch * seq_len + tokens)[:, None] * C + channels[None, :]
    tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _weight_grad_kernel(
    x_ptr, grad_ptr, partial_ptr,
    C, T, H, W, parts, part_size, x_batch, x_token,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    seq_len = T * H * W
    tap, row = tl.program_id(0), tl.program_id(2)
    batch = (row // parts).to(tl.int64)
    first = row % parts * part_size
    last = tl.minimum(first + part_size, seq_len)
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    held = channels < C
    total = tl.zeros((BT, BC), tl.float32)
    for start in range(first, last, BT):
        tokens = start + tl.arange(0, BT)
        t, h, w = tokens // (H * W), tokens // W % H, tokens % W
        near, inside = _neighbour(tokens, t, h, w, T, H, W, tap, KH, KW, KT // 2, KH // 2, KW // 2)
        mask = (inside & (tokens < last))[:, None] & held[None, :]
        offsets = near.to(tl.int64)[:, None] * x_token + channels[None, :]
        x = tl.load(x_ptr + batch * x_batch + offsets, mask=mask, other=0.0)
        offsets = (batch * seq_len + tokens)[:, None] * C + channels[None, :]
        grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0)
        total += x.to(tl.float32) * grad.to(tl.float32)
    offset = (row * KT * KH * KW + tap) * C
    tl.store(partial_ptr + offset + channels, tl.sum(total, axis=0), mask=held)


@torch.library.custom_op("mhla_gen::depthwise_tokens", mutates_args=())
def depthwise_tokens(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, grid: list[int]
) -> Tensor:
    """See `mhla_gen.ops.depthwise.depthwise_conv`."""
    return _convolve(tokens, weight, bias, grid, turned=False)


@depthwise_tokens.register_fake
def _(tokens, weight, bias, grid):
    return tokens.new_empty(tokens.shape)


@torch.library.custom_op("mhla_gen::depthwise_tokens_backward", mutates_args=())
def depthwise_tokens_backward(
    grad: Tensor, tokens: Tensor, weight: Tensor, grid: list[int]
) -> tuple[Tensor, Tensor]:
    """Gradients of tokens and weight."""
    grad = grad.contiguous()
    tokens = _unit_channels(tokens)
    batch, seq_len, channels = tokens.shape
    box, sizes = _box(weight, grid)
    taps = math.prod(sizes)
    part_size = triton.cdiv(triton.cdiv(seq_len, _PARTS), _TOKENS) * _TOKENS
    parts = triton.cdiv(seq_len, part_size)
    partial = tokens.new_empty((batch * parts, taps, channels), dtype=torch.float32)
    with torch.cuda.device_of(tokens):
        _weight_grad_kernel[(taps, triton.cdiv(channels, _CHANNELS), batch * parts)](
            tokens, grad, partial, channels, *box, parts, part_size, *tokens.stride()[:2],
            *sizes, BT=_TOKENS, BC=_CHANNELS,
        )  # fmt: skip
    # In memory as the fake says: compiled code relies on its strides.
    weight_grad = partial.sum(dim=0).t().to(weight.dtype).contiguous().view(weight.shape)
    return _convolve(grad, weight, None, grid, turned=True), weight_grad


@depthwise_tokens_backward.register_fake
def _(grad, tokens, weight, grid):
    return tokens.new_empty(tokens.shape), weight.new_empty(weight.shape)


def _setup(ctx, inputs, output):
    tokens, weight, bias, ctx.grid = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(tokens, weight)


def _backward(ctx, grad):
    tokens, weight = ctx.saved_tensors
    tokens_grad, weight_grad = depthwise_tokens_backward(grad, tokens, weight, ctx.grid)
    bias_grad = None
    if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
        bias_grad = grad.sum(dim=(0, 1), dtype=torch.float32).to(ctx.bias_dtype)
    return tokens_grad, weight_grad, bias_grad, None


depthwise_tokens.register_autograd(_backward, setup_context=_setup)


def _convolve(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, grid: list[int], turned: bool
) -> Tensor:
    tokens = _unit_channels(tokens)
    batch, seq_len, channels = tokens.shape
    out = tokens.new_empty(tokens.shape)
    box, sizes = _box(weight, grid)
    launch = (triton.cdiv(seq_len, _TOKENS), triton.cdiv(channels, _CHANNELS), batch)
    # Channels last, so that a tap's factors lie together.
    factors = weight.reshape(channels, -1).t().contiguous()
    with torch.cuda.device_of(tokens):
        _conv_kernel[launch](
            tokens, factors, factors if bias is None else bias, out,
            channels, *box, *tokens.stride()[:2], *sizes,
            HAS_BIAS=bias is not None, TURNED=turned, BT=_TOKENS, BC=_CHANNELS,
        )  # fmt: skip
    return out


def _unit_channels(tokens: Tensor) -> Tensor:
    """Kernels read rows of channels; any stride between rows and batches will do."""
    return tokens if tokens.stride(2) == 1 else tokens.contiguous()


def _box(weight: Tensor, grid: list[int]) -> tuple[list[int], list[int]]:
    """Grid and filter sizes with ones in front, so that there are always three axes."""
    ones = [1] * (3 - len(grid))
    return [*ones, *grid], [*ones, *weight.shape[2:]]
