"""Launches of the linear form: summarise → mix → apply, and their backward."""

import math
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from mhla_gen.ops.kernels.compiled import launch
from mhla_gen.ops.kernels.launch import (
    Call,
    alignment,
    mixing_strides,
    padded,
    quotient_up,
    shared_axes,
)
from mhla_gen.ops.kernels.linear import apply_kernel, summarise_kernel
from mhla_gen.ops.kernels.linear_backward import backward_keys_kernel, backward_queries_kernel
from mhla_gen.ops.kernels.mixing import coefficients_kernel, correlate_kernel, mix_kernel

# Tokens of a tile, warps, pipeline stages and registers of a thread for 16-bit operands, by the
# padded channels; measured, see docs/kernel-speed.md.
_TILES = {
    "summarise": {64: (64, 4, 2, None), 80: (64, 4, 1, None), 128: (32, 4, 4, None)},
    "apply": {64: (64, 4, 3, None), 80: (64, 4, 1, 128), 128: (64, 8, 1, 128)},
    "backward_queries": {64: (64, 4, 2, None), 80: (64, 4, 1, None), 128: (32, 8, 3, None)},
    "backward_keys": {64: (64, 4, 2, None), 80: (64, 4, 1, None), 128: (32, 4, 1, None)},
}
# The same for more than 64 channels and blocks of at most so many tokens, which are one tile, so
# that nothing can be loaded ahead.
_SMALL_BLOCKS = {
    "summarise": {64: (64, 4, 1, None)},
    "backward_queries": {32: (32, 4, 1, None), 64: (64, 8, 1, None)},
}
# Registers for 72 and 80 channels where there is neither a loop over tokens nor rotary embedding:
# `apply` needs few, and with 128 a fourth program of `backward_keys` fits on a multiprocessor.
_PLAIN_REGISTERS = {"apply": None, "backward_keys": 128}

# Compile-time arguments of the kernels over tokens, by name, kind of call and strides.
_CONSTANTS: dict[tuple, dict] = {}


class Summaries(NamedTuple):
    """Summaries of the parts of all blocks, or what mixing makes of them."""

    matrices: Tensor
    """`[batch, rows, heads, head_dim, value_dim]`, float16 or float32."""
    scales: Tensor
    """Float32 `[batch, rows, heads]`: scales of the float16 matrices."""
    key_sums: Tensor
    """Float32 `[batch, rows, heads, head_dim]`."""

    @classmethod
    def empty(
        cls, query: Tensor, value: Tensor, rows: int, stored: torch.dtype, normalize: bool
    ) -> "Summaries":
        """Uninitialised summaries of `rows` rows; tensors that a call does not need are empty."""
        batch, _, heads, head_dim = query.shape
        scales = heads if stored == torch.float16 else 0
        sums = head_dim if normalize else 0
        return cls(
            query.new_empty((batch, rows, heads, head_dim, value.shape[3]), dtype=stored),
            query.new_empty((batch, rows, scales), dtype=torch.float32),
            query.new_empty((batch, rows, heads, sums), dtype=torch.float32),
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
    mixing_trains: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and mixing; the last is empty if unused."""
    dquery, dmixed = backward_queries(grad, query, value, mixed, call)
    dmixing = correlate(dmixed, summaries, mixing, call) if mixing_trains else mixing.new_empty(0)
    dsummaries = mix(mixing.mT, dmixed, call)
    dkey, dvalue = backward_keys(key, value, dsummaries, call)
    return dquery, dkey, dvalue, dmixing


def _empty(call: Call, rows: int) -> Summaries:
    return Summaries.empty(call.query, call.value, rows, call.stored, call.normalize)


def summarise(key: Tensor, value: Tensor, call: Call) -> Summaries:
    """Summaries and key sums of every part of every block."""
    summaries = _empty(call, call.num_blocks * call.num_parts)
    tensors = key, value, call.cos, call.sin, *summaries
    _over_tokens(summarise_kernel, "summarise", call, tensors, (key.stride(), value.stride()))
    return summaries


def mix(mixing: Tensor, summaries: Summaries, call: Call, triangle: str | None = None) -> Summaries:
    """Σ_b m_ib S_b, over all parts of block b; there may be more blocks b than i.

    `triangle` is "lower" or "upper" if m is 0 on the other side and blocks have one part.
    """
    batch, rows, heads, head_dim, value_dim = summaries.matrices.shape
    mixed = _empty(call, call.num_blocks)
    tiles = mix_tiles(call.num_blocks, rows, call.stored)
    padded_blocks = quotient_up(call.num_blocks, tiles["BI"]) * tiles["BI"]
    padded_rows = quotient_up(rows, tiles["BR"]) * tiles["BR"]
    coefficients = summaries.matrices.new_empty((batch, heads, padded_blocks, padded_rows))
    sizes = heads, call.num_blocks, rows
    padded_sizes = padded_blocks, padded_rows
    launch(
        coefficients_kernel,
        (batch * heads * padded_blocks // 16,),
        (mixing, *summaries[1:], coefficients, *mixed[1:]),
        (mixing_strides(mixing), *sizes, call.num_parts, *padded_sizes),
        {
            "D": head_dim,
            "BD": padded(head_dim),
            "BI": 16,
            "BR": padded(padded_rows),
            "BZ": min(64, padded(rows)),
            "NORMALIZE": call.normalize,
            "num_warps": max(4, padded(padded_rows) // 128),
        },
    )
    columns = quotient_up(head_dim * value_dim, tiles["BC"])
    launch(
        mix_kernel,
        (padded_blocks // tiles["BI"] * columns * batch * heads,),
        (coefficients, summaries.matrices, mixed.matrices),
        (*sizes, *padded_sizes),
        {"D": head_dim, "V": value_dim, "TRIANGLE": triangle, **tiles},
    )
    return mixed


def apply(query: Tensor, value: Tensor, mixed: Summaries, call: Call) -> Tensor:
    """The output, shaped and typed like `value`."""
    out = value.new_empty(value.shape)
    tensors = query, call.cos, call.sin, *mixed, out
    _over_tokens(apply_kernel, "apply", call, tensors, (query.stride(), out.stride()), call.eps)
    return out


def backward_queries(
    grad: Tensor, query: Tensor, value: Tensor, mixed: Summaries, call: Call
) -> tuple[Tensor, Summaries]:
    """Gradients of the queries and, by part, of the mixed summaries."""
    dquery = query.new_empty(query.shape)
    dmixed = _empty(call, call.num_blocks * call.num_parts)
    tensors = query, grad, call.cos, call.sin, *mixed, dquery, *dmixed
    strides = query.stride(), grad.stride(), dquery.stride()
    _over_tokens(backward_queries_kernel, "backward_queries", call, tensors, strides, call.eps)
    return dquery, dmixed


def correlate(
    dmixed: Summaries, summaries: Summaries, mixing: Tensor, call: Call, lower: bool = False
) -> Tensor:
    """Gradient of mixing, <dS̃_i, S_b> + <dz̃_i, z_b>, in a fixed order of summation.

    If `lower`, entries above the diagonal are undefined.
    """
    batch, rows, heads, head_dim, value_dim = dmixed.matrices.shape
    others = summaries.matrices.shape[1]
    tiles = correlate_tiles(rows, call.stored)
    pairs = quotient_up(rows, tiles["BI"]) * quotient_up(others, tiles["BI"])
    columns = head_dim * value_dim
    splits = max(1, min(512 // (pairs * batch * heads), columns // 1024))
    partial = summaries.key_sums.new_empty((batch, heads, splits, rows, others))
    launch(
        correlate_kernel,
        (pairs * splits * batch * heads,),
        (*dmixed, *summaries, partial),
        (heads, rows, others, splits),
        {"D": head_dim, "V": value_dim, "NORMALIZE": call.normalize, "LOWER": lower, **tiles},
    )
    parts = call.num_parts
    sizes = (call.num_blocks, parts, others // parts, parts)
    summed = (*shared_axes(mixing), 2, 4, 6)
    return partial.view(batch, heads, splits, *sizes).sum(dim=summed).to(mixing.dtype)


def backward_keys(
    key: Tensor, value: Tensor, dsummaries: Summaries, call: Call
) -> tuple[Tensor, Tensor]:
    """Gradients of keys and values."""
    dkey, dvalue = key.new_empty(key.shape), value.new_empty(value.shape)
    tensors = key, value, call.cos, call.sin, *dsummaries, dkey, dvalue
    strides = key.stride(), value.stride(), dkey.stride(), dvalue.stride()
    _over_tokens(backward_keys_kernel, "backward_keys", call, tensors, strides)
    return dkey, dvalue


def _over_tokens(
    kernel: Any, name: str, call: Call, tensors: tuple, strides: tuple, *others: float
) -> None:
    """Launch one program for each part and head."""
    scalars = *strides, call.box, call.window, call.num_heads, call.num_parts, *others
    key = name, call.kind, strides
    constants = _CONSTANTS.get(key)
    if constants is None:
        constants = _CONSTANTS[key] = tile_options(name, call) | {"ALIGN": alignment(*strides)}
    launch(kernel, call.programs, tensors, scalars, constants)


def tile_options(kernel: str, call: Call) -> dict:
    """Compile-time sizes of one of the kernels over tokens."""
    whole = {"D0": call.tile["BD"], "D1": 0, "V0": call.tile["BV"], "V1": 0}
    channels, tiles = call.pieces, token_tiles(kernel, call, call.pieces)
    spare = has_spare_column(call)
    # In a loop over tokens, pieces of a gradient of queries or of a summary would not fit the
    # registers. Those of a summary pay if they spare half of a wide tile and hold its key sums.
    in_one = call.block_size > tiles["BT"]
    if kernel == "summarise":
        in_one |= not spare or max(whole.values()) <= 64
    if in_one and kernel in ("summarise", "backward_queries"):
        channels, tiles, spare = whole, token_tiles(kernel, call, whole), False
    options = call.options | channels | tiles
    options["ONE_TILE"] = call.block_size <= options["BT"]
    # Up to this many heads are neighbours in the launch grid.
    options["GROUP"] = call.num_heads if call.num_heads <= 16 else math.gcd(call.num_heads, 8)
    if kernel == "summarise":
        # A thread loads eight channels at once, so this many rows come with one instruction.
        options["WAVE"] = min(options["BT"], options["num_warps"] * 32 * 8 // options["D0"])
    if kernel in ("summarise", "backward_queries"):
        options["SPARE"] = spare
    return options


def has_spare_column(call: Call) -> bool:
    """Whether values in pieces leave a column of their tile, where ones can sum the keys.

    With rotary embedding, key sums are not of the features in products; with split operands,
    products cost more than sums.
    """
    used = call.value.shape[3] - call.pieces["V0"]
    plain = call.normalize and call.cos is None and call.options["OPERAND"] != tl.float32
    return plain and 0 < used < call.pieces["V1"]


def token_tiles(kernel: str, call: Call, channels: dict[str, int]) -> dict:
    """Tokens of a tile, warps, stages and registers, for channels in these pieces."""
    columns, two_pieces = max(channels.values()), channels["D1"] > 0 or channels["V1"] > 0
    if call.options["OPERAND"] == tl.float32:
        # Split operands of two products over a wide summary would not fit the shared memory.
        precision = "ieee" if columns > 64 and kernel == "backward_keys" else "tf32x3"
        wide = columns > 64 or (two_pieces and kernel == "backward_queries")
        tokens = 16 if wide else 32
        return {"BT": tokens, "PRECISION": precision, "num_warps": 8, "num_stages": 1}
    tiles, small = _TILES[kernel], _SMALL_BLOCKS.get(kernel, {})
    if columns > 64:
        chosen = next((small[most] for most in small if call.block_size <= most), tiles[128])
    else:
        chosen = tiles[80] if two_pieces else tiles[64]
    tokens, warps, stages, registers = chosen
    sizes = call.query.shape[3], call.value.shape[3]
    one_tile = call.block_size <= tokens and call.cos is None
    if one_tile and max(sizes) in (72, 80) and all(size % 8 == 0 for size in sizes):
        registers = _PLAIN_REGISTERS.get(kernel, registers)
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
