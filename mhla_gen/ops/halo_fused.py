"""The kernels' convolution of a sequence shared by ranks, which joins nothing.

Kernels read received tokens where they lie. In backward, ranks exchange the halo of the output's
gradient, while the gradient of the filter is summed; so every rank gets the gradient of its own
tokens at once, and none flows back through what it received.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mhla_gen.ops.halo import begin_halo, with_halo
from mhla_gen.ops.kernels.depthwise import (
    Halo,
    convolve,
    filter_gradients,
    flipped,
    unit_channels,
)
from mhla_gen.ops.shard import Shard


def fused_sharded_conv(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, received: Tensor, shard: Shard, group: Any
) -> Tensor:
    """See `sharded_depthwise_conv`; `received` is the halo."""
    return _SharedConv.apply(tokens, weight, bias, received.detach(), shard, group)


class _SharedConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, weight: Tensor, bias: Tensor | None, received: Tensor,
        shard: Shard, group: Any,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(tokens, weight, received)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.shard, ctx.group = shard, group
        grid, halo = placed(shard, tuple(weight.shape[2:]), received)
        with torch.cuda.device_of(tokens):
            return convolve(unit_channels(tokens), weight, bias, grid, halo=halo)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        tokens, weight, received = ctx.saved_tensors
        grad, shard, sizes = unit_channels(grads[0]), ctx.shard, tuple(weight.shape[2:])
        dbias = None
        with torch.cuda.device_of(tokens):
            wait = begin_halo(grad, sizes, grid=shard.grid, group=ctx.group)
            grid, halo = placed(shard, sizes, received)
            dweight, sums = filter_gradients(grad, unit_channels(tokens), weight, grid, halo)
            if ctx.bias_dtype is not None:
                dbias = sums.to(ctx.bias_dtype)
            _, halo = placed(shard, sizes, wait())
            dtokens, _ = convolve(grad, flipped(weight), None, grid, halo=halo)
        return dtokens, dweight, dbias, None, None, None


def placed(shard: Shard, sizes: tuple[int, ...], received: Tensor) -> tuple[list[int], Halo]:
    """The grid of the planes in which the shard's tokens lie, and the halo around these."""
    first, stop = shard.planes
    before = shard.first - with_halo(shard, sizes).first
    halo = Halo(received, before, shard.first - first * shard.plane)
    return [stop - first, *shard.grid[1:]], halo
