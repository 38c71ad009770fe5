"""Rank and entropy of attention weights: the two quantities of the paper's Figure 3."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mhla_gen.inspection.weights import LayerAttention

# Attention is computed in float32 where it matters, so smaller singular values are rounding.
_PRECISION = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class HeadStatistics:
    """Rank and entropy of one head's weights, for some of their rows."""

    rank: float
    effective_rank: float
    entropy: float


def numerical_rank(singular_values: Tensor, shape: tuple[int, ...]) -> int:
    """How many singular values are above rounding: more than max(shape) · 2⁻²³ of the largest.

    This is the default threshold of NumPy and PyTorch for float32 matrices. The paper does not say
    which one its Figure 3 uses.

    Args:
        singular_values: `[rank]`, any order.
        shape: Rows and columns of the matrix.
    """
    threshold = singular_values.max() * max(shape) * _PRECISION
    return int((singular_values > threshold).sum())


def effective_rank(singular_values: Tensor) -> float:
    r"""Number of directions that matter, $\exp(-\sum_i p_i \log p_i)$, $p_i = s_i / \sum_j s_j$.

    It needs no threshold: n equal singular values give n, and a dominant one gives close to 1.

    Args:
        singular_values: `[rank]`, non-negative.

    Source:
        Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality",
        EUSIPCO, Definition 1.
    """
    return math.exp(_entropy(singular_values).item())


def row_entropy(weights: Tensor) -> Tensor:
    r"""Entropy of every row in nats, $-\sum_n p_n \log p_n$ with $p_n = |w_n| / \sum_k |w_k|$.

    It runs from 0 (one token is read) to log(seq_len) (all alike). For softmax and for MHLA with
    its denominator `p` is the row itself. Rotated or unnormalised rows, whose weights may be
    negative or sum to something else, are measured by their absolute share.

    Args:
        weights: `[rows, seq_len]`.

    Returns:
        `[rows]`.

    Source:
        Shannon 1948; per row of the attention matrix as in Zhang et al. 2026, arXiv:2601.07832,
        Fig. 3.
    """
    return _entropy(weights.abs())


def singular_values(weights: Tensor) -> Tensor:
    """Singular values of a wide matrix `[rows, seq_len]`, at most `rows` of them."""
    if weights.shape[1] > weights.shape[0]:
        # Rᵀ of a QR decomposition has the same ones and is only rows × rows.
        weights = torch.linalg.qr(weights.T, mode="r").R
    return torch.linalg.svdvals(weights)


def head_statistics(attention: LayerAttention, rows: Tensor, head: int) -> HeadStatistics:
    """Rank and entropy of one head, of the given rows of its weights.

    The rank of a part of the rows is a lower bound of the rank of all, and is at most their number.
    """
    weights = attention.weights(rows, head)
    values = singular_values(weights)
    return HeadStatistics(
        rank=float(numerical_rank(values, tuple(weights.shape))),
        effective_rank=effective_rank(values),
        entropy=row_entropy(weights).mean().item(),
    )


def _entropy(masses: Tensor) -> Tensor:
    """Entropy along the last axis of masses that need not sum to 1; nats."""
    shares = masses / masses.sum(dim=-1, keepdim=True)
    return -torch.xlogy(shares, shares).sum(dim=-1)
