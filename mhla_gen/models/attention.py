"""The module added to an attention layer: MHLA, softmax on part of the pairs, or both."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mhla_gen.config import MHLAConfig
from mhla_gen.errors import UserError
from mhla_gen.models.additions import AddedAttention, Inputs
from mhla_gen.models.combination import GateCombination
from mhla_gen.models.exact import exact_attention
from mhla_gen.models.features import Features, with_magnitude
from mhla_gen.models.rotary import mhla_rotated_by_head
from mhla_gen.ops import FEATURE_MAPS, FRAME_MIXING_INITS, MIXING_INITS, mhla
from mhla_gen.ops.depthwise import Blend
from mhla_gen.ops.sharded import begin_sharded_mhla

NEW_START = 0.5
"""Initial weight of the exact half in a new model."""
CONVERTED_START = 0.98
"""Initial weight of the exact half in a converted model: the value that disturbs it least."""


class MHLA(AddedAttention):
    """MHLA over projected queries, keys and values, with all its learned parts.

    Softmax can compute a share of the pairs exactly, beside MHLA or in its place (`config.exact`).
    The module is a child of the attention layer, which keeps its projections: adding the child
    turns a softmax layer into an MHLA layer, and removing it restores the softmax layer.
    Convolution and gate start as the identity, so that only the change of attention disturbs a
    pretrained model.

    Args:
        num_heads: Number of heads.
        head_dim: Channels per head, the same for queries, keys and values.
        hidden_size: Channels of the layer's input, from which the gate is computed.
        config: Settings; `layout` must be given as block counts. If `exact_start` is left open,
            the weight of the exact half starts at 0.5.
        reads_text: Whether the layer's tokens also read keys off their grid, exactly.

    Raises:
        ValueError: If `config.layout` is still "auto".

    Source:
        Zhang et al. 2026, arXiv:2601.07832: mixing Sec. 4.2, convolution (CPE) and gate Sec. 5.2.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        hidden_size: int,
        config: MHLAConfig,
        reads_text: bool = False,
    ):
        super().__init__(num_heads, head_dim, config)
        if config.layout == "auto":
            raise UserError("MHLA needs a layout of block counts; resolve layout='auto' first")
        has_halves = config.has_linear and (config.has_tiles or reads_text)
        if has_halves and config.exact_start is None:
            config = replace(config, exact_start=NEW_START)
        self.config: MHLAConfig = config
        self.mixing = None
        if config.has_linear:
            mixing = initial_mixing(config, num_heads)
            self.mixing = nn.Parameter(mixing, requires_grad=config.mixing_learnable)
        self.features = Features(num_heads, head_dim, config) if config.has_linear else None
        self.combine = None
        if has_halves:
            assert config.exact_start is not None
            self.combine = GateCombination(num_heads, hidden_size, config.exact_start)
        self.add_parts(hidden_size, len(config.layout))
        self.norm = nn.RMSNorm(head_dim, eps=1e-6) if config.output_norm else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Reset mixing to its initial matrix, and convolution and gate to the identity."""
        if self.mixing is not None:
            self.mixing.copy_(initial_mixing(self.config, self.num_heads))
        for module in (self.features, self.combine):
            if module is not None:
                module.reset_parameters()
        self.reset_parts()
        if self.norm is not None:
            self.norm.reset_parameters()

    def input_layers(self) -> tuple[Any, ...]:
        """The input layers of the gate, then the one that weighs the halves."""
        shares = () if self.combine is None else (self.combine.to_share,)
        return (*super().input_layers(), *shares)

    def _begin(self, given: Inputs) -> Callable[[], Tensor | Blend]:
        """Start the attention; calling the result ends it.

        An axis with fewer tokens than blocks, such as the single frame of an image, uses as many
        blocks as it has tokens, evenly spaced; the other blocks are empty and never read.
        """
        config, extra = self.config, given.extra
        assert extra is None or config.exact > 0 or self.combine is not None
        if config.exact == 0 and extra is None:
            return self._begin_linear(given)

        def attend() -> Tensor | Blend:
            query, key, value, of_input, grid, rotary, *_ = given
            exact = exact_attention(query, key, value, config, grid, rotary, extra)
            if self.combine is None:
                return exact
            linear = self._begin_linear(given._replace(group=None))()
            return self.combine(exact, linear, of_input[-1])

        return attend

    def _begin_linear(self, given: Inputs) -> Callable[[], Tensor]:
        """Start MHLA; calling the result ends it."""
        assert self.features is not None
        query, key = self.features(given.query, given.key)
        value, grid, rotary = given.value, given.grid, given.rotary
        layout, mixing = self.occupied_blocks(grid)
        attend = _begin_operator(rotary, given.group)(
            query,
            key,
            value,
            mixing,
            grid=grid,
            layout=layout,
            feature_map=self.features.operator_map,
            rotary=rotary,
            normalize=self.config.normalize,
            eps=self.config.eps,
            implementation=self.config.implementation,
        )
        norm, phi = self.norm, FEATURE_MAPS[self.features.operator_map]

        def finish() -> Tensor:
            out = attend()
            if self.config.magnitude:
                out = with_magnitude(out, phi(query), phi(key), value)
            # Autocast leaves the weight of the norm in float32.
            return out if norm is None else norm(out).type_as(out)

        return finish

    def occupied_blocks(self, grid: tuple[int, ...]) -> tuple[tuple[int, ...], Tensor]:
        """The blocks that hold tokens of this grid: their layout and their part of mixing.

        Args:
            grid: Number of tokens along each axis.

        Returns:
            The number of blocks along each axis, at most that of the config, and the rows and
            columns of `mixing` that belong to them.
        """
        assert self.mixing is not None
        pairs = list(zip(self.config.layout, grid, strict=True))
        if all(count <= length for count, length in pairs):
            return self.config.layout, self.mixing
        layout = tuple(min(pair) for pair in pairs)
        blocks = evenly_spaced(self.config.layout, layout, self.mixing.device)
        return layout, self.mixing.index_select(-1, blocks).index_select(-2, blocks)

    def matrix(self, mixing: Tensor) -> Tensor:
        """`mixing` as a matrix `[(num_heads,) blocks, blocks]`, which here it already is."""
        return mixing

    @property
    def kind(self) -> str:
        """mhla, linear (one block), softmax (of all pairs), exact (of a share) or exact + one."""
        if self.config.exact == 1:
            return "softmax"
        linear = "linear" if math.prod(self.config.layout) == 1 else "mhla"
        halves = (("exact", self.config.has_tiles), (linear, self.config.has_linear))
        return " + ".join(name for name, there in halves if there)

    def extra_repr(self) -> str:
        """Heads, share and layout, for `print(model)`."""
        parts = [f"num_heads={self.num_heads}", f"head_dim={self.head_dim}"]
        if self.config.exact > 0:
            parts.append(f"exact={self.config.exact:g}")
        if self.config.has_linear:
            parts.append(f"layout={self.config.layout}, feature_map={self.config.feature_map!r}")
        return ", ".join(parts)


def _begin_operator(
    rotary: tuple[Tensor, Tensor] | None, group: Any
) -> Callable[..., Callable[[], Tensor]]:
    """The operator for this shape of `rotary` and this distribution of tokens.

    All choices have one signature. Calling what they return runs the operator, or the rest of it
    if communication has started.

    Raises:
        ValueError: If ranks share the sequence and `rotary` differs from head to head.
    """
    by_head = rotary is not None and rotary[0].ndim == 4
    if group is None:
        operator = mhla_rotated_by_head if by_head else mhla
        return lambda *tensors, **options: partial(operator, *tensors, **options)
    if by_head:
        raise UserError("a sequence that ranks share needs one rotary table for all heads")
    return partial(begin_sharded_mhla, group=group)


def evenly_spaced(layout: tuple[int, ...], kept: tuple[int, ...], device: torch.device) -> Tensor:
    """Indices of `kept` blocks along each axis, evenly spaced among those of `layout`."""
    blocks = torch.zeros((), dtype=torch.int64, device=device)
    for count, num in zip(layout, kept, strict=True):
        places = (torch.arange(num, device=device) * 2 + 1) * count // (2 * num)
        blocks = blocks.unsqueeze(-1) * count + places
    return blocks.reshape(-1)


def initial_mixing(config: MHLAConfig, num_heads: int) -> Tensor:
    """The mixing matrix before training, with the heads first if they differ.

    `[blocks, blocks]`, or with `causal_frames` the `[distances, blocks, blocks]` of
    `frame_causal_mhla`.
    """
    inits = MIXING_INITS if config.causal_frames is None else FRAME_MIXING_INITS
    mixing = inits[config.mixing_init](config.layout)
    return mixing.repeat(num_heads, *[1] * mixing.ndim) if config.mixing_per_head else mixing
