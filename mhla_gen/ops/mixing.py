"""Initial values of the mixing matrix."""

import itertools
import math

import torch
from torch import Tensor


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
    num_blocks = _count(layout)
    axes = [range(blocks) for blocks in layout]
    centres = torch.tensor(list(itertools.product(*axes)), dtype=torch.float64)
    distances = torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")
    # One block has no other to be far from: its distance of 0 over a maximum of 0 counts as near.
    furthest = distances.amax(dim=1, keepdim=True)
    weights = 1 - distances / furthest if num_blocks > 1 else torch.ones_like(distances)
    return (weights / weights.sum(dim=1, keepdim=True)).float()


def uniform_mixing(layout: tuple[int, ...]) -> Tensor:
    """Mixing matrix under which every block reads all blocks alike: plain linear attention.

    Args:
        layout: Blocks along each axis.

    Returns:
        Float32 `[num_blocks, num_blocks]` filled with `1 / num_blocks`.

    Raises:
        ValueError: If an axis has no blocks.
    """
    num_blocks = _count(layout)
    return torch.full((num_blocks, num_blocks), 1 / num_blocks)


def multiscale_mixing(layout: tuple[int, ...], num_heads: int) -> Tensor:
    r"""One mixing matrix per head, from plain linear attention to the own block only.

    Head $h$ of $H$ starts at $m_{ij} \propto (1 - \mathrm{dist}(i, j) / \max_k
    \mathrm{dist}(i, k))^{p_h}$ with $p_h = 16^{h / (H - 1)} - 1$: 0 for the first head, which reads
    all blocks alike, to 15 for the last, which reads hardly more than its own.

    Args:
        layout: Blocks along each axis.
        num_heads: Heads.

    Returns:
        Float32 `[num_heads, num_blocks, num_blocks]`; every row sums to 1.

    Raises:
        ValueError: If an axis has no blocks.

    Source:
        This project; the base of the power is the locality of Zhang et al. 2026, arXiv:2601.07832,
        Sec. 4.2.
    """
    locality = locality_mixing(layout).double()
    # Every block is its own nearest one, so this is 1 - dist / max dist again.
    nearness = locality / locality.diagonal()[:, None]
    powers = 16 ** torch.linspace(0, 1, num_heads, dtype=torch.float64) - 1
    weights = nearness ** powers[:, None, None]
    return (weights / weights.sum(dim=-1, keepdim=True)).float()


def _count(layout: tuple[int, ...]) -> int:
    if not layout or min(layout) < 1:
        raise ValueError(f"layout needs at least one block along every axis, found {layout}")
    return math.prod(layout)


MIXING_INITS = {"locality": locality_mixing, "uniform": uniform_mixing}
