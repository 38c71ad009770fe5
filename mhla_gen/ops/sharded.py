"""MHLA over a sequence shared by the ranks of a group: context parallelism.

Each rank sums its part of every block, ranks exchange their parts, and each rank mixes and applies
the summaries for its own queries. Only summaries are sent: their size does not depend on the number
of tokens. The kernels are in `sharded_fused`. The PyTorch code here sums the parts over the group.
It works on whole planes inside one block of the first axis (`Slab`), with zeros in place of other
ranks' tokens in these planes.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mhla_gen.errors import UserError
from mhla_gen.ops.blockwise import mix, to_blocks, to_tokens
from mhla_gen.ops.collectives import sum_over_ranks, uncompiled
from mhla_gen.ops.dispatch import (
    check_blocks,
    check_options,
    check_tokens,
    resolve_implementation,
)
from mhla_gen.ops.feature_maps import FEATURE_MAPS, rotate
from mhla_gen.ops.fused_limits import require_triton, trains
from mhla_gen.ops.halo import check_shard
from mhla_gen.ops.partition import BlockSlots, block_slots
from mhla_gen.ops.shard import HeldBlocks, Shard, Slab

Rotary = tuple[Tensor, Tensor] | None


def sharded_mhla(
    query: Tensor, key: Tensor, value: Tensor, mixing: Tensor, **options: Any
) -> Tensor:
    """`begin_sharded_mhla`, immediately followed by its end."""
    return begin_sharded_mhla(query, key, value, mixing, **options)()


@uncompiled
def begin_sharded_mhla(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixing: Tensor,
    *,
    grid: tuple[int, ...],
    layout: tuple[int, ...],
    group: Any,
    feature_map: str = "relu",
    rotary: Rotary = None,
    normalize: bool = True,
    eps: float = 1e-6,
    implementation: str = "auto",
) -> Callable[[], Tensor]:
    """Start `mhla` of a sequence that a group shares; every rank gets its own tokens' output.

    The kernels start to send summaries of keys and values, and return a function that waits for
    those of the other ranks. The layer's other work between the two overlaps with communication.

    Outputs equal those of one process up to rounding. In backward, gradients of tokens are
    complete; that of `mixing`, like those of all weights, is this rank's share, and the sum over
    the group is the gradient.

    Args:
        query: This rank's queries, `[batch, its tokens, num_heads, head_dim]`; see `Shard.of_rank`.
        key: Like `query`.
        value: `[batch, its tokens, num_heads, value_dim]`.
        mixing: As in `mhla`, the same on all ranks.
        grid: Tokens along each axis of the whole grid.
        layout: Blocks along each axis of `grid`.
        group: A `torch.distributed` process group.
        feature_map: As in `mhla`.
        rotary: As in `mhla`, for this rank's tokens.
        normalize: As in `mhla`.
        eps: As in `mhla`.
        implementation: `blockwise`, `fused` or `auto`.

    Returns:
        A function to be called once, which returns `[batch, its tokens, num_heads, value_dim]` in
        the dtype of `query`.

    Raises:
        ValueError: If shapes do not fit, or the tokens are not what this rank holds of `grid`.

    Source:
        Zhang et al. 2026, arXiv:2601.07832, Eq. (4): sums over a block may be taken in any order.
    """
    grid, layout = tuple(grid), tuple(layout)
    num_ranks = dist.get_world_size(group)
    shard = Shard.of_rank(grid, dist.get_rank(group), num_ranks)
    check_shard(query, shard)
    check_tokens(query, key, value, (query.shape[1],))
    check_blocks(query, mixing, grid, layout)
    check_options(query, feature_map, rotary, False, len(grid))
    num_parts = HeldBlocks.of_ranks(grid, layout, num_ranks).num_parts
    begin = _implementation(implementation, query, value, num_parts, rotary)
    with torch.autocast(query.device.type, enabled=False):
        finish = begin(
            query,
            key,
            value,
            mixing,
            shard=shard,
            layout=layout,
            group=group,
            feature_map=feature_map,
            rotary=rotary,
            normalize=normalize,
            eps=eps,
        )

    @uncompiled
    def finish_without_autocast() -> Tensor:
        with torch.autocast(query.device.type, enabled=False):
            return finish()

    return finish_without_autocast


def _implementation(
    implementation: str, query: Tensor, value: Tensor, num_parts: int, rotary: Rotary
) -> Callable[..., Callable[[], Tensor]]:
    chosen = resolve_implementation(
        implementation,
        device=query.device,
        dtype=query.dtype,
        head_dim=query.shape[3],
        value_dim=value.shape[3],
        num_blocks=num_parts,
        trainable_rotary=trains(rotary),
    )
    if chosen == "blockwise":
        return _begin_blockwise_shard
    if chosen != "fused":
        raise UserError(f"implementation={chosen!r} cannot share a sequence; use 'auto'")
    require_triton()
    # Imported on first use: Triton is neither needed nor installed everywhere.
    from mhla_gen.ops.sharded_fused import begin_fused_shard

    return begin_fused_shard


def _begin_blockwise_shard(*tensors: Tensor, **options: Any) -> Callable[[], Tensor]:
    """Batched PyTorch sends nothing in advance: all work is done at the end."""
    return lambda: _blockwise_shard(*tensors, **options)


def _blockwise_shard(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixing: Tensor,
    *,
    shard: Shard,
    layout: tuple[int, ...],
    group: Any,
    feature_map: str,
    rotary: Rotary,
    normalize: bool,
    eps: float,
) -> Tensor:
    """Batched PyTorch for any device, in float32, or float64 for float64 inputs."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    phi = FEATURE_MAPS[feature_map]
    phi_q, phi_k, v = phi(query.to(dtype)), phi(key.to(dtype)), value.to(dtype)
    q, k = rotate(phi_q, rotary), rotate(phi_k, rotary)
    q, k, v, phi_q, phi_k = map(shard.whole_planes, (q, k, v, phi_q, phi_k))
    slabs = shard.slabs(layout)
    sizes = [math.prod(slab.grid) for slab in slabs]
    slots = [block_slots(slab.grid, slab.layout, query.device) for slab in slabs]
    columns = (torch.split(x, sizes, dim=1) for x in (q, k, v, phi_q, phi_k))
    pieces = list(zip(slots, *columns, strict=True))

    summaries = [_summaries(k, v, table) for table, _, k, v, _, _ in pieces]
    key_sums = [to_blocks(phi_k, table, empty=True).sum(dim=2) for table, *_, phi_k in pieces]
    summaries, key_sums = (
        sum_over_ranks(_among_all(torch.cat(parts, dim=1), slabs, math.prod(layout)), group)
        for parts in (summaries, key_sums)
    )
    outputs: list[Tensor] = []
    for slab, (table, q, _, _, phi_q, _) in zip(slabs, pieces, strict=True):
        rows = mixing[..., slab.blocks, :].to(dtype)
        out = _apply(q, mix(rows, summaries), table)
        if normalize:
            out = out / (_apply(phi_q, mix(rows, key_sums.unsqueeze(-1)), table) + eps)
        outputs.append(out)
    return shard.from_whole_planes(torch.cat(outputs, dim=1)).to(query.dtype)


def _summaries(k: Tensor, v: Tensor, slots: BlockSlots) -> Tensor:
    blocked_k, blocked_v = to_blocks(k, slots, empty=True), to_blocks(v, slots)
    return torch.einsum("bmshk,bmshv->bmhkv", blocked_k, blocked_v)


def _apply(q: Tensor, mixed: Tensor, slots: BlockSlots) -> Tensor:
    return to_tokens(torch.einsum("bmshk,bmhkv->bmshv", to_blocks(q, slots), mixed), slots)


def _among_all(held: Tensor, slabs: list[Slab], num_blocks: int) -> Tensor:
    """`[batch, blocks of the slabs, ...]` placed among all blocks, with zeros elsewhere."""
    outside = (slabs[0].blocks.start, num_blocks - slabs[-1].blocks.stop)
    return F.pad(held, (0, 0) * (held.ndim - 2) + outside)
