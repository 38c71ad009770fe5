"""The output gate of an attention layer: what its input multiplies its output by."""

from typing import Any

import torch
from torch import Tensor, nn

# silu(x) = 1 here, to the last bit in float32, bfloat16 and float16.
_SILU_ONE = 1.2784645427610738

HEAD = "head"
"""Setting of a gate with one number a head."""


class LowRankGate(nn.Module):
    """A linear map with bias through a few channels.

    Args:
        in_features: Channels of the input.
        rank: Channels between.
        out_features: Channels of the output.
    """

    def __init__(self, in_features: int, rank: int, out_features: int):
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        return self.up(self.down(hidden_states))


def make_gate(setting: Any, hidden_size: int, num_heads: int, head_dim: int) -> nn.Module | None:
    """The linear map that a gate is made of, as `MHLAConfig.gate` says; None without one."""
    if setting is False:
        return None
    if setting is True:
        return nn.Linear(hidden_size, num_heads * head_dim)
    if setting == HEAD:
        return nn.Linear(hidden_size, num_heads)
    return LowRankGate(hidden_size, setting, num_heads * head_dim)


@torch.no_grad()
def reset_gate(gate: nn.Module) -> None:
    """Let a gate be 1 whatever its input is."""
    last: Any = gate
    if isinstance(gate, LowRankGate):
        # Not zero: the other factor would never learn.
        gate.down.reset_parameters()
        last = gate.up
    last.weight.zero_()
    last.bias.fill_(_SILU_ONE)


def input_layer(gate: Any) -> Any:
    """The part of a gate that reads the layer's input."""
    return gate.down if isinstance(gate, LowRankGate) else gate


def gate_logits(gate: Any, product: Tensor) -> Tensor:
    """What SiLU makes the gate's factors of, `[..., channels or heads]`.

    Args:
        gate: From `make_gate`.
        product: What `input_layer(gate)` made of the layer's input.
    """
    return gate.up(product) if isinstance(gate, LowRankGate) else product
