"""How a layer combines the outputs of its exact half and of MHLA: the weight of each."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from mhla_gen.config import MHLAConfig
from mhla_gen.ops import mhla
from mhla_gen.ops.depthwise import Blend


class Combination(nn.Module):
    """Combines the outputs of the exact half and MHLA, `[batch, seq_len, num_heads, head_dim]`.

    The inputs of the weights are passed by keyword; they come from `MHLA.weighed_by`.
    """

    def input_layers(self) -> tuple[Any, ...]:
        """Linear layers that read the attention layer's input."""
        return ()

    def reset_parameters(self) -> None:
        """Reset the parameters to their initial values."""
        raise NotImplementedError

    def forward(self, exact: Tensor, linear: Tensor, **weighed_by: Any) -> Tensor | Blend:
        """The combined output, shaped like its two inputs, or what the next pass combines."""
        logits = self.logits(**weighed_by)
        assert logits is not None
        return Blend(exact, linear, logits)

    def logits(self, **weighed_by: Any) -> Tensor | None:
        """Logits of the exact half's weight, `[batch, seq_len, num_heads]`; None without any."""
        return None

    def shares(self, **weighed_by: Any) -> Tensor | None:
        """Weight of the exact half, `[batch, seq_len, num_heads]`; None without such a weight."""
        logits = self.logits(**weighed_by)
        return None if logits is None else logits.sigmoid()


class GateCombination(Combination):
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
        self.to_share.bias.fill_(_logit(self.start))

    def input_layers(self) -> tuple[Any, ...]:
        """The linear layer that gives the logits of `a`."""
        return (self.to_share,)

    def logits(self, **weighed_by: Any) -> Tensor:
        """See `Combination`."""
        return weighed_by["logits"]


class DenominatorCombination(Combination):
    r"""As `GateCombination`, with $a = \sigma(\mathrm{lse} + b - \log \mathrm{denominator})$.

    With $b = 0$ this is one weighted average over the pairs of both halves, with one denominator.
    $b$ is learned per head, since the weights of the two halves have different scales.

    Args:
        num_heads: Number of heads.
        start: $\sigma(b)$ before training.
    """

    def __init__(self, num_heads: int, start: float):
        super().__init__()
        self.start = start
        self.bias = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Reset b to its initial value."""
        self.bias.fill_(_logit(self.start))

    def logits(self, **weighed_by: Any) -> Tensor:
        """See `Combination`."""
        log_sum_exp, log_denominator = weighed_by["log_sum_exp"], weighed_by["log_denominator"]
        return log_sum_exp.transpose(1, 2) - log_denominator + self.bias.float()


class ProjectionCombination(Combination):
    """The exact half plus a linear map of MHLA's output; the map is initialized to zero.

    Args:
        head_dim: Channels per head; all heads share the map.

    Source:
        SLA, arXiv:2509.24006.
    """

    def __init__(self, head_dim: int):
        super().__init__()
        self.proj = nn.Linear(head_dim, head_dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Reset the map to zero."""
        self.proj.weight.zero_()
        self.proj.bias.zero_()

    def forward(self, exact: Tensor, linear: Tensor, **weighed_by: Any) -> Tensor:
        """See `Combination`."""
        return exact + self.proj(linear)


def make_combination(
    config: MHLAConfig, num_heads: int, head_dim: int, hidden_size: int
) -> Combination:
    """The module that combines the halves of a layer, chosen by `config.combine`."""
    if config.combine == "projection":
        return ProjectionCombination(head_dim)
    assert config.exact_start is not None
    if config.combine == "denominator":
        return DenominatorCombination(num_heads, config.exact_start)
    return GateCombination(num_heads, hidden_size, config.exact_start)


def log_denominator(
    query: Tensor,
    key: Tensor,
    mixing: Tensor,
    config: MHLAConfig,
    *,
    grid: tuple[int, ...],
    layout: tuple[int, ...],
    feature_map: str,
) -> Tensor:
    """Logarithm of MHLA's denominator, float32 `[batch, seq_len, num_heads]`; see `mhla`."""
    # Sums over all keys exceed the range of float16 and need the precision of float32.
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, key = query.to(dtype), key.to(dtype)
    sums = mhla(
        query,
        key,
        torch.ones_like(key[..., :1]),
        mixing,
        grid=grid,
        layout=layout,
        feature_map=feature_map,
        normalize=False,
        implementation=config.implementation,
    )
    return (sums.squeeze(-1) + config.eps).log()


def _logit(share: float) -> float:
    return math.log(share / (1 - share))
