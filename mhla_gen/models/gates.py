"""The output gate of an attention layer: factors computed from its input."""

from typing import Any

import torch
from torch import Tensor, nn

# silu(x) = 1 here, to the last bit in float32, bfloat16 and float16.
_SILU_ONE = 1.2784645427610738

HEAD = "head"
"""Setting of a gate with one factor per head."""


class LowRankGate(nn.Module):
    """A low-rank linear map with bias.

    Args:
        in_features: Channels of the input.
        rank: Channels between the two factors.
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
    """The linear map of a gate, chosen by `MHLAConfig.gate`; None without a gate."""
    if setting is False:
        return None
    if setting is True:
        return nn.Linear(hidden_size, num_heads * head_dim)
    if setting == HEAD:
        return nn.Linear(hidden_size, num_heads)
    return LowRankGate(hidden_size, setting, num_heads * head_dim)


@torch.no_grad()
def reset_gate(gate: nn.Module) -> None:
    """Reset a gate to 1 for every input."""
    last: Any = gate
    if isinstance(gate, LowRankGate):
        # Only one factor is zero; otherwise neither would get a gradient.
        gate.down.reset_parameters()
        last = gate.up
    last.weight.zero_()
    last.bias.fill_(_SILU_ONE)


def input_layer(gate: Any) -> Any:
    """The linear layer of a gate that reads the attention layer's input."""
    return gate.down if isinstance(gate, LowRankGate) else gate


def gate_logits(gate: Any, product: Tensor) -> Tensor:
    """The logits of a gate, `[..., channels or heads]`; its factors are their SiLU.

    Args:
        gate: From `make_gate`.
        product: Output of `input_layer(gate)`.
    """
    return gate.up(product) if isinstance(gate, LowRankGate) else product
