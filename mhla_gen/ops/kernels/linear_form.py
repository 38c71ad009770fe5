"""Launches of the linear form: summarise → mix → apply, and their backward."""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mhla_gen.ops.kernels.launch import Call, alignment, mixing_strides, padded
from mhla_gen.ops.kernels.linear import apply_kernel, summarise_kernel
from mhla_gen.ops.kernels.linear_backward import backward_keys_kernel, backward_queries_kernel
from mhla_gen.ops.kernels.mixing import coefficients_kernel, correlate_kernel, mix_kernel

# Tokens of a tile, warps, pipeline stages and registers of a thread for 16-bit operands.
_WIDE_TILES = {
    "summarise": (32, 4, 4, None),
    "apply": (64, 8, 1, 128),
    "backward_queries": (32, 8, 3, None),
    "backward_keys": (32, 8, 1, 128),
}
_NARROW_TILES = {
    "summarise": (64, 4, 2, None),
    "apply": (64, 4, 3, None),
    "backward_queries": (64, 4, 2, None),
    "backward_keys": (64, 4, 2, None),
}


class Summaries(NamedTuple):
    """Summaries of the parts of all blocks, or what mixing makes of them."""

    matrices: Tensor
    """`[batch, rows, heads, head_dim, value_dim]`, float16 or float32."""
    scales: Tensor
    """Float32 `[batch, rows, heads]`: what float16 matrices are multiples of."""
    key_sums: Tensor
    """Float32 `[batch, rows, heads, head_dim]`."""

    @classmethod
    def empty(cls, query: Tensor, value: Tensor, rows: int, stored: torch.dtype) -> "Summaries":
        """Uninitialised summaries of `rows` rows."""
        batch, _, heads, head_dim = query.shape
        return cls(
            query.new_empty((batch, rows, heads, head_dim, value.shape[3]), dtype=stored),
            query.new_empty((batch, rows, heads), dtype=torch.float32),
            query.new_empty((batch, rows, heads, head_dim), dtype=torch.float32),
        )


def forward(
    query: Tensor, key: Tensor, value: Tensor, mixing: Tensor, call: Call
) -> tuple[Tensor, Summaries, Summaries]:
    """Output, summaries and mixed summaries."""
    summaries = summarise(key, value, call)
    mixed = mix(mixing, summaries, call)
    return apply(query, value, mixed, call), summaries, mixed


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixing: Tensor,
    summaries: Summaries,
    mixed: Summaries,
    call: Call,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and mixing."""
    dquery, dmixed = backward_queries(grad, query, value, mixed, call)
    dmixing = correlate(dmixed, summaries, mixing, call)
    dsummaries = mix(mixing.mT, dmixed, call)
    dkey, dvalue = backward_keys(key, value, dsummaries, call)
    return dquery, dkey, dvalue, dmixing


def summarise(key: Tensor, value: Tensor, call: Call) -> Summaries:
    """Summaries and key sums of every part of every block."""
    summaries = Summaries.empty(key, value, call.num_blocks * call.num_parts, call.stored)
    summarise_kernel[call.programs](
        key, value, call.cos, call.sin, *summaries,
        key.stride(), value.stride(), call.box, call.num_heads, call.num_parts,
        ALIGN=alignment(key, value), **call.options, **tile_options("summarise", call),
    )  # fmt: skip
    return summaries


def mix(mixing: Tensor, summaries: Summaries, call: Call) -> Summaries:
    """Σ_b m_ib S_b, over all parts of block b."""
    batch, rows, heads, head_dim, value_dim = summaries.matrices.shape
    mixed = Summaries(
        summaries.matrices.new_empty((batch, call.num_blocks, heads, head_dim, value_dim)),
        summaries.scales.new_empty((batch, call.num_blocks, heads)),
        summaries.key_sums.new_empty((batch, call.num_blocks, heads, head_dim)),
    )
    tiles = mix_tiles(call.num_blocks, rows, call.stored)
    padded_blocks = triton.cdiv(call.num_blocks, tiles["BI"]) * tiles["BI"]
    padded_rows = triton.cdiv(rows, tiles["BR"]) * tiles["BR"]
    coefficients = summaries.matrices.new_empty((batch, heads, padded_blocks, padded_rows))
    coefficients_kernel[(batch * heads * padded_blocks // 16,)](
        mixing, summaries.scales, summaries.key_sums, coefficients, mixed.scales, mixed.key_sums,
        mixing_strides(mixing), heads, call.num_blocks, call.num_parts, padded_blocks, padded_rows,
        D=head_dim, BD=padded(head_dim), BI=16, BR=min(64, padded(rows)),
        NORMALIZE=call.normalize, num_warps=4,
    )  # fmt: skip
    columns = triton.cdiv(head_dim * value_dim, tiles["BC"])
    mix_kernel[(padded_blocks // tiles["BI"] * columns * batch * heads,)](
        coefficients, summaries.matrices, mixed.matrices,
        heads, call.num_blocks, rows, padded_blocks, padded_rows,
        D=head_dim, V=value_dim, **tiles,
    )  # fmt: skip
    return mixed


def apply(query: Tensor, value: Tensor, mixed: Summaries, call: Call) -> Tensor:
    """The output, shaped and typed like `value`."""
    out = value.new_empty(value.shape)
    apply_kernel[call.programs](
        query, call.cos, call.sin, *mixed, out,
        query.stride(), out.stride(), call.box, call.num_heads, call.num_parts, call.eps,
        ALIGN=alignment(query, out), **call.options, **tile_options("apply", call),
    )  # fmt: skip
    return out


def backward_queries(
    grad: Tensor, query: Tensor, value: Tensor, mixed: Summaries, call: Call
) -> tuple[Tensor, Summaries]:
    """Gradients of the queries and, by part, of the mixed summaries."""
    dquery = query.new_empty(query.shape)
    dmixed = Summaries.empty(query, value, call.num_blocks * call.num_parts, call.stored)
    backward_queries_kernel[call.programs](
        query, grad, call.cos, call.sin, *mixed, dquery, *dmixed,
        query.stride(), grad.stride(), dquery.stride(),
        call.box, call.num_heads, call.num_parts, call.eps,
        ALIGN=alignment(query, grad, dquery), **call.options,
        **tile_options("backward_queries", call),
    )  # fmt: skip
    return dquery, dmixed


def correlate(dmixed: Summaries, summaries: Summaries, mixing: Tensor, call: Call) -> Tensor:
    """Gradient of mixing, <dS̃_i, S_b> + <dz̃_i, z_b>, in a fixed order of summation."""
    batch, rows, heads, head_dim, value_dim = summaries.matrices.shape
    tiles = correlate_tiles(rows, call.stored)
    pairs = triton.cdiv(rows, tiles["BI"]) ** 2
    columns = head_dim * value_dim
    splits = max(1, min(512 // (pairs * batch * heads), columns // 1024))
    partial = summaries.scales.new_empty((batch, heads, splits, rows, rows))
    correlate_kernel[(pairs * splits * batch * heads,)](
        *dmixed, *summaries, partial, heads, rows, splits,
        D=head_dim, V=value_dim, NORMALIZE=call.normalize, **tiles,
    )  # fmt: skip
    parts = (call.num_blocks, call.num_parts)
    summed = (0, 2, 4, 6) if mixing.ndim == 3 else (0, 1, 2, 4, 6)
    return partial.view(batch, heads, splits, *parts, *parts).sum(dim=summed).to(mixing.dtype)


def backward_keys(
    key: Tensor, value: Tensor, dsummaries: Summaries, call: Call
) -> tuple[Tensor, Tensor]:
    """Gradients of keys and values."""
    dkey, dvalue = key.new_empty(key.shape), value.new_empty(value.shape)
    backward_keys_kernel[call.programs](
        key, value, call.cos, call.sin, *dsummaries, dkey, dvalue,
        key.stride(), value.stride(), dkey.stride(), dvalue.stride(),
        call.box, call.num_heads, call.num_parts,
        ALIGN=alignment(key, value, dkey, dvalue), **call.options,
        **tile_options("backward_keys", call),
    )  # fmt: skip
    return dkey, dvalue


def tile_options(kernel: str, call: Call) -> dict:
    """Tokens of a tile, warps and pipeline stages of the kernels over tokens."""
    options = _token_tiles(kernel, call) | {"GROUP": math.gcd(call.num_heads, 4)}
    if kernel in ("summarise", "backward_queries"):
        # A thread loads eight channels at once, so this many rows come with one instruction.
        threads = options["num_warps"] * 32
        for piece in ("0", "1"):
            rows_at_once = threads * 8 // max(16, call.options["D" + piece])
            options["WAVE" + piece] = min(options["BT"], rows_at_once)
    return options


def _token_tiles(kernel: str, call: Call) -> dict:
    wide = call.options["D0"] + call.options["V0"] > 128
    if call.options["OPERAND"] == tl.float32:
        # Split operands of two products over a wide summary would not fit the shared memory.
        precision = "ieee" if wide and kernel == "backward_keys" else "tf32x3"
        tokens = 16 if wide else 32
        return {"BT": tokens, "PRECISION": precision, "num_warps": 8, "num_stages": 1}
    # Measured on an H100; see docs/results/kernels_h100.json.
    tokens, warps, stages, registers = (_WIDE_TILES if wide else _NARROW_TILES)[kernel]
    return {
        "BT": tokens,
        "PRECISION": "tf32x3",
        "num_warps": warps,
        "num_stages": stages,
        "maxnreg": registers,
    }


def mix_tiles(num_blocks: int, rows: int, stored: torch.dtype) -> dict:
    """Tile sizes of the mixing product."""
    tile_i = 16 if num_blocks <= 16 else 32 if num_blocks <= 32 else 64
    tile_r = 16 if rows <= 16 else 32
    if stored == torch.float32:
        return {"BI": tile_i, "BR": tile_r, "BC": 64, "num_warps": 4, "num_stages": 2}
    return {"BI": tile_i, "BR": tile_r, "BC": 128, "num_warps": 4, "num_stages": 3}


def correlate_tiles(rows: int, stored: torch.dtype) -> dict:
    """Tile sizes of the product of summaries with their gradients."""
    tile_i = 16 if rows <= 16 else 32 if rows <= 32 else 64
    columns = 32 if stored == torch.float32 else 64
    return {"BI": tile_i, "BC": columns, "num_warps": 4, "num_stages": 3}
