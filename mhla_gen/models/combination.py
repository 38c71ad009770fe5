"""How a layer combines the outputs of its exact half and of MHLA: the weight of each."""

import math

import torch
from torch import Tensor, nn

from mhla_gen.ops.depthwise import Blend


class GateCombination(nn.Module):
    r"""$a \cdot \mathrm{exact} + (1 - a) \cdot \mathrm{linear}$, one $a$ for each token and head.

    $a$ is the sigmoid of a linear map of the layer's input.

    Args:
        num_heads: Number of heads.
        hidden_size: Channels of the layer's input.
        start: `a` before training.
    """

    def __init__(self, num_heads: int, hidden_size: int, start: float):
        super().__init__()
        self.start = start
        self.to_share = nn.Linear(hidden_size, num_heads)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Reset the weight of every token and head to `start`."""
        self.to_share.weight.zero_()
        self.to_share.bias.fill_(math.log(self.start / (1 - self.start)))

    def forward(self, exact: Tensor, linear: Tensor, logits: Tensor) -> Blend:
        """What the next pass over the tokens combines.

        Args:
            exact: Output of the exact half, `[batch, seq_len, num_heads, head_dim]`.
            linear: Output of MHLA, of the same shape.
            logits: `to_share` of the layer's input, `[batch, seq_len, num_heads]`.
        """
        return Blend(exact, linear, logits)
