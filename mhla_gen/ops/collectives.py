"""What ranks of a group tell each other, with gradients.

Gradients follow one rule: what a rank computes is its own share of the loss, so the gradient of a
tensor that all ranks read is the sum of theirs.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def sum_over_ranks(x: Tensor, group: Any) -> Tensor:
    """The sum of `x` over a group, on every rank; gradients are summed in the same way.

    Args:
        x: Of one shape on all ranks.
        group: A `torch.distributed` process group.
    """
    return _SumOverRanks.apply(x, group)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _summed(grads[0], ctx.group), None


def _summed(x: Tensor, group: Any) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


def exchange(rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    """Send rows to each rank, in the order of ranks, and receive theirs; gradients travel back.

    Args:
        rows: `[sum(sent), ...]`, first those for rank 0.
        sent: Rows for each rank.
        received: Rows from each rank, which must be what that rank sends.
        group: A `torch.distributed` process group.

    Returns:
        `[sum(received), ...]`, first those of rank 0.
    """
    return _Exchange.apply(rows, sent, received, group)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
        ctx.options = received, sent, group
        return _exchanged(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _exchanged(grads[0], *ctx.options), None, None, None


def _exchanged(rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    out = rows.new_empty((sum(received), *rows.shape[1:]))
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out
