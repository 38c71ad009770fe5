"""Divide a token grid into blocks, and index blocks and tokens.

Tokens are on a 1-D, 2-D or 3-D grid in raster order. `layout` is the number of blocks along each
axis. On an axis with `n` tokens and `l` blocks, block `b` starts at `b * n // l`, so block sizes
differ by at most one and need not divide the axis. Blocks are also indexed in raster order.

Everything here is integer arithmetic without branches on sizes, so that `torch.compile` can trace
it with symbolic grids.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mhla_gen.errors import UserError

# A divisor of the axis replaces the best count if it is at least this share of it: blocks of equal
# size need no partly filled tiles in the kernels.
_DIVISOR_SHARE = 0.6


def block_starts(length: int, num_blocks: int) -> tuple[int, ...]:
    """First token of every block along one axis.

    Args:
        length: Tokens along the axis.
        num_blocks: Blocks along the axis, at most `length`.

    Returns:
        `num_blocks` increasing positions, the first one 0. Block `b` ends where `b + 1` starts.

    Raises:
        ValueError: If there are more blocks than tokens, or none.
    """
    if not 1 <= num_blocks <= length:
        raise UserError(
            f"an axis of {length} tokens takes 1 to {length} blocks, found {num_blocks}"
        )
    return tuple(b * length // num_blocks for b in range(num_blocks))


def check_whole(**sizes: float | tuple[float, ...] | None) -> None:
    """Raise `ValueError` unless sizes, numbers or tuples of them, are whole numbers."""
    for name, size in sizes.items():
        if any(isinstance(n, float) for n in (size if isinstance(size, tuple) else (size,))):
            raise UserError(f"{name} must be given in whole numbers, found {size}")


def check_grid(grid: tuple[int, ...]) -> None:
    """Raise `ValueError` unless a grid has one to three axes of at least one token."""
    check_whole(grid=grid)
    if not 1 <= len(grid) <= 3 or any(n < 1 for n in grid):
        raise ValueError(f"grid must have 1 to 3 axes of at least one token, found {grid}")


def block_of_tokens(
    grid: tuple[int, ...], layout: tuple[int, ...], device: torch.device | str | None = None
) -> Tensor:
    """Block of every token, int64 `[seq_len]`, tokens and blocks in raster order."""
    blocks = torch.zeros((), dtype=torch.int64, device=device)
    for length, num_blocks in zip(grid, layout, strict=True):
        along_axis = _block_of_positions(torch.arange(length, device=device), length, num_blocks)
        blocks = blocks.unsqueeze(-1) * num_blocks + along_axis
    return blocks.reshape(-1)


def _block_of_positions(positions: Tensor, length: int, num_blocks: int) -> Tensor:
    # The largest b with b * length // num_blocks <= position.
    return ((positions + 1) * num_blocks - 1).div(length, rounding_mode="floor")


class BlockSlots(NamedTuple):
    """Index tables for blocks that are padded to the size of the largest one."""

    tokens: Tensor
    """int64 `[num_blocks, slots]`: the token in each slot; any valid token for padding."""
    filled: Tensor | None
    """bool `[num_blocks, slots]`: False where a slot is padding; None if there is no padding."""
    slots: Tensor
    """int64 `[seq_len]`: the flat slot of every token, the inverse of `tokens`."""


def block_slots(
    grid: tuple[int, ...], layout: tuple[int, ...], device: torch.device | str | None = None
) -> BlockSlots:
    """Index tables between raster order and padded blocks.

    Blocks are boxes, so a slot is a position inside the largest box. In smaller blocks the last
    position along an axis is empty.
    """
    rank = len(grid)
    tokens = torch.zeros((), dtype=torch.int64, device=device)
    filled = torch.ones((), dtype=torch.bool, device=device)
    token_slots = torch.zeros((), dtype=torch.int64, device=device)
    largest = tuple(-(-n // count) for n, count in zip(grid, layout, strict=True))
    for axis, (length, num_blocks, size) in enumerate(zip(grid, layout, largest, strict=True)):
        starts = torch.arange(num_blocks + 1, device=device).mul(length) // num_blocks
        positions = starts[:-1, None] + torch.arange(size, device=device)  # [num_blocks, size]
        inside = positions < starts[1:, None]
        # Axis a of the blocks is dimension a, axis a of the slots dimension rank + a.
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = num_blocks, size
        tokens = tokens * length + torch.where(inside, positions, 0).reshape(shape)
        filled = filled & inside.reshape(shape)
        along_axis = torch.arange(length, device=device)
        shape = [1] * rank
        shape[axis] = length
        offsets = along_axis - starts[_block_of_positions(along_axis, length, num_blocks)]
        token_slots = token_slots * size + offsets.reshape(shape)
    num_blocks, slots = math.prod(layout), math.prod(largest)
    ragged = any(n % count for n, count in zip(grid, layout, strict=True))
    return BlockSlots(
        tokens=tokens.reshape(num_blocks, slots),
        filled=filled.reshape(num_blocks, slots) if ragged else None,
        slots=block_of_tokens(grid, layout, device) * slots + token_slots.reshape(-1),
    )


def auto_layout(grid: tuple[int, ...], first: int | None = None) -> tuple[int, ...]:
    """Near-cubic blocks for a grid, as many as the rule `num_blocks² ≤ seq_len` allows.

    Along each axis the count is `round(n / side)` for the smallest block side that satisfies the
    rule. A divisor of `n` is used instead if it is at least 60 % of that count.

    Args:
        grid: Number of tokens along each axis, at least one each.
        first: Number of blocks along the first axis, if already fixed.

    Returns:
        Number of blocks along each axis.

    Raises:
        ValueError: If an axis is empty, or `first` is out of range.

    Source:
        The rule M² ≤ N: Zhang et al. 2026, arXiv:2601.07832, Sec. 4 (complexity).
    """
    check_grid(grid)
    if first is not None and not 1 <= first <= grid[0]:
        raise UserError(f"first must be 1 to {grid[0]} blocks of grid={grid}, found {first}")
    seq_len = math.prod(grid)
    # Counts change only where n / side crosses a half-integer: try those sides, smallest first.
    sides = sorted({n / (count + 0.5) for n in grid for count in range(n)})
    for side in sides:
        # The tiny shift keeps n / side just below its half-integer, so that it rounds down.
        layout = tuple(max(1, round(n / side - 1e-9)) for n in grid)
        if first is not None:
            layout = (first, *layout[1:])
        if math.prod(layout) ** 2 <= seq_len:
            near = tuple(_prefer_divisor(n, count) for n, count in zip(grid, layout, strict=True))
            return near if first is None else (first, *near[1:])
    return (1 if first is None else first, *[1] * (len(grid) - 1))


def _prefer_divisor(length: int, count: int) -> int:
    divisor = max(d for d in range(1, count + 1) if length % d == 0)
    return divisor if divisor >= _DIVISOR_SHARE * count else count
