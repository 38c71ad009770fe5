"""The exact half of an attention layer: softmax on a chosen part of the pairs, or on all."""

import functools
import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhla_gen.config import AttentionConfig, MHLAConfig
from mhla_gen.models.head_rotary import rotated
from mhla_gen.ops import TileLayout, auto_tiles, mhla, tile_attention, tile_share
from mhla_gen.ops.depthwise import Blend

# Cached, because all layers ask for the same few grids.
_remembered_tiles = functools.lru_cache(maxsize=1024)(auto_tiles)


# torch.compile calls this function instead of tracing its integer arithmetic.
@torch.compiler.assume_constant_result
def _auto_tiles(
    grid: tuple[int, ...],
    share: str,
    tile: tuple[int, ...] | None = None,
    group: tuple[int, ...] | None = None,
    window: tuple[int, ...] | None = None,
) -> TileLayout:
    return _remembered_tiles(grid, float(share), tile=tile, group=group, window=window)


def tile_layout(config: MHLAConfig, grid: tuple[int, ...]) -> TileLayout:
    """The tiles of a layer on a token grid, from the config or from `auto_tiles`.

    Args:
        config: Settings; without a share of pairs, no tile is read.
        grid: Number of tokens along each axis.
    """
    # As indices, so that torch.compile specializes on the grid and its tiles.
    grid = tuple(operator.index(length) for length in grid)
    if not config.has_tiles:
        picked = _auto_tiles(grid, "1")
        return TileLayout(picked.tile, picked.group, (0,) * len(grid), 0)
    tile, group = config.exact_tile, config.exact_group
    if tile is not None and group is None:
        group = (1,) * len(grid)
    picked = _auto_tiles(grid, config.share, tile, group, config.exact_window)
    # A layout of its own, since torch 2.11 cannot unpack one that it was told to take as constant.
    top = picked.top if config.exact_top is None else config.exact_top
    return TileLayout(picked.tile, picked.group, picked.window, top)


def exact_share(config: AttentionConfig, grid: tuple[int, ...]) -> float:
    """The share of pairs that softmax computes on a token grid, from 0 to 1."""
    if not isinstance(config, MHLAConfig) or not config.has_tiles:
        return float(config.exact)
    tile, group, window, top = tile_layout(config, grid)
    return tile_share(grid, tile, window, top, group)


def exact_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: MHLAConfig,
    grid: tuple[int, ...],
    rotary: tuple[Tensor, Tensor] | None = None,
    extra: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Softmax on the share of pairs that a config asks for, and on keys off the grid.

    Args:
        query: `[batch, seq_len, num_heads, head_dim]`, raster order.
        key: Like `query`.
        value: Like `query`.
        config: Settings; without a share of pairs, only `extra` is read.
        grid: Number of tokens along each axis.
        rotary: As in `MHLA.forward`.
        extra: As in `MHLA.forward`.

    Returns:
        The output, shaped like `value`, and the logarithm of its denominator, float32 `[batch,
        num_heads, seq_len]`, or None if the combination does not use it.
    """
    if config.exact == 1:
        mask = None
        query, key = rotated(query, rotary), rotated(key, rotary)
        if extra is not None:
            if len(extra) == 3:
                mask = F.pad(extra[2], (key.shape[1], 0), value=True)
            key, value = (torch.cat(pair, dim=1) for pair in ((key, extra[0]), (value, extra[1])))
        return _softmax(query, key, value, mask), None
    if rotary is not None and rotary[0].ndim == 4:
        query, key, rotary = rotated(query, rotary), rotated(key, rotary), None
    if extra is not None and config.exact == 0:
        return _extra_alone(query, key, value, config, grid, rotary, extra)
    return _tiles(query, key, value, config, grid, rotary, extra)


def _extra_alone(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: MHLAConfig,
    grid: tuple[int, ...],
    rotary: tuple[Tensor, Tensor] | None,
    extra: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor | None]:
    """Softmax on keys off the grid only; see `exact_attention`.

    If a sample has no such key, for example because its whole caption is masked, its output is zero
    and the logarithm of its denominator is -inf: with `combine=denominator`, MHLA gets all the
    weight.
    """
    empty = None
    if len(extra) == 3:
        empty = ~extra[2].any(dim=1)
        # Softmax over no key would be 0 / 0.
        extra = (*extra[:2], extra[2] | empty[:, None])
    if config.combine == "denominator":
        out, log_sum_exp = _tiles(query, key, value, config, grid, rotary, extra)
    else:
        out, log_sum_exp = _softmax(rotated(query, rotary), *extra), None
    if empty is None:
        return out, log_sum_exp
    out = out.masked_fill(empty[:, None, None, None], 0)
    if log_sum_exp is not None:
        log_sum_exp = log_sum_exp.masked_fill(empty[:, None, None], -math.inf)
    return out, log_sum_exp


def _tiles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: MHLAConfig,
    grid: tuple[int, ...],
    rotary: tuple[Tensor, Tensor] | None,
    extra: tuple[Tensor, ...] | None,
) -> tuple[Tensor, Tensor]:
    """Softmax on the tiles of the config; see `exact_attention`."""
    tile, group, window, top = tile_layout(config, grid)
    return tile_attention(
        query,
        key,
        value,
        grid=grid,
        tile=tile,
        group=group,
        window=window,
        top=top,
        rotary=rotary,
        extra=extra,
        implementation=config.implementation,
    )


def _softmax(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax over keys with a bool mask `[batch, key_len]`, True for valid ones."""
    return F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (query, key, value)),
        attn_mask=None if mask is None else mask[:, None, None],
    ).transpose(1, 2)


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


def _logit(share: float) -> float:
    return math.log(share / (1 - share))
