"""The fused kernels on a sequence that ranks share.

As on one GPU in the linear form, with a sum over ranks after `summarise` and, in backward, after
`backward_queries`. Kernels over tokens run once for each slab. Summaries keep the dtype that
kernels store: float16 matrices get a scale that all ranks share before they are added, so where
only one rank has tokens of a block nothing is rounded twice.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mhla_gen.ops.feature_maps import FEATURE_MAPS
from mhla_gen.ops.fused import unsupported
from mhla_gen.ops.kernels import linear_form
from mhla_gen.ops.kernels.launch import Call, merge_axes, stored_dtype
from mhla_gen.ops.kernels.linear_form import Summaries
from mhla_gen.ops.shard import Shard, Slab


def fused_shard(
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
) -> Tensor:
    """See `sharded_mhla`.

    Raises:
        ValueError: If the kernels do not cover the call; the message says why.
    """
    trains = rotary is not None and any(table.requires_grad for table in rotary)
    sizes = query.shape[3], value.shape[3], mixing.shape[-1]
    reason = unsupported(query.device, query.dtype, *sizes, False, trains)
    if reason is not None:
        raise ValueError(f"implementation='fused' {reason}; use 'blockwise' or 'auto'")
    launches = _Launches(shard, layout, group, feature_map, normalize, eps)
    tokens = (shard.whole_planes(x) for x in (query, key, value))
    tables = (shard.whole_planes(x, dim=0).contiguous() for x in rotary or ())
    return shard.from_whole_planes(_SharedMHLA.apply(*tokens, mixing, launches, *tables))


class _SharedMHLA(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mixing: Tensor,
        launches: "_Launches", *tables: Tensor,
    ) -> Tensor:  # fmt: skip
        with torch.cuda.device_of(query):
            calls = launches.calls(query, value, tables)
            q, k, v = launches.split(query, key, value)
            parts = list(map(linear_form.summarise, k, v, calls))
            summaries = launches.among_all(parts, query, value)
            launches.leave_out_padding(summaries.key_sums)
            launches.sum_over_ranks(summaries)
            mixed = linear_form.mix(mixing, summaries, launches.whole(query, value))
            out = list(map(linear_form.apply, q, v, launches.rows(mixed), calls))
        ctx.save_for_backward(query, key, value, mixing, *summaries, *mixed, *tables)
        ctx.launches = launches
        return torch.cat(out, dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        query, key, value, mixing, *rest = ctx.saved_tensors
        summaries, mixed, tables = Summaries(*rest[:3]), Summaries(*rest[3:6]), rest[6:]
        launches: _Launches = ctx.launches
        with torch.cuda.device_of(query):
            calls, whole = launches.calls(query, value, tables), launches.whole(query, value)
            g, q, k, v = launches.split(grads[0], query, key, value)
            found = map(linear_form.backward_queries, g, q, v, launches.rows(mixed), calls)
            dquery, parts = zip(*found, strict=True)
            dmixed = launches.among_all(parts, query, value)
            dmixing = linear_form.correlate(dmixed, summaries, mixing, whole)
            launches.sum_over_ranks(dmixed)
            dsummaries = launches.rows(linear_form.mix(mixing.mT, dmixed, whole))
            found = map(linear_form.backward_keys, k, v, dsummaries, calls)
            dkey, dvalue = zip(*found, strict=True)
        gradients = [torch.cat(slabs, dim=1) for slabs in (dquery, dkey, dvalue)]
        return *gradients, dmixing, None, *[None] * len(tables)


class _UncutCall(Call):
    """A call whose blocks are one part each, so that rows of summaries are blocks."""

    num_parts = 1  # type: ignore[assignment]


@dataclass(frozen=True)
class _Launches:
    """Which kernels run on which planes, and what ranks tell each other."""

    shard: Shard
    layout: tuple[int, ...]
    group: Any
    feature_map: str
    normalize: bool
    eps: float

    @property
    def slabs(self) -> list[Slab]:
        return self.shard.slabs(self.layout)

    def whole(self, query: Tensor, value: Tensor) -> Call:
        """The call of kernels that see all blocks and no tokens."""
        return self._call(query, value, (), self.shard.grid, self.layout)

    def calls(self, query: Tensor, value: Tensor, tables: Sequence[Tensor]) -> list[Call]:
        """The call of every slab."""
        pieces = zip(*self.split(query, value), strict=True)
        angles = zip(*self.split(*tables, dim=0), strict=True) if tables else [()] * len(self.slabs)
        return [
            self._call(q, v, tables, slab.grid, slab.layout)
            for slab, (q, v), tables in zip(self.slabs, pieces, angles, strict=True)
        ]

    def _call(self, query: Tensor, value: Tensor, tables: Any, grid: Any, layout: Any) -> Call:
        cos, sin = tables or (None, None)
        grid, layout = merge_axes(list(grid), list(layout))
        options = self.feature_map, self.normalize, self.eps, stored_dtype(query.dtype)
        return _UncutCall(query, value, cos, sin, grid, layout, *options)

    def split(self, *tensors: Tensor, dim: int = 1) -> list[tuple[Tensor, ...]]:
        """The slabs of each tensor."""
        sizes = [math.prod(slab.grid) for slab in self.slabs]
        return [tensor.split(sizes, dim) for tensor in tensors]

    def rows(self, summaries: Summaries) -> list[Summaries]:
        """The blocks of every slab."""
        return [
            Summaries(*(x[:, slab.blocks].contiguous() for x in summaries)) for slab in self.slabs
        ]

    def among_all(self, parts: Sequence[Summaries], query: Tensor, value: Tensor) -> Summaries:
        """Summaries of the slabs among those of all blocks, the others zero."""
        sizes = math.prod(self.layout), stored_dtype(query.dtype), self.normalize
        whole = Summaries(*(x.zero_() for x in Summaries.empty(query, value, *sizes)))
        for slab, part in zip(self.slabs, parts, strict=True):
            for target, source in zip(whole, part, strict=True):
                target[:, slab.blocks] = source
        return whole

    def leave_out_padding(self, key_sums: Tensor) -> None:
        """Take φ(0) of the zeros that fill up planes out of the key sums, in place."""
        if self.normalize:
            padding = self.shard.padding_of_blocks(self.layout, key_sums.device)
            empty = FEATURE_MAPS[self.feature_map](key_sums.new_zeros(()))
            key_sums -= (padding * empty)[:, None, None]

    def sum_over_ranks(self, summaries: Summaries) -> None:
        """Add up what ranks have, in place."""
        matrices, scales, key_sums = summaries
        if scales.numel():
            mine = scales.clone()
            dist.all_reduce(scales, dist.ReduceOp.MAX, group=self.group)
            # No rank has tokens of a block: its matrix is zero, whatever the scale.
            scales.masked_fill_(scales == 0, 1.0)
            matrices *= (mine / scales)[..., None, None].to(matrices.dtype)
        dist.all_reduce(matrices, group=self.group)
        if self.normalize:
            dist.all_reduce(key_sums, group=self.group)
