"""Which tokens of a grid one rank of a group holds, when ranks share one sequence.

Ranks hold consecutive pieces of the raster order, cut as `torch.tensor_split` cuts: the first ranks
hold one token more where sizes do not divide. Everything here is integer arithmetic that every rank
can do for every other one, so nobody has to tell anybody what they hold.

A *plane* is what lies at one position of the first axis: a frame of a video, a row of an image.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mhla_gen.ops.partition import block_of_tokens, block_starts


@dataclass(frozen=True)
class Shard:
    """The tokens [`first`, `stop`) of a grid.

    Raises:
        ValueError: If there is no token in it.
    """

    grid: tuple[int, ...]
    first: int
    stop: int

    def __post_init__(self):
        if not 0 <= self.first < self.stop <= math.prod(self.grid):
            raise ValueError(
                f"a shard of grid={self.grid} needs at least one of its {math.prod(self.grid)} "
                f"tokens, found [{self.first}, {self.stop}); use fewer ranks"
            )

    @classmethod
    def of_rank(cls, grid: tuple[int, ...], rank: int, num_ranks: int) -> "Shard":
        """What `rank` holds of a sequence shared by `num_ranks`."""
        count, longer = divmod(math.prod(grid), num_ranks)
        first = rank * count + min(rank, longer)
        return cls(grid, first, first + count + (rank < longer))

    @property
    def num_tokens(self) -> int:
        """Tokens held."""
        return self.stop - self.first

    @property
    def plane(self) -> int:
        """Tokens of a plane."""
        return math.prod(self.grid[1:])

    @property
    def planes(self) -> tuple[int, int]:
        """Planes [first, stop) that hold at least one of the tokens."""
        return self.first // self.plane, -(-self.stop // self.plane)

    def whole_planes(self, *pieces: Tensor, dim: int = 1) -> Tensor:
        """Tokens of the shard, in pieces along `dim`, with zeros around up to whole planes."""
        first, stop = self.planes
        shape = list(pieces[0].shape)
        zeros = []
        for count in (self.first - first * self.plane, stop * self.plane - self.stop):
            shape[dim] = count
            zeros.append(pieces[0].new_zeros(shape))
        parts = [x for x in (zeros[0], *pieces, zeros[1]) if x.shape[dim]]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def from_whole_planes(self, tokens: Tensor) -> Tensor:
        """Inverse of `whole_planes`, for dimension 1."""
        return tokens.narrow(1, self.first - self.planes[0] * self.plane, self.num_tokens)

    def slabs(self, layout: tuple[int, ...]) -> list["Slab"]:
        """The shard's planes by block of the first axis."""
        first, stop = self.planes
        starts = (*block_starts(self.grid[0], layout[0]), self.grid[0])
        return [
            Slab(block, max(first, start), min(stop, end), self.grid[1:], layout[1:])
            for block, (start, end) in enumerate(pairwise(starts))
            if start < stop and first < end
        ]

    def padding_of_blocks(self, layout: tuple[int, ...], device: torch.device) -> Tensor:
        """How many tokens of its `slabs` are not the shard's own, int64 `[num_blocks]`."""
        first, stop = (plane * self.plane for plane in self.planes)
        blocks = block_of_tokens(self.grid, layout, device)
        others = torch.cat((blocks[first : self.first], blocks[self.stop : stop]))
        return others.bincount(minlength=math.prod(layout))


@dataclass(frozen=True)
class Slab:
    """Whole planes inside one block of the first axis; cut along the other axes as the grid is."""

    block: int
    """Which block of the first axis."""
    first: int
    """First plane, counted in the whole grid."""
    stop: int
    plane_grid: tuple[int, ...]
    plane_layout: tuple[int, ...]

    @property
    def grid(self) -> tuple[int, ...]:
        """Tokens along each axis."""
        return (self.stop - self.first, *self.plane_grid)

    @property
    def layout(self) -> tuple[int, ...]:
        """Blocks along each axis, one along the first."""
        return (1, *self.plane_layout)

    @property
    def blocks(self) -> slice:
        """Its blocks among those of the whole grid."""
        count = math.prod(self.plane_layout)
        return slice(self.block * count, (self.block + 1) * count)
