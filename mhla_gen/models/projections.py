"""Linear layers that read the same input, computed in one product."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhla_gen.runtime.linear_gelu import is_plain

# With this alignment, rows of the product begin at 128-byte lines in half precision.
_ROW = 64


def products(layers: Sequence[Any], inputs: Tensor) -> list[Tensor]:
    """Outputs of several linear layers of the same input.

    Plain layers are computed as one layer with concatenated weights: one large product is faster
    than several small ones, and its backward pass sums the gradients of the input within the
    product. Training in bfloat16 copies the weights anyway, to cast them, so in compiled code the
    concatenation is free. Layers with adapters or hooks, quantised or sharded layers, and layers of
    which only some are trained are called one after the other.

    Args:
        layers: Each maps the last axis of `inputs`.
        inputs: `[..., channels]`.

    Returns:
        One tensor per layer; for plain layers, views of one tensor.
    """
    if len(layers) < 2 or not _joinable(layers):
        return [layer(inputs) for layer in layers]
    sizes = [len(layer.weight) for layer in layers]
    rest = -sum(sizes) % _ROW
    weights = [layer.weight for layer in layers]
    biases = [_bias(layer) for layer in layers] if _any_bias(layers) else []
    if rest:
        weights.append(weights[0].new_zeros(rest, inputs.shape[-1]))
        biases += [weights[0].new_zeros(rest)] if biases else []
    bias = torch.cat(biases) if biases else None
    joined = F.linear(inputs, torch.cat(weights), bias)
    parts = joined.split([*sizes, rest], dim=-1)[: len(layers)]
    if torch.compiler.is_compiling():
        parts = _SideBySide.apply(joined, *(part.detach() for part in parts))
    return list(parts)


class _SideBySide(torch.autograd.Function):
    """The first parts of a tensor's last axis; gradients are put side by side by `join_columns`.

    For compiled code only: it has no second derivatives, and `torch.func` does not take it. Parts
    are given: with gradient checkpointing torch 2.11 would keep all that is computed in `forward`.
    """

    @staticmethod
    def forward(ctx: Any, joined: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        sizes = [part.shape[-1] for part in parts]
        ctx.sizes = [*sizes, joined.shape[-1] - sum(sizes)]
        ctx.set_materialize_grads(False)
        return parts

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        given = next((g for g in gradients if g is not None), None)
        if given is None:
            return (None,) * len(ctx.sizes)
        parts = [
            given.new_zeros((*given.shape[:-1], size)) if gradient is None else gradient
            for gradient, size in zip((*gradients, None), ctx.sizes, strict=True)
            if size
        ]
        return join_columns(parts), *[None] * len(gradients)


@torch.library.custom_op("mhla_gen::join_columns", mutates_args=())
def join_columns(parts: list[Tensor]) -> Tensor:
    """Tensors side by side along their last axis, each read once.

    torch.compile would compute every part for every column and choose one: for four projections
    that takes twice as long.
    """
    return torch.cat(parts, dim=-1)


@join_columns.register_fake
def _(parts: list[Tensor]) -> Tensor:
    return parts[0].new_empty((*parts[0].shape[:-1], sum(part.shape[-1] for part in parts)))


def _joinable(layers: Sequence[Any]) -> bool:
    """Whether layers are plain and agree in dtype, device and whether they are trained."""
    if not all(is_plain(layer) for layer in layers):
        return False
    first = layers[0].weight
    return all(
        layer.weight.requires_grad == first.requires_grad
        and layer.weight.dtype == first.dtype
        and layer.weight.device == first.device
        for layer in layers[1:]
    )


def _any_bias(layers: Sequence[nn.Linear]) -> bool:
    return any(layer.bias is not None for layer in layers)  # pyright: ignore[reportUnnecessaryComparison]


def _bias(layer: nn.Linear) -> Tensor:
    if layer.bias is None:  # pyright: ignore[reportUnnecessaryComparison]
        return layer.weight.new_zeros(len(layer.weight))
    return layer.bias
