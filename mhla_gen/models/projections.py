"""Linear layers that read the same input, computed in one product."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Rows of the product then begin at 128-byte lines in half precision, whatever is joined.
_ROW = 64


def products(layers: Sequence[Any], inputs: Tensor) -> list[Tensor]:
    """Outputs of linear layers of one input.

    Plain layers are computed as one layer whose weights stand side by side: a large product takes
    less time than several small ones, and its backward pass sums the gradients of the input within
    the product. Training in bfloat16 copies the weights in any case, to cast them, so that compiled
    code has them side by side for nothing. Layers with adapters or hooks, quantised or sharded
    ones, and such of which only some are trained, are called one after the other.

    Args:
        layers: Each maps the last axis of `inputs`.
        inputs: `[..., channels]`.

    Returns:
        One tensor a layer; of plain ones, views of one tensor.
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
    return list(joined.split([*sizes, *([rest] if rest else [])], dim=-1))[: len(layers)]


def _joinable(layers: Sequence[Any]) -> bool:
    """Whether layers are plain ones, alike in dtype, device and training."""
    if not all(_is_plain(layer) for layer in layers):
        return False
    first = layers[0].weight
    return all(
        layer.weight.requires_grad == first.requires_grad
        and layer.weight.dtype == first.dtype
        and layer.weight.device == first.device
        for layer in layers[1:]
    )


def _is_plain(layer: Any) -> bool:
    # Offloading replaces `forward`; adapters and quantisation the layer, or its weight's class.
    return (
        type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and "forward" not in layer.__dict__
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks)
    )


def _any_bias(layers: Sequence[nn.Linear]) -> bool:
    return any(layer.bias is not None for layer in layers)  # pyright: ignore[reportUnnecessaryComparison]


def _bias(layer: nn.Linear) -> Tensor:
    if layer.bias is None:  # pyright: ignore[reportUnnecessaryComparison]
        return layer.weight.new_zeros(len(layer.weight))
    return layer.bias
