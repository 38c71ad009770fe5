"""MHLA over a sequence that the ranks of a group share: context parallelism.

Each rank sums its part of every block, the parts are summed over the group, and each rank mixes and
applies what its own queries read. What travels are summaries: their bytes do not depend on the
number of tokens. Both implementations see whole planes inside one block of the first axis (`Slab`),
which is how a piece of the raster order falls into blocks; tokens of the other ranks in these
planes are zeros.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mhla_gen.ops.blockwise import mix, to_blocks, to_tokens
from mhla_gen.ops.collectives import sum_over_ranks
from mhla_gen.ops.dispatch import (
    check_blocks,
    check_options,
    check_tokens,
    resolve_implementation,
)
from mhla_gen.ops.feature_maps import FEATURE_MAPS, rotate
from mhla_gen.ops.halo import check_shard
from mhla_gen.ops.partition import block_slots
from mhla_gen.ops.shard import Shard, Slab

Rotary = tuple[Tensor, Tensor] | None


class SlabForm(Protocol):
    """The two parts of MHLA that touch tokens, for planes inside one block of the first axis."""

    def summarise(
        self, key: Tensor, value: Tensor, rotary: Rotary, slab: Slab
    ) -> tuple[Tensor, Tensor]:
        """Summaries `[batch, blocks, num_heads, head_dim, value_dim]` and key sums, float32."""
        ...

    def apply(
        self,
        query: Tensor,
        value: Tensor,
        mixed: Tensor,
        mixed_key_sums: Tensor,
        rotary: Rotary,
        slab: Slab,
    ) -> Tensor:
        """Outputs of the queries; of `value` only shape and dtype matter."""
        ...


@torch.compiler.disable
def sharded_mhla(
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
) -> Tensor:
    """`mhla` of a sequence that a group shares; every rank gets the output of its own tokens.

    Outputs equal those of one process to rounding. In backward, gradients of tokens are complete;
    that of `mixing` is this rank's share, like those of all weights: the sum over the group is the
    gradient.

    Args:
        query: This rank's, `[batch, its tokens, num_heads, head_dim]`; see `Shard.of_rank`.
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
        `[batch, its tokens, num_heads, value_dim]` in the dtype of `query`.

    Raises:
        ValueError: If shapes do not fit, or the tokens are not what this rank holds of `grid`.

    Source:
        Zhang et al. 2026, arXiv:2601.07832, Eq. (4): the sum over a block is taken in any order.
    """
    grid, layout = tuple(grid), tuple(layout)
    shard = Shard.of_rank(grid, dist.get_rank(group), dist.get_world_size(group))
    check_shard(query, shard)
    check_tokens(query, key, value, (query.shape[1],))
    check_blocks(query, mixing, grid, layout)
    check_options(query, feature_map, rotary, False, len(grid))
    form = _slab_form(implementation, query, value, mixing, feature_map, normalize, eps)
    with torch.autocast(query.device.type, enabled=False):
        slabs = shard.slabs(layout)
        pieces = _pieces(shard, slabs, query, key, value, rotary)
        parts = [
            form.summarise(k, v, angles, slab)
            for slab, (_, k, v, angles) in zip(slabs, pieces, strict=True)
        ]
        held = slice(slabs[0].blocks.start, slabs[-1].blocks.stop)
        summaries, key_sums = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        if normalize:
            # Zeros that fill up planes are keys with the features φ(0).
            padding = shard.padding_of_blocks(layout, query.device)[held].to(key_sums.dtype)
            empty = FEATURE_MAPS[feature_map](key_sums.new_zeros(()))
            key_sums = key_sums - (padding * empty)[:, None, None]
        half = query.dtype == torch.bfloat16
        num_blocks = math.prod(layout)
        summaries = sum_over_ranks(_among_all(summaries, held, num_blocks), group, half=half)
        key_sums = sum_over_ranks(_among_all(key_sums, held, num_blocks), group)
        outputs = []
        for slab, (q, _, v, angles) in zip(slabs, pieces, strict=True):
            rows = mixing[..., slab.blocks, :].to(summaries.dtype)
            mixed, mixed_key_sums = mix(rows, summaries), mix(rows, key_sums.unsqueeze(-1))
            outputs.append(form.apply(q, v, mixed, mixed_key_sums.squeeze(-1), angles, slab))
        return shard.from_whole_planes(torch.cat(outputs, dim=1))


@dataclass(frozen=True)
class BlockwiseSlabs:
    """Batched PyTorch, for any device; sums in float32, or float64 for float64 inputs."""

    feature_map: str
    normalize: bool
    eps: float

    def summarise(
        self, key: Tensor, value: Tensor, rotary: Rotary, slab: Slab
    ) -> tuple[Tensor, Tensor]:
        """See `SlabForm`."""
        slots = block_slots(slab.grid, slab.layout, key.device)
        features = self._features(key)
        blocked_k = to_blocks(rotate(features, rotary), slots, empty=True)
        blocked_v = to_blocks(value.to(features.dtype), slots)
        summaries = torch.einsum("bmshk,bmshv->bmhkv", blocked_k, blocked_v)
        return summaries, to_blocks(features, slots, empty=True).sum(dim=2)

    def apply(
        self,
        query: Tensor,
        value: Tensor,
        mixed: Tensor,
        mixed_key_sums: Tensor,
        rotary: Rotary,
        slab: Slab,
    ) -> Tensor:
        """See `SlabForm`."""
        slots = block_slots(slab.grid, slab.layout, query.device)
        features = self._features(query)
        blocked_q = to_blocks(rotate(features, rotary), slots)
        out = to_tokens(torch.einsum("bmshk,bmhkv->bmshv", blocked_q, mixed), slots)
        if self.normalize:
            blocked_q = to_blocks(features, slots)
            below = torch.einsum("bmshk,bmhk->bmsh", blocked_q, mixed_key_sums).unsqueeze(-1)
            out = out / (to_tokens(below, slots) + self.eps)
        return out.to(value.dtype)

    def _features(self, x: Tensor) -> Tensor:
        return FEATURE_MAPS[self.feature_map](x.to(torch.promote_types(x.dtype, torch.float32)))


def _slab_form(
    implementation: str,
    query: Tensor,
    value: Tensor,
    mixing: Tensor,
    feature_map: str,
    normalize: bool,
    eps: float,
) -> SlabForm:
    chosen = resolve_implementation(
        implementation,
        device=query.device,
        dtype=query.dtype,
        head_dim=query.shape[3],
        value_dim=value.shape[3],
        num_blocks=mixing.shape[-1],
    )
    if chosen == "blockwise":
        return BlockwiseSlabs(feature_map, normalize, eps)
    if chosen != "fused":
        raise ValueError(f"implementation={chosen!r} cannot share a sequence; use 'auto'")
    # Imported on first use: Triton is neither needed nor installed everywhere.
    from mhla_gen.ops.sharded_fused import FusedSlabs

    return FusedSlabs(feature_map, normalize, eps)


def _pieces(
    shard: Shard, slabs: list[Slab], query: Tensor, key: Tensor, value: Tensor, rotary: Rotary
) -> list[tuple[Tensor, Tensor, Tensor, Rotary]]:
    """Queries, keys, values and rotary tables of every slab."""
    sizes = [math.prod(slab.grid) for slab in slabs]
    columns: list[Any] = [shard.whole_planes(x).split(sizes, dim=1) for x in (query, key, value)]
    if rotary is None:
        columns.append([None] * len(slabs))
    else:
        tables = (shard.whole_planes(table, dim=0).split(sizes) for table in rotary)
        columns.append(zip(*tables, strict=True))
    return list(zip(*columns, strict=True))


def _among_all(held: Tensor, blocks: slice, num_blocks: int) -> Tensor:
    """`[batch, held blocks, ...]` among all blocks, those of other ranks zero."""
    outside = (blocks.start, num_blocks - blocks.stop)
    return F.pad(held, (0, 0) * (held.ndim - 2) + outside)
