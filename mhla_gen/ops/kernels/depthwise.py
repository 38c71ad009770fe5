"""The depthwise convolution over tokens in Triton kernels, as torch custom operators.

Small filters within a frame are computed line by line (`depthwise_lines.py`): each token is read
once for every column of the filter, and one pass over the gradient computes those of tokens, filter
and bias. Small filters over frames are computed by lines of several frames (`depthwise_frames.py`),
and their gradient along the columns of a few lines (`depthwise_sums.py`); other filters are
computed tap by tap (`depthwise_taps.py`). There the gradient of the tokens is the same convolution
with the filter flipped. Sums over tokens are taken in two steps, so that they do not depend on the
order of programs.
"""

import math
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mhla_gen.ops.kernels.compiled import launch
from mhla_gen.ops.kernels.depthwise_frames import conv_frames_kernel
from mhla_gen.ops.kernels.depthwise_lines import backward_lines_kernel, conv_lines_kernel
from mhla_gen.ops.kernels.depthwise_sums import sums_columns_kernel
from mhla_gen.ops.kernels.depthwise_taps import conv_taps_kernel, sums_taps_kernel
from mhla_gen.ops.kernels.launch import quotient_up

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Tokens and channels of a tile: whole 128-byte lines of half-precision channels, 8 for a thread.
_TOKENS, _CHANNELS = 16, 64
# Line kernels: warps of a program, and lines in flight in the forward pass.
_WARPS, _STAGES = 4, 1
# In the backward pass, which holds more in registers: tokens and channels of a tile, warps, lines.
_BACKWARD = (8, 64, 4, 4)
# Number of taps per channel that fit into a thread's registers.
_MOST_HELD_TAPS = 9
# Most taps of the kernels over frames, whose programs have one warp; frames and columns of a
# program of the convolution and the most registers of a thread, with which twice as many programs
# fit; frames and lines of a program of the filter's gradient.
_MOST_FRAME_TAPS, _FRAMES, _COLUMNS, _REGISTERS = 27, 2, 2, 128
_SUM_FRAMES, _SUM_LINES = 2, 2
# Programs that keep a large GPU busy: several for each of 132 multiprocessors.
_ENOUGH_PROGRAMS = 1024
_ENOUGH_WARPS = 4096
# Minimum number of lines per program; the lines around them are read twice.
_FEWEST_LINES = 8


class After(NamedTuple):
    """What follows the convolution in the same pass; see `mhla_gen.ops.depthwise.gated_conv`."""

    added: Tensor
    """`[batch, seq_len, channels]`."""
    beside: Tensor | None
    """Like `added`, with which it is blended, or None."""
    shares: Tensor | None
    """Logits of the weight of `added` then, `[batch, seq_len, heads]`."""
    logits: Tensor | None
    """`[batch, seq_len, channels or heads]`."""
    num_heads: int
    """Heads."""
    keeps: bool
    """Whether the tensor that the gate multiplies is also returned."""


class Halo(NamedTuple):
    """Other ranks' tokens around own ones, if ranks share a sequence.

    The grid then is that of the planes in which own tokens lie.
    """

    tokens: Tensor
    """`[batch, received tokens, channels]`: those before the own ones, then those after them."""
    before: int
    """Number of received tokens before."""
    origin: int
    """Place of the first own token on the grid."""


@torch.library.custom_op("mhla_gen::depthwise_tokens", mutates_args=())
def depthwise_tokens(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, grid: list[int]
) -> Tensor:
    """See `mhla_gen.ops.depthwise.depthwise_conv`."""
    with torch.cuda.device_of(tokens):
        return convolve(unit_channels(tokens), weight, bias, grid)[0]


@depthwise_tokens.register_fake
def _(tokens, weight, bias, grid):
    return tokens.new_empty(tokens.shape)


@torch.library.custom_op("mhla_gen::depthwise_tokens_backward", mutates_args=())
def depthwise_tokens_backward(
    grad: Tensor, tokens: Tensor, weight: Tensor, grid: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of tokens, weight and bias, the last in float32."""
    grad, tokens = unit_channels(grad), unit_channels(tokens)
    box, sizes = _box(weight, grid)
    with torch.cuda.device_of(tokens):
        if _by_lines(sizes):
            found = _backward_by_lines(grad, tokens, weight.contiguous(), box, sizes)
            return found[0], *_summed(found[1], found[2], weight)
        tokens_grad, _ = convolve(grad, flipped(weight), None, grid)
        return tokens_grad, *filter_gradients(grad, tokens, weight, grid)


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


def flipped(weight: Tensor) -> Tensor:
    """The filter with which the gradient of the output makes that of the tokens."""
    return weight.flatten(1).flip(1).view(weight.shape)


def convolve(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: list[int],
    after: After | None = None,
    halo: Halo | None = None,
) -> tuple[Tensor, Tensor]:
    """The output, and the tensor that its gate multiplies, which is empty if not kept."""
    box, sizes = _box(weight, grid, halo)
    if halo is None and _by_lines(sizes):
        return _conv_by_lines(tokens, weight.contiguous(), bias, box, sizes, after)
    conv = _conv_by_frames if math.prod(sizes) <= _MOST_FRAME_TAPS else _conv_by_taps
    return conv(tokens, weight, bias, box, sizes, after, halo)


def filter_gradients(
    grad: Tensor, tokens: Tensor, weight: Tensor, grid: list[int], halo: Halo | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias, the latter in float32."""
    box, sizes = _box(weight, grid, halo)
    sums = _sums_by_columns if math.prod(sizes) <= _MOST_FRAME_TAPS else _sums_by_taps
    return _summed(*sums(grad, tokens, box, sizes, halo), weight)


def _summed(partial: Tensor, bias_partial: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return partial.sum(dim=0).view(weight.shape).to(weight.dtype), bias_partial.sum(dim=0)


def _by_lines(sizes: list[int]) -> bool:
    return sizes[0] == 1 and math.prod(sizes) <= _MOST_HELD_TAPS


def _conv_by_lines(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    box: list[int],
    sizes: list[int],
    after: After | None,
) -> tuple[Tensor, Tensor]:
    batch, _, channels = tokens.shape
    tiles = quotient_up(channels, _CHANNELS)
    frames = batch * box[0]
    parts, extent = _line_parts(box, frames * tiles, _TOKENS)
    tensors, strides, constants = _after(tokens, after)
    launch(
        conv_lines_kernel,
        (frames * parts, tiles),
        (tokens, weight, bias, *tensors),
        (channels, *box, *extent, after.num_heads if after else 1, *tokens.stride()[:2], *strides),
        {
            "KH": sizes[1],
            "KW": sizes[2],
            "HAS_BIAS": bias is not None,
            **constants,
            "BT": _TOKENS,
            "BC": _CHANNELS,
            "STAGES": _STAGES,
            "num_warps": _WARPS,
        },
    )
    return tensors[-2], tensors[-1]


def _after(tokens: Tensor, after: After | None) -> tuple[tuple[Any, ...], tuple[int, ...], dict]:
    """Tensors (added, beside, shares, logits, out, kept), strides and constants of `finish`."""
    out = tokens.new_empty(tokens.shape)
    if after is None:
        constants = {"ADDS": False, "BLENDS": False, "GATE": 0, "HEAD_DIM": 1, "SPAN": 1}
        return (*[None] * 4, out, out.new_empty(0)), (0,) * 8, {**constants, "KEEPS": False}
    *read, num_heads, keeps = after
    logits = after.logits
    head_dim = tokens.shape[2] // num_heads
    gate = 0 if logits is None else 1 if logits.shape[2] == tokens.shape[2] else 2
    # Heads that a tile of channels touches at most: its ends may lie in parts of heads.
    if _CHANNELS % head_dim == 0:
        span = _CHANNELS // head_dim
    elif head_dim % _CHANNELS == 0:
        span = 1
    else:
        span = (_CHANNELS - 2) // head_dim + 2
    constants = {
        "ADDS": True,
        "BLENDS": after.beside is not None,
        "GATE": gate,
        "HEAD_DIM": head_dim,
        "SPAN": span,
        "KEEPS": keeps,
    }
    strides = tuple(s for x in read for s in ((0, 0) if x is None else x.stride()[:2]))
    kept = tokens.new_empty(tokens.shape if keeps else 0)
    return (*read, out, kept), strides, constants


def _backward_by_lines(
    grad: Tensor, tokens: Tensor, weight: Tensor, box: list[int], sizes: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the tokens; partial sums of those of weight and bias."""
    batch, _, channels = tokens.shape
    width, block, warps, stages = _BACKWARD
    tiles = quotient_up(channels, block)
    frames = batch * box[0]
    parts, extent = _line_parts(box, frames * tiles, width)
    partial, bias_partial = _partial_sums(tokens, frames * parts, sizes)
    tokens_grad = tokens.new_empty(tokens.shape)
    launch(
        backward_lines_kernel,
        (frames * parts, tiles),
        (tokens, grad, weight, tokens_grad, partial, bias_partial),
        (channels, *box, *extent, *tokens.stride()[:2], *grad.stride()[:2]),
        {
            "KH": sizes[1],
            "KW": sizes[2],
            "BT": width,
            "BC": block,
            "STAGES": stages,
            "num_warps": warps,
        },
    )
    return tokens_grad, partial, bias_partial


def _conv_by_frames(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    box: list[int],
    sizes: list[int],
    after: After | None,
    halo: Halo | None,
) -> tuple[Tensor, Tensor]:
    batch, _, channels = tokens.shape
    tiles = quotient_up(channels, _CHANNELS)
    frames = min(box[0], _FRAMES)
    programs = batch * quotient_up(box[0], frames) * quotient_up(box[2], _COLUMNS)
    wanted = quotient_up(_ENOUGH_WARPS, programs * tiles)
    lines = max(min(box[1], _FEWEST_LINES), quotient_up(box[1], wanted))
    line_parts = quotient_up(box[1], lines)
    # Channels last, so that a tap's factors lie together, in whole tiles.
    factors = weight.new_empty((math.prod(sizes), tiles * _CHANNELS), dtype=torch.float32)
    factors[:, :channels] = weight.flatten(1).t()
    tensors, strides, constants = _after(tokens, after)
    num_heads = after.num_heads if after else 1
    launch(
        conv_frames_kernel,
        (programs * line_parts * tiles,),
        (tokens, halo.tokens if halo else None, factors, bias, *tensors),
        (channels, *box, line_parts, lines, num_heads, *_placed(tokens, halo), *strides),
        {
            **dict(zip(("KT", "KH", "KW"), sizes, strict=True)),
            "HAS_BIAS": bias is not None,
            **constants,
            "ROW": factors.shape[1],
            "F": frames,
            "BT": _COLUMNS,
            "BC": _CHANNELS,
            "num_warps": 1,
            "maxnreg": _REGISTERS,
        },
    )
    return tensors[-2], tensors[-1]


def _conv_by_taps(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    box: list[int],
    sizes: list[int],
    after: After | None,
    halo: Halo | None,
) -> tuple[Tensor, Tensor]:
    batch, seq_len, channels = tokens.shape
    # Channels last, so that a tap's factors lie together.
    factors = weight.reshape(channels, -1).t().contiguous()
    tensors, strides, constants = _after(tokens, after)
    launch(
        conv_taps_kernel,
        (quotient_up(seq_len, 2 * _TOKENS), quotient_up(channels, _CHANNELS), batch),
        (tokens, halo.tokens if halo else None, factors, bias, *tensors),
        (channels, *box, after.num_heads if after else 1, *_placed(tokens, halo), *strides),
        {
            **dict(zip(("KT", "KH", "KW"), sizes, strict=True)),
            "HAS_BIAS": bias is not None,
            **constants,
            "BT": 2 * _TOKENS,
            "BC": _CHANNELS,
        },
    )
    return tensors[-2], tensors[-1]


def _sums_by_taps(
    grad: Tensor, tokens: Tensor, box: list[int], sizes: list[int], halo: Halo | None
) -> tuple[Tensor, Tensor]:
    """Partial sums of the gradients of weight and bias."""
    batch, seq_len, channels = tokens.shape
    plane = sizes[1] * sizes[2]
    # One program sums the taps of a plane of the filter, or of a line of it.
    group = plane if plane <= _MOST_HELD_TAPS else sizes[2]
    tiles, groups = quotient_up(channels, _CHANNELS), math.prod(sizes) // group
    parts = quotient_up(_ENOUGH_PROGRAMS, batch * tiles * groups)
    part_size = quotient_up(quotient_up(seq_len, parts), _TOKENS) * _TOKENS
    parts = quotient_up(seq_len, part_size)
    partial, bias_partial = _partial_sums(tokens, batch * parts, sizes)
    launch(
        sums_taps_kernel,
        (batch * parts, tiles, groups),
        (tokens, halo.tokens if halo else None, grad, partial, bias_partial),
        (channels, *box, parts, part_size, *_placed(tokens, halo), *grad.stride()[:2]),
        {
            **dict(zip(("KT", "KH", "KW"), sizes, strict=True)),
            "GROUP": group,
            "BT": _TOKENS,
            "BC": _CHANNELS,
        },
    )
    return partial, bias_partial


def _sums_by_columns(
    grad: Tensor, tokens: Tensor, box: list[int], sizes: list[int], halo: Halo | None
) -> tuple[Tensor, Tensor]:
    """As `_sums_by_taps`, for a small filter."""
    batch, _, channels = tokens.shape
    tiles = quotient_up(channels, _CHANNELS)
    frames, held = min(box[0], _SUM_FRAMES), min(box[1], _SUM_LINES)
    frame_parts = quotient_up(box[0], frames)
    wanted = quotient_up(_ENOUGH_WARPS // 2, batch * frame_parts * tiles)
    lines = quotient_up(quotient_up(box[1], wanted), held) * held
    line_parts = quotient_up(box[1], lines)
    rows = batch * frame_parts * line_parts
    partial, bias_partial = _partial_sums(tokens, rows, sizes)
    launch(
        sums_columns_kernel,
        (rows, tiles),
        (tokens, halo.tokens if halo else None, grad, partial, bias_partial),
        (
            channels,
            *box,
            frame_parts,
            line_parts,
            lines,
            *_placed(tokens, halo),
            *grad.stride()[:2],
        ),
        {
            **dict(zip(("KT", "KH", "KW"), sizes, strict=True)),
            "F": frames,
            "R": held,
            "BC": _CHANNELS,
            "num_warps": 1,
        },
    )
    return partial, bias_partial


def _line_parts(
    box: list[int], programs: int, tokens: int
) -> tuple[int, tuple[int, int, int, int]]:
    """Parts to cut each frame into: how many, and (parts, size) along lines, then columns."""
    _, height, width = box
    wanted = quotient_up(_ENOUGH_PROGRAMS, programs)
    # Columns first: what lies around them comes from cache.
    tiles = quotient_up(width, tokens)
    columns = quotient_up(tiles, min(tiles, wanted)) * tokens
    column_parts = quotient_up(width, columns)
    lines = max(_FEWEST_LINES, quotient_up(height, quotient_up(wanted, column_parts)))
    line_parts = quotient_up(height, lines)
    return line_parts * column_parts, (line_parts, lines, column_parts, columns)


def _partial_sums(tokens: Tensor, rows: int, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Room for a row from every part; the filter in the order in which its gradient is expected."""
    channels, taps = tokens.shape[2], math.prod(sizes)
    partial = tokens.new_empty((rows, channels, taps), dtype=torch.float32)
    return partial, tokens.new_empty((rows, channels), dtype=torch.float32)


def unit_channels(tokens: Tensor) -> Tensor:
    """Make channels contiguous, as kernels need; rows and batches may have any stride."""
    return tokens if tokens.stride(2) == 1 else tokens.contiguous()


def _box(weight: Tensor, grid: list[int], halo: Halo | None = None) -> tuple[list[int], list[int]]:
    """Grid and filter sizes, padded with ones to three axes.

    In front, but after the first axis if it is that axis along which the sequence is cut.
    """
    ones, sizes = [1] * (3 - len(grid)), list(weight.shape[2:])
    if halo is None:
        return [*ones, *grid], [*ones, *sizes]
    return [grid[0], *ones, *grid[1:]], [sizes[0], *ones, *sizes[1:]]


def _placed(tokens: Tensor, halo: Halo | None) -> tuple[Any, ...]:
    """Strides of batch and tokens, and the window; see `depthwise_window.py`."""
    if halo is None:
        return *tokens.stride()[:2], None
    received, before, origin = halo
    counts = origin, tokens.shape[1], before, received.shape[1] - before
    return *tokens.stride()[:2], (*counts, *received.stride()[:2])
