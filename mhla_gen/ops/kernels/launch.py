"""The description of a call that every launch of a kernel over tokens needs."""

import math
from dataclasses import dataclass
from functools import cache, cached_property

import torch
import triton
import triton.language as tl
from torch import Tensor

from mhla_gen.errors import UserError

_OPERANDS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
# Programs that keep a large GPU busy: two for each of 132 multiprocessors, with some to spare.
_ENOUGH_PROGRAMS = 512
# A shorter part of a block costs more for its summary than it gains.
_SHORTEST_PART = 128
# Kernels compute a token's position in a box by float division, which is exact up to here.
_LARGEST_BOX = 2**21


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of summaries.

    For bfloat16 inputs, summaries are float16 with one scale each: as small, eight times finer and
    just as safe from overflow. Float16 inputs would lose precision that way.
    """
    return torch.float16 if dtype == torch.bfloat16 else torch.float32


def quotient_up(number: int, divisor: int) -> int:
    """`number / divisor`, rounded up; `triton.cdiv` takes as long as half a launch."""
    return -(-number // divisor)


@cache
def padded(size: int) -> int:
    """The power of two that holds `size` entries, at least what a matrix product needs."""
    return max(16, triton.next_power_of_2(size))


@cache
def pieces(channels: int) -> tuple[int, int]:
    """Powers of two that hold `channels` in two pieces, the second 0 if that saves nothing."""
    first = max(16, padded(channels + 1) // 2)
    second = padded(channels - first) if channels > first else 0
    return (first, second) if first + second < padded(channels) else (padded(channels), 0)


@cache
def alignment(*strides: tuple[int, ...]) -> int:
    """Number of elements, up to 16, that divides every row's offset.

    Args:
        strides: Strides of tensors `[batch, seq_len, heads, dim]`.
    """
    return math.gcd(16, *(stride for each in strides for stride in each[:3]))


def mixing_strides(mixing: Tensor) -> tuple[int, int, int]:
    """Strides (head, row, column); that of the head is 0 where heads share a matrix."""
    head, row, column = (0, *mixing.stride())[-3:]
    return head, row, column


def shared_axes(mixing: Tensor) -> tuple[int, ...]:
    """Which of the axes (batch, head) share a matrix, so that its gradient sums over them."""
    return tuple(range(4 - mixing.ndim))


def num_parts(batch_heads: int, grid: list[int], layout: list[int]) -> int:
    """Number of parts of a block, so that even a few long blocks fill the GPU."""
    programs = batch_heads * math.prod(layout)
    if programs >= _ENOUGH_PROGRAMS // 2:
        return 1
    return max(1, min(_ENOUGH_PROGRAMS // programs, block_size(grid, layout) // _SHORTEST_PART))


def block_size(grid: list[int], layout: list[int]) -> int:
    """Tokens of the largest block."""
    return math.prod(map(quotient_up, grid, layout))


def merge_axes(grid: list[int], layout: list[int]) -> tuple[list[int], list[int]]:
    """The same blocks on fewer axes: an uncut axis joins an evenly cut one before it."""
    merged_grid, merged_layout = [grid[0]], [layout[0]]
    for length, count in zip(grid[1:], layout[1:], strict=True):
        if count == 1 and merged_grid[-1] % merged_layout[-1] == 0:
            merged_grid[-1] *= length
        else:
            merged_grid.append(length)
            merged_layout.append(count)
    return merged_grid, merged_layout


@dataclass(frozen=True)
class Call:
    """One call of the operator: sizes, tables and options."""

    query: Tensor
    value: Tensor
    cos: Tensor | None
    sin: Tensor | None
    grid: list[int]
    layout: list[int]
    feature_map: str
    normalize: bool
    eps: float
    stored: torch.dtype
    window: tuple[int, int, int, int] | None = None
    """Which tokens this process holds, see `boxes.held_box`; None: all. With a window there are
    three axes, and `layout` counts only the held blocks along the first axis."""

    def __post_init__(self) -> None:
        if len(self.grid) > 1 and self.block_size > _LARGEST_BOX:
            raise UserError(
                f"a block of several axes may hold {_LARGEST_BOX} tokens, found grid={self.grid} "
                f"with layout={self.layout}"
            )

    @property
    def block_size(self) -> int:
        """Tokens of the largest block."""
        layout = self.layout if self.window is None else [self.window[0], *self.layout[1:]]
        return block_size(self.grid, layout)

    @cached_property
    def box(self) -> tuple[int, ...]:
        """(T, H, W, LT, LH, LW): grid and layout with ones in front."""
        ones = [1] * (3 - len(self.grid))
        return (*ones, *self.grid, *ones, *self.layout)

    @cached_property
    def num_blocks(self) -> int:
        """Blocks of the grid."""
        return math.prod(self.layout)

    @property
    def tile(self) -> dict:
        """Channels of keys and values as one tile each."""
        return {"BD": padded(self.query.shape[3]), "BV": padded(self.value.shape[3])}

    @property
    def pieces(self) -> dict:
        """Channels of keys and values in pieces, which waste fewer columns."""
        (d0, d1), (v0, v1) = pieces(self.query.shape[3]), pieces(self.value.shape[3])
        return {"D0": d0, "D1": d1, "V0": v0, "V1": v1}

    @property
    def num_heads(self) -> int:
        """Heads of the query."""
        return self.query.shape[2]

    @cached_property
    def num_parts(self) -> int:
        """Parts that every block is cut into."""
        return num_parts(self.query.shape[0] * self.num_heads, self.grid, self.layout)

    @cached_property
    def programs(self) -> tuple[int]:
        """Launch grid of kernels with one program for each part and head."""
        return (self.query.shape[0] * self.num_blocks * self.num_parts * self.num_heads,)

    @cached_property
    def kind(self) -> tuple:
        """Everything that compile-time arguments depend on, besides strides."""
        heads, rotary = self.query.shape[2:], self.cos is not None
        options = self.feature_map, self.normalize, self.stored
        sizes = len(self.grid), self.block_size
        return heads, self.value.shape[3], self.query.dtype, rotary, *options, *sizes

    @cached_property
    def options(self) -> dict:
        """Compile-time arguments that all kernels over tokens share."""
        head_dim, value_dim = self.query.shape[3], self.value.shape[3]
        half = self.stored == torch.float16
        return {
            "D": head_dim,
            "V": value_dim,
            "RANK": len(self.grid),
            "FEATURE_MAP": self.feature_map,
            "ROTARY": self.cos is not None,
            "NORMALIZE": self.normalize,
            "OPERAND": _OPERANDS[self.query.dtype] if half else tl.float32,
        }
