"""Feature maps φ that replace the exponential of softmax attention.

Source of the default: the reference code of arXiv:2601.07832 (the paper leaves φ open).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# Prevents 0 / 0 for a query whose features would all be zero.
_FLOOR = 1e-6


def relu(x: Tensor) -> Tensor:
    """`max(x, 0) + 1e-6`."""
    return F.relu(x) + _FLOOR


def squared_relu(x: Tensor) -> Tensor:
    """`max(x, 0)² + 1e-6`: sharper than `relu` (So et al. 2021, arXiv:2109.08668)."""
    return F.relu(x).square() + _FLOOR


def elu_plus_one(x: Tensor) -> Tensor:
    """`elu(x) + 1`, positive everywhere (Katharopoulos et al. 2020, arXiv:2006.16236, Eq. 7)."""
    # `F.elu(x) + 1` rounds small values to 0, and takes ten times as long on a CPU.
    positive = F.relu(x)
    return positive + (x - positive).exp()


def softplus(x: Tensor) -> Tensor:
    """`log(1 + exp(x))`, positive and smooth."""
    return F.softplus(x)


def identity(x: Tensor) -> Tensor:
    """`x` unchanged: signed, so only sensible with `normalize=False`."""
    return x


FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": relu,
    "squared_relu": squared_relu,
    "elu+1": elu_plus_one,
    "softplus": softplus,
    "identity": identity,
}


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    """Rotate interleaved pairs of channels (Su et al. 2021, arXiv:2104.09864, Eq. 15).

    Args:
        x: `[..., seq_len, num_heads, head_dim]`.
        rotary: `(cos, sin)`, each `[seq_len, head_dim / 2]`, or None to return `x` unchanged.

    Returns:
        A tensor like `x`.
    """
    if rotary is None:
        return x
    cos, sin = (table.to(x.dtype).unsqueeze(-2) for table in rotary)  # [seq_len, 1, head_dim / 2]
    even, odd = torch.unflatten(x, -1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
