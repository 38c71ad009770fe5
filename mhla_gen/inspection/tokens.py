"""Which tokens are looked at."""

import math

import torch
from torch import Tensor

from mhla_gen.config import InspectConfig
from mhla_gen.errors import UserError


def query_tokens(config: InspectConfig, grid: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Positions of the tokens whose maps are drawn; by default a corner, two quarters, the middle.

    Raises:
        ValueError: If a position is not on the grid.
    """
    if config.queries == "auto":
        # The frame, if there is one, is the middle one throughout: frames are compared beside it.
        places = [(0.0, 0.0), (0.25, 0.25), (0.5, 0.5), (0.75, 0.25)]
        tokens = [
            tuple(int(n * p) for n, p in zip(grid[-2:], place, strict=False)) for place in places
        ]
        return list(dict.fromkeys((*(n // 2 for n in grid[:-2]), *token) for token in tokens))
    for position in config.queries:
        if len(position) != len(grid) or any(p >= n for p, n in zip(position, grid, strict=True)):
            raise UserError(f"queries must lie on the token grid {grid}, found {list(position)}")
    return list(config.queries)


def row_of(position: tuple[int, ...], grid: tuple[int, ...]) -> int:
    """Raster number of a token."""
    row = 0
    for p, n in zip(position, grid, strict=True):
        row = row * n + p
    return row


def statistics_rows(config: InspectConfig, grid: tuple[int, ...]) -> Tensor:
    """Queries for rank and entropy, int64, sorted: all of them, or `max_rows` at random."""
    seq_len = math.prod(grid)
    if seq_len <= config.max_rows:
        return torch.arange(seq_len)
    generator = torch.Generator().manual_seed(config.seed)
    return torch.randperm(seq_len, generator=generator)[: config.max_rows].sort().values
