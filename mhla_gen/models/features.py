"""Maps of queries and keys before MHLA's operator: learned maps and softmax features."""

import torch
from torch import Tensor, nn

from mhla_gen.config import MHLAConfig
from mhla_gen.ops.feature_maps import relu

SOFTMAX, FOCUSED = "softmax", "focused"
WHOLE_HEAD_MAPS = (SOFTMAX, FOCUSED)
"""Feature maps over all channels of a head; those of the operator are elementwise."""
_FOCUS = 3


class Features(nn.Module):
    """Queries and keys as MHLA's operator takes them.

    Args:
        num_heads: Number of heads.
        head_dim: Channels per head.
        config: Settings of φ.

    Source:
        A learned map before φ, for conversion: Hedgehog, Zhang et al. 2024, arXiv:2402.04347.
        Softmax over channels: SLA, arXiv:2509.24006.
    """

    def __init__(self, num_heads: int, head_dim: int, config: MHLAConfig):
        super().__init__()
        self.feature_map = config.feature_map
        whole_head = config.feature_map in WHOLE_HEAD_MAPS
        self.operator_map = "identity" if whole_head else config.feature_map
        shape = (num_heads, head_dim, head_dim)
        learned = config.learned_features
        # The map is the identity plus this, so that weight decay pulls it towards the identity.
        self.query_map = nn.Parameter(torch.zeros(shape)) if learned else None
        self.key_map = nn.Parameter(torch.zeros(shape)) if learned else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Reset the maps to the identity."""
        for weight in self.parameters():
            weight.zero_()

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Map `[batch, seq_len, num_heads, head_dim]` to the same shape."""
        return self._mapped(query, self.query_map), self._mapped(key, self.key_map)

    def _mapped(self, x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is not None:
            x = x + torch.einsum("bnhd,hde->bnhe", x, weight).type_as(x)
        if self.feature_map == SOFTMAX:
            # Autocast computes softmax in float32.
            return x.softmax(dim=-1).type_as(x)
        return focused(x) if self.feature_map == FOCUSED else x


def focused(x: Tensor) -> Tensor:
    r"""$\lVert r \rVert \, r^3 / \lVert r^3 \rVert$ of $r = \mathrm{relu}(x) + 10^{-6}$.

    The cube turns a vector towards its large channels; the factor preserves its norm.

    Args:
        x: `[..., head_dim]`; norms are taken over a head, in float32 or wider.

    Returns:
        Like `x`.

    Source:
        Han et al. 2023, arXiv:2308.00442, with p = 3; its learned scale of channels is covered by
        `learned_features`.
    """
    r = relu(x.to(torch.promote_types(x.dtype, torch.float32)))
    # Divided by the largest first, since cubes of small features would underflow in float32.
    sharp = (r / r.amax(dim=-1, keepdim=True)).pow(_FOCUS)
    scale = r.norm(dim=-1, keepdim=True) / sharp.norm(dim=-1, keepdim=True)
    return (sharp * scale).to(x.dtype)


def with_magnitude(out: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    r"""Make the weights of linear attention depend on the norm of the query.

    MALA's $\beta_i\,\varphi(q_i)^\top\varphi(k_j) - \gamma_i$ with rows of sum 1 is
    $o_i + z_i (o_i - \bar v)$, where $o$ is attention with a denominator, $\bar v$ the mean of all
    values and $z_i = \varphi(q_i)^\top \overline{\varphi(k)} / \sqrt{d}$.

    Args:
        out: Attention with a denominator, `[batch, seq_len, num_heads, head_dim]`.
        query: φ of queries, like `out`, without rotation.
        key: φ of keys, like `out`, without rotation.
        value: Like `out`.

    Returns:
        Like `out`.

    Source:
        Fan et al. 2025, arXiv:2507.00698, and its code, which scales by $1 / (n \sqrt d)$.
    """
    wide = torch.promote_types(out.dtype, torch.float32)
    mean_key, mean_value = (x.to(wide).mean(dim=1, keepdim=True) for x in (key, value))
    z = (query.to(wide) * mean_key).sum(-1, keepdim=True) * query.shape[-1] ** -0.5
    return (out + z * (out - mean_value)).to(out.dtype)
