"""Launches of the attention form and of its backward."""

import torch
import triton.language as tl
from torch import Tensor

from mhla_gen.ops.kernels.attention import attend_kernel
from mhla_gen.ops.kernels.attention_backward import (
    attention_backward_keys_kernel,
    attention_backward_queries_kernel,
)
from mhla_gen.ops.kernels.compiled import launch
from mhla_gen.ops.kernels.launch import (
    Call,
    alignment,
    mixing_strides,
    padded,
    quotient_up,
    shared_axes,
)


def forward(
    query: Tensor, key: Tensor, value: Tensor, mixing: Tensor, call: Call
) -> tuple[Tensor, Tensor]:
    """Output and inverse denominators `[batch, heads, seq_len]`, empty without `normalize`."""
    batch, seq_len, heads, _ = query.shape
    out = value.new_empty(value.shape)
    inverse = empty_inverse(query, call.normalize)
    tiles = tile_options("attend", call)
    strides = query.stride(), key.stride(), value.stride(), out.stride()
    launch(
        attend_kernel,
        (quotient_up(seq_len, tiles["BQ"]) * heads * batch,),
        (query, key, value, call.cos, call.sin, mixing, out, inverse),
        (*strides, mixing_strides(mixing), call.box, seq_len, heads, call.eps),
        _constants(call, tiles, seq_len) | {"ALIGN": alignment(*strides)},
    )
    return out, inverse


def empty_inverse(query: Tensor, normalize: bool) -> Tensor:
    """Uninitialised inverse denominators; an empty tensor if there are none."""
    batch, seq_len, heads, _ = query.shape
    return query.new_empty((batch, heads, seq_len if normalize else 0), dtype=torch.float32)


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixing: Tensor,
    out: Tensor,
    inverse: Tensor,
    call: Call,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and mixing."""
    dquery, delta, dmixing = backward_queries(grad, query, key, value, mixing, out, inverse, call)
    dkey, dvalue = backward_keys(grad, query, key, value, mixing, inverse, delta, call)
    return dquery, dkey, dvalue, dmixing


def backward_queries(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixing: Tensor,
    out: Tensor,
    inverse: Tensor,
    call: Call,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the queries, δ of every query, gradient of mixing."""
    batch, seq_len, heads, _ = query.shape
    tiles = tile_options("backward_queries", call)
    q_tiles = quotient_up(seq_len, tiles["BQ"])
    dquery, delta = query.new_empty(query.shape), torch.empty_like(inverse)
    partial = inverse.new_empty((batch, heads, q_tiles, call.num_blocks, call.num_blocks))
    tokens = query, key, value, out, grad
    strides = (*(x.stride() for x in tokens), dquery.stride())
    launch(
        attention_backward_queries_kernel,
        (q_tiles * heads * batch,),
        (*tokens, call.cos, call.sin, mixing, inverse, delta, dquery, partial),
        (*strides, mixing_strides(mixing), call.box, seq_len, heads),
        _constants(call, tiles, seq_len) | {"ALIGN": alignment(*strides)},
    )
    summed = (*shared_axes(mixing), 2)
    return dquery, delta, partial.sum(dim=summed).to(mixing.dtype)


def backward_keys(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixing: Tensor,
    inverse: Tensor,
    delta: Tensor,
    call: Call,
) -> tuple[Tensor, Tensor]:
    """Gradients of keys and values."""
    batch, seq_len, heads, _ = query.shape
    dkey, dvalue = key.new_empty(key.shape), value.new_empty(value.shape)
    tiles = tile_options("backward_keys", call)
    tokens = query, key, value, grad
    strides = (*(x.stride() for x in tokens), dkey.stride(), dvalue.stride())
    launch(
        attention_backward_keys_kernel,
        (quotient_up(seq_len, tiles["BK"]) * heads * batch,),
        (*tokens, call.cos, call.sin, mixing, inverse, delta, dkey, dvalue),
        (*strides, mixing_strides(mixing), call.box, seq_len, heads),
        _constants(call, tiles, seq_len) | {"ALIGN": alignment(*strides)},
    )
    return dkey, dvalue


def _constants(call: Call, tiles: dict, seq_len: int) -> dict:
    """Compile-time sizes and options, except `ALIGN`."""
    blocks = {"M": call.num_blocks, "BM": padded(call.num_blocks), "EVEN": even(seq_len, tiles)}
    return {**blocks, **call.options, **call.pieces, **tiles}


def tile_options(kernel: str, call: Call) -> dict:
    """Tokens of a tile, warps and pipeline stages."""
    if call.options["OPERAND"] == tl.float32:
        return {"BQ": 32, "BK": 32, "PRECISION": "ieee", "num_warps": 8, "num_stages": 1}
    wide = max(call.pieces["D0"] + call.pieces["D1"], call.pieces["V0"] + call.pieces["V1"]) > 80
    capped = kernel != "backward_keys" and not wide and not call.options["ROTARY"]
    return {
        "BQ": 64,
        "BK": 32 if kernel == "backward_queries" else 64,
        "PRECISION": "tf32x3",
        "num_warps": 4,
        "num_stages": 1,
        # So that three programs share a multiprocessor; what is left out here would spill.
        "maxnreg": 168 if capped else None,
    }


def even(seq_len: int, tiles: dict) -> bool:
    """Whether tiles divide the sequence."""
    return seq_len % tiles["BQ"] == 0 and seq_len % tiles["BK"] == 0
