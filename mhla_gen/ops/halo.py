"""Depthwise convolution of a sequence shared by ranks: each fetches the tokens around its own."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mhla_gen.ops.collectives import exchange, uncompiled
from mhla_gen.ops.depthwise import depthwise_conv, picked
from mhla_gen.ops.shard import Shard


@uncompiled
def sharded_depthwise_conv(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    grid: tuple[int, ...],
    group: Any,
    halo: Callable[[], Tensor] | None = None,
    implementation: str = "auto",
) -> Tensor:
    """`depthwise_conv` of a sequence shared by a group; every rank gets its own tokens' output.

    Args:
        tokens: This rank's tokens, `[batch, its tokens, channels]`; see `Shard.of_rank`.
        weight: As in `depthwise_conv`; its gradient is this rank's share.
        bias: Likewise.
        grid: Number of tokens along each axis of the whole grid.
        group: A `torch.distributed` process group.
        halo: Result of `begin_halo` for these tokens, if it was called.
        implementation: As in `depthwise_conv`.

    Raises:
        ValueError: If `tokens` are not what this rank holds of `grid`.
    """
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    shard = Shard.of_rank(grid, rank, num_ranks)
    check_shard(tokens, shard)
    chosen = picked(tokens, weight, bias, grid, implementation, shard.num_tokens)
    sizes = tuple(weight.shape[2:])
    wait = begin_halo(tokens, sizes, grid=grid, group=group) if halo is None else halo
    received = wait()
    if chosen == "fused":
        # Imported on first use: Triton is neither needed nor installed everywhere.
        from mhla_gen.ops.halo_fused import fused_sharded_conv

        return fused_sharded_conv(tokens, weight, bias, received, shard, group)
    held = with_halo(shard, sizes)
    before = shard.first - held.first
    first, stop = held.planes
    planes = held.whole_planes(received[:, :before], tokens, received[:, before:])
    around = (stop - first, *grid[1:])
    out = depthwise_conv(planes, weight, bias, grid=around, implementation="torch")
    return held.from_whole_planes(out).narrow(1, before, tokens.shape[1])


@uncompiled
def begin_halo(
    tokens: Tensor, sizes: tuple[int, ...], *, grid: tuple[int, ...], group: Any
) -> Callable[[], Tensor]:
    """Start to fetch the tokens around this rank's that a filter reaches.

    In raster order a filter reaches `halo_size` tokens to either side. These are received from the
    ranks before and after, from several if needed.

    Args:
        tokens: This rank's tokens, `[batch, its tokens, channels]`.
        sizes: Size of the filter along each axis.
        grid: Number of tokens along each axis of the whole grid.
        group: A `torch.distributed` process group.

    Returns:
        A function to be called once, which waits for `[batch, fetched tokens, channels]`: first the
        tokens before this rank's, then those after.

    Raises:
        ValueError: If `tokens` are not what this rank holds of `grid`.
    """
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    shards = [Shard.of_rank(grid, other, num_ranks) for other in range(num_ranks)]
    check_shard(tokens, shards[rank])
    wanted = [with_halo(shard, sizes) for shard in shards]
    sent = [_overlap(shards[rank], wanted[other], rank == other) for other in range(num_ranks)]
    received = [_overlap(shards[other], wanted[rank], rank == other) for other in range(num_ranks)]
    first = shards[rank].first
    rows = torch.cat([tokens[:, start - first : stop - first] for start, stop in sent], dim=1)
    counts_sent, counts = ([b - a for a, b in ranges] for ranges in (sent, received))
    wait = exchange(rows.transpose(0, 1), counts_sent, counts, group)
    return lambda: wait().transpose(0, 1)


def halo_size(grid: tuple[int, ...], sizes: tuple[int, ...]) -> int:
    """Number of tokens in raster order that a centred filter of `sizes` reaches on either side."""
    strides = [math.prod(grid[axis + 1 :]) for axis in range(len(grid))]
    return sum(size // 2 * stride for size, stride in zip(sizes, strides, strict=True))


def check_shard(tokens: Tensor, shard: Shard) -> None:
    """Check that `tokens` has as many tokens as the shard.

    Raises:
        ValueError: If they are not.
    """
    if tokens.shape[1] != shard.num_tokens:
        raise ValueError(
            f"this rank holds tokens [{shard.first}, {shard.stop}) of grid={shard.grid}, "
            f"{shard.num_tokens} in all, but was given {tokens.shape[1]}"
        )


def with_halo(shard: Shard, sizes: tuple[int, ...]) -> Shard:
    """The shard, and the tokens around it that a filter of `sizes` reaches."""
    halo = halo_size(shard.grid, sizes)
    first, stop = max(0, shard.first - halo), min(math.prod(shard.grid), shard.stop + halo)
    return Shard(shard.grid, first, stop)


def _overlap(owner: Shard, wanted: Shard, own: bool) -> tuple[int, int]:
    """Tokens [start, stop) that `owner` sends to another rank; none to itself."""
    start = max(owner.first, wanted.first)
    return (owner.first, owner.first) if own else (start, max(start, min(owner.stop, wanted.stop)))
