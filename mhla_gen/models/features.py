"""What MHLA's half does to queries and keys before the operator: learned maps, softmax features."""

import torch
from torch import Tensor, nn

from mhla_gen.config import MHLAConfig

SOFTMAX = "softmax"
"""A feature map over all channels of a head, which the operator, going by elements, has not."""


class Features(nn.Module):
    """Queries and keys as MHLA's operator takes them.

    Args:
        num_heads: Heads.
        head_dim: Channels of a head.
        config: Settings of φ.

    Source:
        A learned map before φ, for conversion: Hedgehog, Zhang et al. 2024, arXiv:2402.04347.
        Softmax over channels: SLA, arXiv:2509.24006.
    """

    def __init__(self, num_heads: int, head_dim: int, config: MHLAConfig):
        super().__init__()
        self.softmax = config.feature_map == SOFTMAX
        self.operator_map = "identity" if self.softmax else config.feature_map
        shape = (num_heads, head_dim, head_dim)
        learned = config.learned_features
        # What a map adds to the identity, which weight decay then keeps.
        self.query_map = nn.Parameter(torch.zeros(shape)) if learned else None
        self.key_map = nn.Parameter(torch.zeros(shape)) if learned else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the maps to the identity."""
        for weight in self.parameters():
            weight.zero_()

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Map `[batch, seq_len, num_heads, head_dim]` to the like."""
        return self._mapped(query, self.query_map), self._mapped(key, self.key_map)

    def _mapped(self, x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is not None:
            x = x + torch.einsum("bnhd,hde->bnhe", x, weight).type_as(x)
        return x.softmax(dim=-1) if self.softmax else x
