"""Launches of the causal form: summarise → mix → apply with scores of the own block; backward."""

import math
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from mhla_gen.ops.kernels import linear_form
from mhla_gen.ops.kernels.causal import causal_apply_kernel
from mhla_gen.ops.kernels.causal_backward import (
    causal_backward_keys_kernel,
    causal_backward_queries_kernel,
)
from mhla_gen.ops.kernels.compiled import launch
from mhla_gen.ops.kernels.launch import Call, alignment, shared_axes
from mhla_gen.ops.kernels.linear_form import Summaries

# Tokens of a tile and warps for 16-bit operands, by the padded channels: the largest tiles that fit
# the registers (compiled for sm_90, not timed).
_TILES = {
    "apply": {64: (64, 4), 128: (64, 8)},
    "backward_queries": {64: (64, 8), 128: (32, 8)},
    "backward_keys": {64: (64, 8), 128: (32, 8)},
}
# Longer blocks are split, since scores within a block cost its length squared.
LONGEST_BLOCK = 128


def forward(
    query: Tensor, key: Tensor, value: Tensor, mixing: Tensor, call: Call
) -> tuple[Tensor, Tensor, Summaries, Summaries]:
    """Output, inverse denominators, summaries and mixed summaries of earlier blocks."""
    summaries = linear_form.summarise(key, value, call)
    mixed = linear_form.mix(mixing.tril(-1), summaries, call, "lower")
    out = value.new_empty(value.shape)
    inverse = empty_vector(query, call.normalize)
    own = _own(mixing)
    tensors = query, key, value, call.cos, call.sin, own, *mixed, out, inverse
    strides = query.stride(), key.stride(), value.stride(), out.stride()
    _over_blocks(causal_apply_kernel, "apply", call, tensors, strides, _head_stride(own), call.eps)
    return out, inverse, summaries, mixed


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixing: Tensor,
    inverse: Tensor,
    summaries: Summaries,
    mixed: Summaries,
    call: Call,
    mixing_trains: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and mixing; the last is empty if unused."""
    own = _own(mixing)
    tokens = query, key, value, grad
    strides = tuple(x.stride() for x in tokens)
    dquery, delta = query.new_empty(query.shape), torch.empty_like(inverse)
    dmixed = Summaries.empty(query, value, call.num_blocks, call.stored, call.normalize)
    down = inverse.new_empty((query.shape[0], call.num_blocks, call.num_heads))
    _over_blocks(
        causal_backward_queries_kernel,
        "backward_queries",
        call,
        (*tokens, call.cos, call.sin, own, *mixed, inverse, dquery, *dmixed, down, delta),
        (*strides, dquery.stride()),
        _head_stride(own),
    )
    dmixing = mixing.new_empty(0)
    if mixing_trains:
        dmixing = linear_form.correlate(dmixed, summaries, mixing, call, lower=True).tril(-1)
        down = down.transpose(1, 2).sum(dim=shared_axes(mixing)).to(mixing.dtype)
        dmixing.diagonal(dim1=-2, dim2=-1).copy_(down)
    dsummaries = linear_form.mix(mixing.tril(-1).mT, dmixed, call, "upper")
    dkey, dvalue = key.new_empty(key.shape), value.new_empty(value.shape)
    _over_blocks(
        causal_backward_keys_kernel,
        "backward_keys",
        call,
        (*tokens, call.cos, call.sin, own, *dsummaries, inverse, delta, dkey, dvalue),
        (*strides, dkey.stride(), dvalue.stride()),
        _head_stride(own),
    )
    return dquery, dkey, dvalue, dmixing


def empty_vector(query: Tensor, normalize: bool) -> Tensor:
    """One uninitialised number per token and head, `[batch, heads, seq_len]`; empty if unused."""
    batch, seq_len, heads, _ = query.shape
    return query.new_empty((batch, heads, seq_len if normalize else 0), dtype=torch.float32)


def num_cuts(grid: list[int], layout: list[int], most_blocks: int) -> int:
    """Number of parts of every block, so that no part is long."""
    longest = -(-grid[0] // layout[0])
    return max(1, min(-(-longest // LONGEST_BLOCK), most_blocks // layout[0], grid[0] // layout[0]))


def _own(mixing: Tensor) -> Tensor:
    return mixing.diagonal(dim1=-2, dim2=-1).float().contiguous()


def _head_stride(own: Tensor) -> int:
    return 0 if own.ndim == 1 else own.stride(0)


def _over_blocks(
    kernel: Any, name: str, call: Call, tensors: tuple, strides: tuple, *others: float
) -> None:
    """Launch one program for each block and head."""
    own_stride, *rest = others
    scalars = *strides, own_stride, call.box, call.num_heads, *rest
    programs = (call.query.shape[0] * call.num_blocks * call.num_heads,)
    constants = _options(name, call) | {"ALIGN": alignment(*strides)}
    launch(kernel, programs, tensors, scalars, constants)


def _options(kernel: str, call: Call) -> dict:
    """Compile-time sizes of one of the kernels, except `ALIGN`."""
    options = call.options | call.tile
    del options["RANK"]
    options["GROUP"] = call.num_heads if call.num_heads <= 16 else math.gcd(call.num_heads, 8)
    columns = max(call.tile.values())
    if options["OPERAND"] == tl.float32:
        tokens = 16 if columns > 64 else 32
        return options | {"BT": tokens, "PRECISION": "tf32x3", "num_warps": 8, "num_stages": 1}
    tokens, warps = _TILES[kernel][64 if columns <= 64 else 128]
    # A block of one tile has nothing to load ahead.
    tokens = min(tokens, max(16, 1 << (call.block_size - 1).bit_length()))
    return options | {"BT": tokens, "PRECISION": "tf32x3", "num_warps": warps, "num_stages": 1}
