"""The module that Linformer adds to an attention layer: projections of keys and values."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mhla_gen.config import LinformerConfig
from mhla_gen.errors import UserError
from mhla_gen.models.additions import AddedAttention, Inputs
from mhla_gen.models.rotary import rotated
from mhla_gen.ops import block_starts
from mhla_gen.ops.linformer import attend_projected, entered_by, project

_POOLS: dict[str, tuple[Any, ...]] = {
    "mean_pool": (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
    "max_pool": (F.max_pool1d, F.max_pool2d, F.max_pool3d),
    "conv": (F.conv1d, F.conv2d, F.conv3d),
}


class Linformer(AddedAttention):
    """Softmax over projected keys and values, with all its learned parts.

    The projections are initialized to means of neighbouring tokens, which disturbs a pretrained
    model less than random projections; convolution and gate start as the identity.

    Args:
        num_heads: Number of heads.
        head_dim: Channels per head, the same for queries, keys and values.
        hidden_size: Channels of the layer's input, from which the gate is computed.
        config: Settings of this layer, with a grid.
        owner: With `sharing="layerwise"`, the layer whose projections this layer uses; None if it
            has its own.

    Raises:
        ValueError: If `config.grid` is still "auto".

    Source:
        Wang et al. 2020, arXiv:2006.04768, Sec. 4.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        hidden_size: int,
        config: LinformerConfig,
        owner: "Linformer | None" = None,
    ):
        super().__init__(num_heads, head_dim, config)
        if config.grid == "auto":
            raise UserError("Linformer needs a grid of token counts; resolve grid='auto' first")
        self.config: LinformerConfig = config
        self.mixing = None
        # In a tuple, so that torch does not register it as a child of this module.
        self._owner = (owner,) if owner is not None and config.sharing == "layerwise" else ()
        self.key_projection: Any = None
        self.value_projection: Any = None
        if not self._owner:
            heads = num_heads if config.sharing == "none" else 1
            self.key_projection = make_projection(config, heads, head_dim)
            if config.sharing in ("none", "headwise") and config.projection in ("linear", "conv"):
                self.value_projection = make_projection(config, heads, head_dim)
        self.add_parts(hidden_size, len(config.grid))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Reset projections to means, and convolution and gate to the identity."""
        for projection in (self.key_projection, self.value_projection):
            if projection is not None:
                projection.reset_parameters()
        self.reset_parts()

    def _begin(self, given: Inputs) -> Callable[[], Tensor]:
        """Start the attention; calling the result ends it."""
        query, key, value, _, grid, rotary, _, extra = given
        along = tuple(grid) if self.config.by_axis else (query.shape[1],)
        if not self.config.by_axis and along[0] > self.config.lengths[0]:
            raise UserError(
                f"Linformer's projections are for at most {self.config.lengths[0]} tokens, found "
                f"{along[0]}; convert with a larger grid, or with a projected_len for each axis, "
                f"such as {(8,) * len(grid)}, which takes every size"
            )
        self._require_owner(query.device)
        query, key = rotated(query, rotary), rotated(key, rotary)
        key_projection, value_projection = self.projections()
        valid = None
        if isinstance(key_projection, LinearProjection) and along != self.config.lengths:
            valid = key_projection.entered(value_projection, along)
        key, value = key_projection(key, along), value_projection(value, along)
        if extra is not None:
            key, value, valid = _with_extra(key, value, valid, extra)
        return lambda: attend_projected(query, key, value, valid)

    def projections(self) -> tuple[Any, Any]:
        """E and F, which may be the same module or belong to another layer."""
        owner = self._owner[0] if self._owner else self
        key_projection = owner.key_projection
        value_projection = owner.value_projection
        return key_projection, key_projection if value_projection is None else value_projection

    def _require_owner(self, device: torch.device) -> None:
        """Raise unless another layer's weights can be read here: accelerate's hooks load them."""
        for weight in self._owner[0].key_projection.parameters() if self._owner else ():
            elsewhere = weight.device != device and not weight.is_meta
            if elsewhere or isinstance(weight, DTensor):
                raise UserError(
                    "sharing=layerwise reads projections of another layer, which are sharded or on "
                    "another device; use sharing=key_value there"
                )

    @property
    def kind(self) -> str:
        """Linformer."""
        return "linformer"

    def extra_repr(self) -> str:
        """Heads and sizes, for `print(model)`."""
        config = self.config
        return (
            f"num_heads={self.num_heads}, head_dim={self.head_dim}, "
            f"projected_len={config.projected_len}, projection={config.projection!r}, "
            f"sharing={config.sharing!r}"
        )


def _with_extra(
    key: Tensor, value: Tensor, valid: Tensor | None, extra: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Projected tokens, followed by the keys off the grid, which are not projected."""
    num_projected = key.shape[1]
    key, value = (torch.cat(pair, dim=1) for pair in ((key, extra[0]), (value, extra[1])))
    if valid is None and len(extra) < 3:
        return key, value, None
    shape = (key.shape[0], 1, num_projected)
    if valid is None:
        valid = torch.ones(shape, dtype=torch.bool, device=key.device)
    text = extra[2] if len(extra) == 3 else valid.new_ones(extra[0].shape[:2])
    valid = valid.expand(len(text), -1, -1)
    text = text[:, None].expand(-1, valid.shape[1], -1)
    return key, value, torch.cat((valid, text), dim=-1)


def make_projection(config: LinformerConfig, heads: int, head_dim: int) -> Any:
    """E or F of a layer, shared by all heads (`heads=1`) or one per head."""
    if config.projection == "linear":
        return LinearProjection(heads, config.projected, config.lengths, config.by_axis)
    pairs = zip(config.lengths, config.projected, strict=True)
    window = tuple(math.ceil(length / count) for length, count in pairs)
    return WindowProjection(config.projection, window, heads, head_dim)


class Matrices(nn.ParameterList):
    """Parameters that a call returns, since offloading loads those of a module when it is called.

    A parent's call loads nothing for its children, and a plain list of parameters has no call.
    """

    __call__ = nn.Module.__call__

    def forward(self) -> tuple[Tensor, ...]:
        """The parameters, on the device of the computation."""
        return tuple(self)


class LinearProjection(nn.Module):
    """A learned matrix along each axis of tokens, initialized to means of neighbours.

    Args:
        heads: Number of matrices, one per head; 1 if all heads share one.
        projected: Number of projected tokens along each axis.
        lengths: Number of columns of the matrix of each axis: the tokens that it is made for.
        resampled: Handle axes of other lengths by resampling the columns: each token gets the
            share of the columns that it covers. Otherwise a shorter axis uses the first columns.
    """

    def __init__(
        self, heads: int, projected: tuple[int, ...], lengths: tuple[int, ...], resampled: bool
    ):
        super().__init__()
        self.resampled = resampled
        prefix = () if heads == 1 else (heads,)
        self.weights = Matrices(
            nn.Parameter(torch.empty(*prefix, count, length))
            for count, length in zip(projected, lengths, strict=True)
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Reset each projected token to the mean of its segment of the axis."""
        for weight in self.weights:
            count, length = weight.shape[-2:]
            weight.zero_()
            starts = (*block_starts(length, count), length)
            for row, (first, end) in enumerate(pairwise(starts)):
                weight[..., row, first:end] = 1 / (end - first)

    def forward(self, tokens: Tensor, along: tuple[int, ...]) -> Tensor:
        """Project `[batch, seq_len, num_heads, dim]`, raster order of `along`."""
        tokens = tokens.unflatten(1, along)
        for axis, (weight, length) in enumerate(zip(self.weights(), along, strict=True)):
            tokens = project(self._columns(weight, length), tokens, axis + 1)
        return tokens.flatten(1, -3)

    def entered(self, other: "LinearProjection", along: tuple[int, ...]) -> Tensor | None:
        """The projected tokens that a shorter axis contributes to; see `entered_by`."""
        if self.resampled:
            return None
        here, there = (self._columns(p.weights()[0], along[0]) for p in (self, other))
        mask = torch.ones(1, along[0], dtype=torch.bool, device=here.device)
        return entered_by((here, there), mask)

    def _columns(self, weight: Tensor, length: int) -> Tensor:
        if self.resampled and length != weight.shape[-1]:
            return weight @ coverage(weight.shape[-1], length, weight)
        return weight[..., :length]


def coverage(columns: int, length: int, like: Tensor) -> Tensor:
    """The share of each column that each of `length` tokens on the same axis covers.

    Args:
        columns: Number of columns, spread evenly over the axis.
        length: Number of tokens, spread evenly over the axis.
        like: Tensor whose dtype and device the result has.

    Returns:
        `[columns, length]`; every row sums to 1.
    """
    # In units of 1 / (columns · length), positions are integers.
    column = torch.arange(columns, device=like.device)[:, None] * length
    token = torch.arange(length, device=like.device) * columns
    ends = torch.minimum(column + length, token + columns)
    return (ends - torch.maximum(column, token)).clamp_min(0).to(like.dtype) / length


class WindowProjection(nn.Module):
    """Mean, maximum or learned sum of each window of tokens; the last windows may be cut off.

    The window size is fixed, so a larger grid has more windows.

    Args:
        kind: mean_pool, max_pool or conv, whose weights differ by channel and start as the mean.
        window: Number of tokens along each axis.
        heads: Number of weights, one per head; 1 if all heads share one.
        head_dim: Channels per head.
    """

    def __init__(self, kind: str, window: tuple[int, ...], heads: int, head_dim: int):
        super().__init__()
        self.kind = kind
        self.window = window
        learned = kind == "conv"
        self.weight = nn.Parameter(torch.empty(heads, head_dim, *window)) if learned else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Reset the weights to those of the mean."""
        if self.weight is not None:
            self.weight.fill_(1 / math.prod(self.window))

    def forward(self, tokens: Tensor, along: tuple[int, ...]) -> Tensor:
        """Project `[batch, seq_len, num_heads, dim]`, raster order of `along`."""
        num_heads, run = tokens.shape[2], _POOLS[self.kind][len(along) - 1]
        x = tokens.flatten(2).transpose(1, 2).unflatten(2, along)
        if self.weight is not None:
            missing = [-length % side for length, side in zip(along, self.window, strict=True)]
            x = F.pad(x, [n for side in reversed(missing) for n in (0, side)])
            weight = self.weight.expand(num_heads, *self.weight.shape[1:]).flatten(0, 1)
            weight = weight.unsqueeze(1).to(x.dtype)
            out = run(x, weight, stride=self.window, groups=len(weight))
        else:
            side = tuple(min(pair) for pair in zip(self.window, along, strict=True))
            own = {"count_include_pad": False} if self.kind == "mean_pool" else {}
            out = run(x, side, side, ceil_mode=True, **own)
        return out.flatten(2).transpose(1, 2).unflatten(2, (num_heads, -1))
