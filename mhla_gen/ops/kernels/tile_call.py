"""The description of a call that every launch of tile attention needs."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import triton.language as tl
from torch import Tensor

from mhla_gen.ops.kernels.launch import alignment, padded, pieces, quotient_up
from mhla_gen.ops.tiles import Tiling

LOG2E = 1.4426950408889634
_OPERANDS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}

Extra = tuple[Tensor, Tensor, Tensor]
"""Keys, values and the mask of valid ones, off the grid."""


@dataclass(frozen=True)
class TileCall:
    """One call: sizes, tables and options."""

    query: Tensor
    value: Tensor
    cos: Tensor | None
    sin: Tensor | None
    placed: Tiling
    scale: float

    @cached_property
    def slots(self) -> int:
        """Tokens of the largest tile."""
        return math.prod(map(quotient_up, self.placed.grid, self.placed.tiles))

    @cached_property
    def slot_sizes(self) -> dict:
        """Slots of the largest tile along each axis, and their number, padded."""
        depth, height, width = three_axes(
            tuple(map(quotient_up, self.placed.grid, self.placed.tiles))
        )
        padded_slots = 1 << (self.slots - 1).bit_length()
        return {"SLOTS": padded_slots, "SLOT_T": depth, "SLOT_H": height, "SLOT_W": width}

    @cached_property
    def queries(self) -> int:
        """Tokens of the largest group."""
        largest = zip(self.placed.grid, self.placed.tiles, self.placed.groups, strict=True)
        return math.prod(
            max(_span(group, n, tiles, count) for group in range(count))
            for n, tiles, count in largest
        )

    @cached_property
    def ragged(self) -> bool:
        """Whether some slot of some tile is empty."""
        sizes = zip(self.placed.grid, self.placed.tiles, strict=True)
        return self.slots & (self.slots - 1) != 0 or any(n % count for n, count in sizes)

    @cached_property
    def box(self) -> tuple:
        """Tokens and tiles along three axes, ones in front; see `boxes.tile_box`."""
        tiles = self.placed.tiles
        return (*three_axes(self.placed.grid), *three_axes(tiles), *self._even_size(tiles))

    @cached_property
    def groups(self) -> tuple:
        """Groups along three axes; see `boxes.group_box`."""
        return (*three_axes(self.placed.groups), *self._even_size(self.placed.groups))

    def _even_size(self, counts: tuple[int, ...]) -> tuple[int, ...]:
        """Tokens along three axes of the groups of `counts` if all have the same, else none."""
        axes = list(zip(self.placed.grid, self.placed.tiles, counts, strict=True))
        if any(n % count or tiles % count or n % tiles for n, tiles, count in axes):
            return ()
        return three_axes(tuple(n // count for n, _, count in axes))

    @property
    def rank(self) -> int:
        """Axes of the grid."""
        return len(self.placed.grid)

    @property
    def batch_heads(self) -> int:
        """Heads of all samples."""
        return self.query.shape[0] * self.query.shape[2]

    @cached_property
    def pieces(self) -> dict:
        """Channels of keys and values in pieces, which waste fewer columns."""
        (d0, d1), (v0, v1) = pieces(self.query.shape[3]), pieces(self.value.shape[3])
        sizes = {"D": self.query.shape[3], "V": self.value.shape[3]}
        return {**sizes, "D0": d0, "D1": d1, "V0": v0, "V1": v1}

    @cached_property
    def operand(self) -> dict:
        """How tiles are multiplied."""
        return {"OPERAND": _OPERANDS[self.query.dtype], "PRECISION": "ieee"}

    def block(self, most: int) -> int:
        """Queries of a block: a power of two that holds a group, or `most`."""
        return min(padded(self.queries), most)

    def whole_blocks(self, rows: int) -> int:
        """Slots of a packed group: whole blocks of `rows` queries."""
        return quotient_up(self.queries, rows) * rows


def _span(group: int, length: int, tiles: int, groups: int) -> int:
    first, last = group * tiles // groups, (group + 1) * tiles // groups
    return last * length // tiles - first * length // tiles


def three_axes(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Ones in front of fewer axes."""
    return (*[1] * (3 - len(sizes)), *sizes)


def extra_tensors(extra: Extra | None) -> tuple:
    """Three arguments of a kernel."""
    return (None, None, None) if extra is None else extra


def extra_strides(extra: Extra | None) -> tuple:
    """Those of keys and of values."""
    return ((0, 0, 0, 0),) * 2 if extra is None else (extra[0].stride(), extra[1].stride())


def numbered_wide(*tensors: Tensor) -> bool:
    """Whether 32 bits do not number the elements of a sample, or of a head's packs."""
    return any(x.shape[1] * x.stride(1) >= 2**31 for x in tensors)


def without(constants: dict, *names: str) -> dict:
    """Constants that a kernel has, without those that it lacks."""
    return {name: value for name, value in constants.items() if name not in names}


def kernel_constants(call: TileCall, options: dict, *strides: tuple[int, ...]) -> dict:
    """Compile-time arguments that the kernels share, and Triton's options."""
    return {
        **call.pieces,
        **options,
        **call.slot_sizes,
        "RAGGED": call.ragged,
        "TAIL": call.placed.list_size * call.slot_sizes["SLOTS"] % options["BN"] != 0,
        "RANK": call.rank,
        "ALIGN": alignment(*strides),
        "ROTARY": call.cos is not None,
        **call.operand,
    }
