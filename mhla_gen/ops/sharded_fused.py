"""The parts of MHLA that touch tokens, for ranks that share a sequence, in the fused kernels.

Float32 summaries leave and enter, because ranks sum them; between, kernels store them as in the
linear form on one GPU.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mhla_gen.ops.collectives import TINY
from mhla_gen.ops.fused import unsupported
from mhla_gen.ops.kernels import linear_form
from mhla_gen.ops.kernels.launch import Call, merge_axes, stored_dtype
from mhla_gen.ops.kernels.linear_form import Summaries
from mhla_gen.ops.shard import Slab


@dataclass(frozen=True)
class FusedSlabs:
    """Triton kernels on planes inside one block of the first axis; see `SlabForm`."""

    feature_map: str
    normalize: bool
    eps: float

    def summarise(
        self, key: Tensor, value: Tensor, rotary: Any, slab: Slab
    ) -> tuple[Tensor, Tensor]:
        """See `SlabForm`.

        Raises:
            ValueError: If the kernels do not cover the call; the message says why.
        """
        blocks = slab.blocks.stop - slab.blocks.start
        sizes = key.shape[3], value.shape[3]
        reason = unsupported(key.device, key.dtype, *sizes, blocks, False, _trains(rotary))
        if reason is not None:
            raise ValueError(f"implementation='fused' {reason}; use 'blockwise' or 'auto'")
        return _Summarise.apply(key, value, self._call(key, value, rotary, slab))

    def apply(
        self,
        query: Tensor,
        value: Tensor,
        mixed: Tensor,
        mixed_key_sums: Tensor,
        rotary: Any,
        slab: Slab,
    ) -> Tensor:
        """See `SlabForm`."""
        call = self._call(query, value, rotary, slab)
        return _Apply.apply(query, value.detach(), mixed, mixed_key_sums, call)

    def _call(self, query: Tensor, value: Tensor, rotary: Any, slab: Slab) -> Call:
        cos, sin = (None, None) if rotary is None else (x.contiguous() for x in rotary)
        grid, layout = merge_axes(list(slab.grid), list(slab.layout))
        options = self.feature_map, self.normalize, self.eps, stored_dtype(query.dtype)
        return Call(query.detach(), value.detach(), cos, sin, grid, layout, *options)


class _Summarise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, key: Tensor, value: Tensor, call: Call) -> Any:
        ctx.save_for_backward(key, value)
        ctx.call = call
        with torch.cuda.device_of(key):
            return _summed(linear_form.summarise(key, value, call), call)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        key, value = ctx.saved_tensors
        with torch.cuda.device_of(key):
            summaries = _stored(grads[0], grads[1], ctx.call)
            return *linear_form.backward_keys(key, value, summaries, ctx.call), None


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, value: Tensor, mixed: Tensor, mixed_key_sums: Tensor, call: Call
    ) -> Tensor:
        summaries = _stored(mixed, mixed_key_sums, call)
        ctx.save_for_backward(query, value, *summaries)
        ctx.call = call
        with torch.cuda.device_of(query):
            return linear_form.apply(query, value, summaries, call)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        query, value, *summaries = ctx.saved_tensors
        with torch.cuda.device_of(query):
            dquery, parts = linear_form.backward_queries(
                grads[0], query, value, Summaries(*summaries), ctx.call
            )
        return dquery, None, *_summed(parts, ctx.call), None


def _summed(parts: Summaries, call: Call) -> tuple[Tensor, Tensor]:
    """Float32 matrices and key sums of blocks, from those of their parts."""
    matrices = parts.matrices.float()
    if parts.scales.shape[2]:
        matrices = matrices * parts.scales[..., None, None]
    shape = (call.num_blocks, call.num_parts)
    return matrices.unflatten(1, shape).sum(dim=2), parts.key_sums.unflatten(1, shape).sum(dim=2)


def _stored(matrices: Tensor, key_sums: Tensor, call: Call) -> Summaries:
    """As kernels read them: float16 with a scale for each matrix, or float32."""
    key_sums = key_sums.contiguous()
    if call.stored != torch.float16:
        none = matrices.new_empty((*matrices.shape[:2], 0))
        return Summaries(matrices.contiguous(), none, key_sums)
    largest = matrices.abs().amax(dim=(-2, -1))
    scales = largest.where(largest > TINY, 1.0)
    return Summaries((matrices / scales[..., None, None]).half().contiguous(), scales, key_sums)


def _trains(rotary: Any) -> bool:
    return rotary is not None and any(table.requires_grad for table in rotary)
