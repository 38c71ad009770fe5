"""Mixing that depends on what the blocks hold, at O(num_blocks²) beside one read of the tokens."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mhla_gen.ops.collectives import sum_over_ranks
from mhla_gen.ops.partition import block_of_tokens
from mhla_gen.ops.shard import Shard


class ContentMixing(nn.Module):
    r"""Weighs the static mixing matrix by how well pooled queries and keys of blocks agree.

    With the mean query $\bar q_i$ and mean key $\bar k_j$ of blocks, before the feature map, and
    learned weights $w$ of a head's channels,
    $$m_{ij}(x) = m_{ij} \cdot M \, \mathrm{softmax}_j
      \Bigl(\sum_c w_c \bar q_{ic} \bar k_{jc} / \sqrt{d}\Bigr).$$
    The weights start at zero, where the softmax is $1/M$ and this is the static matrix. No entry
    becomes negative, so the denominator of MHLA stays positive.

    Args:
        num_heads: Heads.
        head_dim: Channels of a head.

    Source:
        This project; the static matrix: Zhang et al. 2026, arXiv:2601.07832, Sec. 4.2.
    """

    def __init__(self, num_heads: int, head_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_heads, head_dim))

    def forward(
        self,
        mixing: Tensor,
        query: Tensor,
        key: Tensor,
        grid: tuple[int, ...],
        layout: tuple[int, ...],
        group: Any = None,
    ) -> Tensor:
        """The mixing matrix of every sample and head.

        Args:
            mixing: Static, `[num_blocks, num_blocks]` or `[num_heads, num_blocks, num_blocks]`.
            query: `[batch, seq_len, num_heads, head_dim]`, before the feature map, raster order.
            key: Like `query`.
            grid: Tokens along each axis.
            layout: Blocks along each axis.
            group: Processes that share the tokens, or None.

        Returns:
            Float32 `[batch, num_heads, num_blocks, num_blocks]`.
        """
        pooled_q, pooled_k = (block_means(x, grid, layout, group) for x in (query, key))
        # Autocast would round scores and weights to bfloat16.
        with torch.autocast(query.device.type, enabled=False):
            weighted_q = pooled_q.float() * self.weight.float()
            scores = torch.einsum("bihd,bjhd->bhij", weighted_q, pooled_k.float())
            shares = (scores * query.shape[-1] ** -0.5).softmax(dim=-1)
            return mixing.float() * (shares.shape[-1] * shares)

    def extra_repr(self) -> str:
        """Heads and channels, for `print(model)`."""
        return f"num_heads={self.weight.shape[0]}, head_dim={self.weight.shape[1]}"


def block_means(
    tokens: Tensor, grid: tuple[int, ...], layout: tuple[int, ...], group: Any = None
) -> Tensor:
    """Mean of the tokens of every block.

    Args:
        tokens: `[batch, seq_len, num_heads, head_dim]`, raster order of `grid`.
        grid: Tokens along each axis.
        layout: Blocks along each axis.
        group: Processes that share the tokens, or None.

    Returns:
        `[batch, num_blocks, num_heads, head_dim]` in the dtype of `tokens`; float32 with `group`.
    """
    block = block_of_tokens(grid, layout, device=tokens.device)
    num_blocks = torch.Size(layout).numel()
    members = block == torch.arange(num_blocks, device=tokens.device)[:, None]
    # A matrix product, unlike scattered additions, gives the same bits in every run.
    averages = (members / members.sum(dim=1, keepdim=True)).to(tokens.dtype)
    if group is None:
        return torch.einsum("mn,bnhd->bmhd", averages, tokens)
    shard = Shard.of_rank(grid, dist.get_rank(group), dist.get_world_size(group))
    own = torch.einsum("mn,bnhd->bmhd", averages[:, shard.first : shard.stop], tokens)
    return sum_over_ranks(own.float(), group)
