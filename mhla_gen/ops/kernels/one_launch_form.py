"""The linear form's forward pass in one launch: when, and how."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mhla_gen.ops.kernels.compiled import launch
from mhla_gen.ops.kernels.launch import Call, alignment, mixing_strides, padded
from mhla_gen.ops.kernels.linear_form import Summaries
from mhla_gen.ops.kernels.one_launch import one_launch_kernel

# Rows of the mixing matrix that a program holds at once.
_MOST_BLOCKS = 64


@dataclass
class OneLaunch:
    """Settings of the forward pass in one launch."""

    allowed: bool = False
    """Off until it has been measured: benchmarks/kernel_speed.py times both ways."""
    fewest_heads: int = 128
    """Minimum number of heads of all sequences: about one per multiprocessor."""
    block_size: int = 64
    """Maximum number of tokens in a block, which is one tile."""
    num_warps: int = 4
    """Warps per program; with 4, two programs fit on a multiprocessor."""
    stages: int = 2
    """Blocks in flight: one is loaded while another is computed."""
    registers: int | None = None
    """Maximum number of registers per thread."""


SETTINGS = OneLaunch()


def fits(call: Call) -> bool:
    """Whether one program for each head keeps the GPU busy, and has blocks of one tile."""
    return (
        SETTINGS.allowed
        and call.stored == torch.float16
        and call.window is None
        and call.block_size <= SETTINGS.block_size
        and call.num_blocks <= _MOST_BLOCKS
        and call.query.shape[0] * call.num_heads >= SETTINGS.fewest_heads
    )


def forward(
    query: Tensor, key: Tensor, value: Tensor, mixing: Tensor, call: Call
) -> tuple[Tensor, Summaries, Summaries]:
    """Output, summaries and mixed summaries, as `linear_form.forward`."""
    summaries, mixed = (
        Summaries.empty(query, value, call.num_blocks, call.stored, call.normalize)
        for _ in range(2)
    )
    out = value.new_empty(value.shape)
    strides = query.stride(), key.stride(), value.stride(), out.stride()
    launch(
        one_launch_kernel,
        (query.shape[0] * call.num_heads,),
        (query, key, value, mixing, call.cos, call.sin, *summaries, *mixed, out),
        (*strides, mixing_strides(mixing), call.box, call.num_heads, call.eps),
        call.options
        | call.tile
        | call.pieces
        | {
            "BT": SETTINGS.block_size,
            "BI": padded(call.num_blocks),
            "BC": 128,
            # A thread loads eight channels at once.
            "WAVE": min(SETTINGS.block_size, SETTINGS.num_warps * 32 * 8 // call.tile["BD"]),
            "ALIGN": alignment(*strides),
            "PRECISION": "tf32x3",
            "STAGES": SETTINGS.stages,
            "num_warps": SETTINGS.num_warps,
            "maxnreg": SETTINGS.registers,
        },
    )
    return out, summaries, mixed
