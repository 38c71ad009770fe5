"""Communication between the ranks of a group, with gradients.

Gradients follow one rule: each rank computes its own share of the loss, so the gradient of a tensor
that all ranks read is the sum of the ranks' gradients.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.14 renames it.
_NAME = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
_all_gather: Any = getattr(dist, _NAME)

F = TypeVar("F", bound=Callable[..., Any])


def uncompiled(function: F) -> F:
    """`torch.compiler.disable` that keeps the type of the decorated function.

    Communication runs uncompiled inside compiled models.
    """
    return cast(Any, torch.compiler).disable(function)


def sum_over_ranks(x: Tensor, group: Any) -> Tensor:
    """The sum of `x` over a group, on every rank; gradients are summed in the same way.

    Args:
        x: Tensor of the same shape on all ranks.
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
        # By the same rule, for second derivatives.
        return _SumOverRanks.apply(grads[0], ctx.group), None


def _summed(x: Tensor, group: Any) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


def gather_rows(x: Tensor, group: Any) -> Callable[[], Tensor]:
    """Start to gather the rows of all ranks; without gradients.

    Args:
        x: `[batch, rows, ...]`, contiguous, of the same shape on all ranks.
        group: A `torch.distributed` process group.

    Returns:
        A function that waits for `[batch, ranks * rows, ...]`, contiguous, rows of rank 0 first.
    """
    num_ranks = dist.get_world_size(group)
    batch, rows, *rest = x.shape
    out = x.new_empty((num_ranks * batch, rows, *rest))
    # Some tensors of a call have no elements, on all ranks alike.
    work = _all_gather(out, x, group, async_op=True) if x.numel() else None

    def wait() -> Tensor:
        if work is not None:
            work.wait()
        by_batch = torch.unflatten(out, 0, (num_ranks, batch)).transpose(0, 1)
        return by_batch.flatten(1, 2).contiguous()

    return wait


def exchange(
    rows: Tensor, sent: list[int], received: list[int], group: Any
) -> Callable[[], Tensor]:
    """Start to exchange rows between ranks; gradients are sent back the same way.

    Args:
        rows: `[sum(sent), ...]`, first those for rank 0.
        sent: Number of rows for each rank.
        received: Number of rows from each rank, equal to the number that it sends.
        group: A `torch.distributed` process group.

    Returns:
        A function that waits for `[sum(received), ...]`, first the rows from rank 0.
    """
    works: list[Any] = []
    out = _Exchange.apply(rows, sent, received, group, works)

    def wait() -> Tensor:
        works.pop().wait()
        return out

    return wait


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: Any, works: list[Any]
    ) -> Tensor:
        ctx.options = received, sent, group
        out, work = _exchanged(rows, sent, received, group)
        works.append(work)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        received, sent, group = ctx.options
        return exchange(grads[0], received, sent, group)(), None, None, None, None


def _exchanged(
    rows: Tensor, sent: list[int], received: list[int], group: Any
) -> tuple[Tensor, Any]:
    out, rows = rows.new_empty((sum(received), *rows.shape[1:])), rows.contiguous()
    return out, dist.all_to_all_single(out, rows, received, sent, group=group, async_op=True)
