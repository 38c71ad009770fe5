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

from mhla_gen.errors import UserError
from mhla_gen.ops.partition import block_starts


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
            raise UserError(
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


@dataclass(frozen=True)
class HeldBlocks:
    """Which blocks the tokens of each rank fall into: some of the first axis, as many on each rank.

    Ranks whose tokens fall into fewer than those of others get neighbours, which hold none of their
    tokens. What a rank adds to a block that it holds is a *part* of the block.
    """

    firsts: tuple[int, ...]
    """The first one of each rank, counted along the first axis."""
    count: int
    """How many, along the first axis."""
    plane: int
    """Blocks at one position of the first axis."""

    @classmethod
    def of_ranks(
        cls, grid: tuple[int, ...], layout: tuple[int, ...], num_ranks: int
    ) -> "HeldBlocks":
        """What ranks hold that share a grid of this layout."""
        slabs = [Shard.of_rank(grid, rank, num_ranks).slabs(layout) for rank in range(num_ranks)]
        count = max(len(held) for held in slabs)
        firsts = tuple(min(held[0].block, layout[0] - count) for held in slabs)
        return cls(firsts, count, math.prod(layout[1:]))

    @property
    def num_parts(self) -> int:
        """Parts of blocks that all ranks have together."""
        return len(self.firsts) * self.count * self.plane

    def entries(self, mixing: Tensor, rank: int) -> Tensor:
        """What the blocks of one rank weigh the parts of all by, `[..., its blocks, num_parts]`."""
        held = self.count * self.plane
        rows = mixing.narrow(-2, self.firsts[rank] * self.plane, held)
        return torch.cat([rows.narrow(-1, first * self.plane, held) for first in self.firsts], -1)
