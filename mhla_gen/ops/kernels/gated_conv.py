"""The depthwise convolution with what follows it in an attention layer, as a custom operator.

One pass adds attention's output, or a blend of two, and multiplies by the gate. In backward, blend
and gate are a few PyTorch operations, which torch.compile fuses with their neighbours; the rest is
the convolution's backward.
"""

import torch
from torch import Tensor

from mhla_gen.ops.kernels.depthwise import (
    After,
    convolve,
    depthwise_tokens_backward,
    unit_channels,
)


@torch.library.custom_op("mhla_gen::gated_conv_tokens", mutates_args=())
def gated_conv_tokens(
    added: Tensor,
    beside: Tensor | None,
    shares: Tensor | None,
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    grid: list[int],
    num_heads: int,
    keeps: bool,
) -> tuple[Tensor, Tensor]:
    """`mhla_gen.ops.depthwise.gated_conv`, and, where it `keeps` it, what the gate multiplies."""
    tokens = unit_channels(tokens)
    read = (None if x is None else unit_channels(x) for x in (added, beside, shares, logits))
    with torch.cuda.device_of(tokens):
        return convolve(tokens, weight, bias, grid, After(*read, num_heads, keeps))


@gated_conv_tokens.register_fake
def _(added, beside, shares, tokens, weight, bias, logits, grid, num_heads, keeps):
    out = tokens.new_empty(tokens.shape)
    return out, tokens.new_empty(tokens.shape if keeps else 0)


def _gated_setup(ctx, inputs, output):
    added, beside, shares, tokens, weight, bias, logits, ctx.grid, ctx.num_heads, _ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    # The blend's gradients need both of its parts.
    added = None if beside is None else added
    ctx.save_for_backward(added, beside, shares, tokens, weight, logits, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gated_backward(ctx, grad, _):
    if grad is None:
        return (None,) * 10
    added, beside, shares, tokens, weight, logits, kept = ctx.saved_tensors
    logits_grad = None
    if logits is not None:
        grad, logits_grad = _gate_gradients(grad, kept, logits, ctx.num_heads)
    blended = grad, None, None
    if beside is not None:
        blended = _blend_gradients(grad, added, beside, shares)
    *gradients, bias_grad = depthwise_tokens_backward(grad, tokens, weight, ctx.grid)
    bias_grad = None if ctx.bias_dtype is None else bias_grad.to(ctx.bias_dtype)
    return *blended, *gradients, bias_grad, logits_grad, None, None, None


gated_conv_tokens.register_autograd(_gated_backward, setup_context=_gated_setup)


def _gate_gradients(
    grad: Tensor, kept: Tensor, logits: Tensor, num_heads: int
) -> tuple[Tensor, Tensor]:
    """Gradients of what the gate multiplied and of its logits; torch.compile fuses the steps."""
    x = logits.float()
    sigmoid = x.sigmoid()
    factor, slope = (x * sigmoid).to(logits.dtype), sigmoid * (1 + x * (1 - sigmoid))
    products = grad.float() * kept.float()
    if logits.shape[-1] != grad.shape[-1]:
        factor = factor.repeat_interleave(grad.shape[-1] // num_heads, dim=-1)
        products = products.unflatten(-1, (num_heads, -1)).sum(-1)
    return (grad * factor).to(grad.dtype), (products * slope).to(logits.dtype)


def _blend_gradients(
    grad: Tensor, added: Tensor, beside: Tensor, shares: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the two parts of a blend and of its logits; torch.compile fuses the steps."""
    by_head = (shares.shape[2], -1)
    grads = grad.unflatten(2, by_head).float()
    sigmoid = shares.float().neg().sigmoid()
    weights = sigmoid.to(grad.dtype).float()[..., None]
    apart = added.unflatten(2, by_head).float() - beside.unflatten(2, by_head).float()
    slope = sigmoid * (1 - sigmoid)
    return (
        (grads * (1 - weights)).flatten(2).to(grad.dtype),
        (grads * weights).flatten(2).to(grad.dtype),
        ((grads * apart).sum(-1) * slope).to(shares.dtype),
    )
