"""GELU in the matrix product before it, where no gradient is needed."""

from collections.abc import Collection
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

JOINED = ("diffusers.models.activations.GELU",)
"""Classes of modules with a linear layer `proj` and `approximate`, a kind of GELU."""


@torch.library.custom_op("mhla_gen::linear_gelu", mutates_args=())
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`gelu(x weightᵀ + bias)`, by the formula with tanh; cuBLAS computes both in one pass.

    Args:
        x: `[..., channels]`.
        weight: `[out_channels, channels]`.
        bias: `[out_channels]`.
    """
    if not x.is_cuda:
        return gelu(linear(x, weight, bias), approximate="tanh")
    rows = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
    return rows.unflatten(0, x.shape[:-1])


@linear_gelu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(weight)))


def join_gelu(model: nn.Module, devices: Collection[str] = ("cuda",)) -> None:
    """Let feed-forward layers of a model use `linear_gelu` where gradients are off.

    Args:
        model: The model.
        devices: Kinds of devices on which they do; elsewhere nothing is gained.
    """
    module: Any
    for module in model.modules():
        name = f"{type(module).__module__}.{type(module).__qualname__}"
        if name in JOINED and module.approximate == "tanh" and "forward" not in module.__dict__:
            module.joins_on = tuple(devices)
            # For a partial function in its place, torch 2.11 would compile every block anew.
            module.forward = MethodType(_forward, module)


def _forward(self: Any, hidden_states: Tensor) -> Tensor:
    layer = self.proj
    joins = (
        hidden_states.device.type in self.joins_on
        and not torch.is_grad_enabled()
        and is_plain(layer)
        and layer.bias is not None
        and layer.weight.dtype == hidden_states.dtype
        and not torch.is_autocast_enabled("cuda")
    )
    if not joins:
        return type(self).forward(self, hidden_states)
    return linear_gelu(hidden_states, layer.weight, layer.bias)


def is_plain(layer: Any) -> bool:
    """Whether calling a layer is a product with its weight, and nothing else."""
    # Offloading replaces `forward`; adapters and quantisation replace the layer or the class of
    # its weight.
    return (
        type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and "forward" not in layer.__dict__
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks)
    )
