"""Initial values of the mixing matrix."""

import itertools
import math

import torch
from torch import Tensor

from mhla_gen.errors import UserError


def locality_mixing(layout: tuple[int, ...]) -> Tensor:
    r"""Mixing matrix that favours near blocks.

    $m_{ij} \propto 1 - \mathrm{dist}(i, j) / \max_k \mathrm{dist}(i, k)$ with Euclidean distances
    between block indices on the block grid, the maximum taken per row; every row sums to 1.

    Args:
        layout: Blocks along each axis.

    Returns:
        Float32 `[num_blocks, num_blocks]`, row = query block.

    Raises:
        ValueError: If an axis has no blocks.

    Source:
        Zhang et al. 2026, arXiv:2601.07832, Sec. 4.2.
    """
    check_axes(layout)
    axes = [range(blocks) for blocks in layout]
    centres = torch.tensor(list(itertools.product(*axes)), dtype=torch.float64)
    distances = torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")
    # With a single block, distance and maximum are both 0; it counts as near.
    furthest = distances.amax(dim=1, keepdim=True)
    weights = 1 - distances / furthest if len(distances) > 1 else torch.ones_like(distances)
    return (weights / weights.sum(dim=1, keepdim=True)).float()


def uniform_mixing(layout: tuple[int, ...]) -> Tensor:
    """Mixing matrix with which every block reads all blocks equally: plain linear attention.

    Args:
        layout: Blocks along each axis.

    Returns:
        Float32 `[num_blocks, num_blocks]` filled with `1 / num_blocks`.

    Raises:
        ValueError: If an axis has no blocks.
    """
    check_axes(layout)
    num_blocks = math.prod(layout)
    return torch.full((num_blocks, num_blocks), 1 / num_blocks, dtype=torch.float32)


def check_axes(layout: tuple[int, ...]) -> None:
    """Raise `ValueError` unless there is a block along every axis."""
    if not layout or min(layout) < 1:
        raise UserError(f"layout needs at least one block along every axis, found {layout}")


MIXING_INITS = {"locality": locality_mixing, "uniform": uniform_mixing}
