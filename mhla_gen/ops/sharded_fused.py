"""The fused kernels on a sequence shared by ranks, in the linear form.

Kernels read a rank's tokens in place and handle the blocks that these tokens may fall into
(`HeldBlocks`). What a rank's tokens add to a block is a part of it with its own scale, like the
parts of blocks on one GPU. Ranks exchange their parts after `summarise` and, in backward, after
`backward_queries`; mixing sums them in float32. So nothing is rounded twice.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mhla_gen.ops.collectives import gather_rows
from mhla_gen.ops.fused_limits import require_fused, trains
from mhla_gen.ops.kernels import linear_form
from mhla_gen.ops.kernels.launch import Call, stored_dtype
from mhla_gen.ops.kernels.linear_form import Summaries
from mhla_gen.ops.shard import HeldBlocks, Shard


def begin_fused_shard(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixing: Tensor,
    *,
    shard: Shard,
    layout: tuple[int, ...],
    group: Any,
    feature_map: str,
    rotary: tuple[Tensor, Tensor] | None,
    normalize: bool,
    eps: float,
) -> Callable[[], Tensor]:
    """See `begin_sharded_mhla`.

    Raises:
        ValueError: If the kernels do not support the call; the message says why.
    """
    blocks = HeldBlocks.of_ranks(shard.grid, layout, dist.get_world_size(group))
    require_fused(
        device=query.device,
        dtype=query.dtype,
        head_dim=query.shape[3],
        value_dim=value.shape[3],
        num_blocks=blocks.num_parts,
        trainable_rotary=trains(rotary),
    )
    sharing = _Sharing(shard, layout, group, blocks, feature_map, normalize, eps)
    tables = tuple(table.contiguous() for table in rotary or ())
    # Gradients of keys and values come from the function that ends the call.
    with torch.no_grad(), torch.cuda.device_of(query):
        parts = linear_form.summarise(key, value, sharing.call(query, value, tables))
        wait = sharing.gather(parts)

    def finish() -> Tensor:
        entries = (blocks.entries(m, sharing.rank) for m in (mixing, mixing.detach().mT))
        return _SharedMHLA.apply(query, key, value, *entries, wait, sharing, *tables)

    return finish


class _SharedMHLA(torch.autograd.Function):
    """The end of a call: `wait` gives the summaries of all ranks.

    `reads` and `read_by` are the weights of all ranks' parts in this rank's blocks: `reads` for
    summaries, `read_by` in backward for the gradients of mixed summaries.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, reads: Tensor, read_by: Tensor,
        wait: Callable[[], Summaries], sharing: "_Sharing", *tables: Tensor,
    ) -> Tensor:  # fmt: skip
        with torch.cuda.device_of(query):
            call, summaries = sharing.call(query, value, tables), wait()
            mixed = linear_form.mix(reads, summaries, call)
            out = linear_form.apply(query, value, mixed, call)
        ctx.save_for_backward(query, key, value, reads, read_by, *summaries, *mixed, *tables)
        ctx.sharing = sharing
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, reads, read_by, *rest = ctx.saved_tensors
        summaries, mixed, tables = Summaries(*rest[:3]), Summaries(*rest[3:6]), rest[6:]
        dreads = None
        with torch.cuda.device_of(query):
            call = ctx.sharing.call(query, value, tables)
            dquery, parts = linear_form.backward_queries(grads[0], query, value, mixed, call)
            wait = ctx.sharing.gather(parts)
            if ctx.needs_input_grad[3]:
                dreads = linear_form.correlate(parts, summaries, reads, call)
            dsummaries = linear_form.mix(read_by, wait(), call)
            dkey, dvalue = linear_form.backward_keys(key, value, dsummaries, call)
        return dquery, dkey, dvalue, dreads, *[None] * (3 + len(tables))


@dataclass(frozen=True)
class _Sharing:
    """The kernels' description of a rank's tokens, and the communication between ranks."""

    shard: Shard
    layout: tuple[int, ...]
    group: Any
    blocks: HeldBlocks
    feature_map: str
    normalize: bool
    eps: float

    @property
    def rank(self) -> int:
        """Rank of this process in the group."""
        return dist.get_rank(self.group)

    def call(self, query: Tensor, value: Tensor, tables: Sequence[Tensor]) -> Call:
        """The `Call` of all kernels."""
        blocks, shard = self.blocks, self.shard
        cos, sin = tables or (None, None)
        # Kernels cut the first of three axes.
        ones = [1] * (3 - len(shard.grid))
        grid = [shard.grid[0], *ones, *shard.grid[1:]]
        layout = [blocks.count, *ones, *self.layout[1:]]
        window = self.layout[0], blocks.firsts[self.rank], shard.first, shard.stop
        options = self.feature_map, self.normalize, self.eps, stored_dtype(query.dtype)
        return Call(query, value, cos, sin, grid, layout, *options, window)

    def gather(self, parts: Summaries) -> Callable[[], Summaries]:
        """Start to gather the parts of all ranks; the returned function waits for them."""
        waits = [gather_rows(x, self.group) for x in parts]
        return lambda: Summaries(*(wait() for wait in waits))
