"""Which tokens of a grid each rank of a group holds, when ranks share one sequence.

Ranks hold consecutive pieces of the raster order, split like `torch.tensor_split`: if sizes do not
divide, the first ranks hold one token more. Everything here is integer arithmetic that a rank can
do for all others, so no communication is needed.

A *plane* is all tokens at one position of the first axis: a frame of a video, a row of an image.
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
        ValueError: If the shard is empty.
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
        """The shard of `rank` in a sequence shared by `num_ranks`."""
        count, longer = divmod(math.prod(grid), num_ranks)
        first = rank * count + min(rank, longer)
        return cls(grid, first, first + count + (rank < longer))

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the shard."""
        return self.stop - self.first

    @property
    def plane(self) -> int:
        """Number of tokens in a plane."""
        return math.prod(self.grid[1:])

    @property
    def planes(self) -> tuple[int, int]:
        """Planes [first, stop) that hold at least one of the tokens."""
        return self.first // self.plane, -(-self.stop // self.plane)

    def whole_planes(self, *pieces: Tensor) -> Tensor:
        """The shard's tokens, in pieces along axis 1, padded with zeros to whole planes."""
        first, stop = self.planes
        shape = list(pieces[0].shape)
        zeros: list[Tensor] = []
        for count in (self.first - first * self.plane, stop * self.plane - self.stop):
            shape[1] = count
            zeros.append(pieces[0].new_zeros(shape))
        parts = [x for x in (zeros[0], *pieces, zeros[1]) if x.shape[1]]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def from_whole_planes(self, tokens: Tensor) -> Tensor:
        """Inverse of `whole_planes`."""
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
    """Whole planes inside one block of the first axis, divided like the grid on the other axes."""

    block: int
    """Index of the block along the first axis."""
    first: int
    """Index of the first plane in the whole grid."""
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
        """Indices of its blocks in the whole grid."""
        count = math.prod(self.plane_layout)
        return slice(self.block * count, (self.block + 1) * count)


@dataclass(frozen=True)
class HeldBlocks:
    """The blocks that each rank holds: a range along the first axis, of equal size on all ranks.

    A rank whose tokens touch fewer blocks than those of others also holds neighbouring blocks,
    which contain none of its tokens. What a rank adds to a block that it holds is a *part* of it.
    """

    firsts: tuple[int, ...]
    """Index of each rank's first block along the first axis."""
    count: int
    """Number of blocks per rank along the first axis."""
    plane: int
    """Number of blocks at one position of the first axis."""

    @classmethod
    def of_ranks(
        cls, grid: tuple[int, ...], layout: tuple[int, ...], num_ranks: int
    ) -> "HeldBlocks":
        """The blocks of ranks that share a grid of this layout."""
        slabs = [Shard.of_rank(grid, rank, num_ranks).slabs(layout) for rank in range(num_ranks)]
        count = max(len(held) for held in slabs)
        firsts = tuple(min(held[0].block, layout[0] - count) for held in slabs)
        return cls(firsts, count, math.prod(layout[1:]))

    @property
    def num_parts(self) -> int:
        """Number of parts of blocks on all ranks together."""
        return len(self.firsts) * self.count * self.plane

    def entries(self, mixing: Tensor, rank: int) -> Tensor:
        """Weights of all parts in the blocks of one rank, `[..., its blocks, num_parts]`."""
        held = self.count * self.plane
        rows = mixing.narrow(-2, self.firsts[rank] * self.plane, held)
        return torch.cat([rows.narrow(-1, first * self.plane, held) for first in self.firsts], -1)
