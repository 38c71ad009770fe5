"""What every injected attention has in common: a convolution of the values, and a gate."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mhla_gen.config import AttentionConfig
from mhla_gen.errors import UserError
from mhla_gen.models.gates import gate_logits, input_layer, make_gate, reset_gate
from mhla_gen.models.projections import products
from mhla_gen.ops.depthwise import Blend, depthwise_conv, gated_conv, times_silu
from mhla_gen.ops.halo import begin_halo, sharded_depthwise_conv


class DepthwiseConv(nn.Module):
    """Depthwise convolution over the token grid, initialized to zero.

    Args:
        channels: Channels per token.
        kernel_size: Width along every axis, odd.
        rank: Number of axes of the grid.

    Source:
        The positional convolution (CPE) of arXiv:2601.07832, Sec. 5.2, on values.
    """

    def __init__(self, channels: int, kernel_size: int, rank: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, 1, *[kernel_size] * rank))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(
        self,
        tokens: Tensor,
        grid: tuple[int, ...],
        group: Any = None,
        halo: Callable[[], Tensor] | None = None,
        after: tuple[Tensor | Blend, Tensor | None, int] | None = None,
    ) -> Tensor:
        """Convolve tokens `[batch, seq_len, channels]` in raster order of `grid`.

        `group` is the group of processes that share the tokens, or None; `halo` is what
        `begin_halo` returned, if it was called; `after`, only without a group, is what `gated_conv`
        adds, and the logits and heads of its gate.
        """
        if after is not None:
            added, logits, heads = after
            parts = (added, tokens, self.weight, self.bias, logits)
            return gated_conv(*parts, grid=grid, num_heads=heads)
        if group is not None:
            return sharded_depthwise_conv(
                tokens, self.weight, self.bias, grid=grid, group=group, halo=halo
            )
        return depthwise_conv(tokens, self.weight, self.bias, grid=grid)

    def begin_halo(self, tokens: Tensor, grid: tuple[int, ...], group: Any) -> Callable[[], Tensor]:
        """Start to fetch the tokens of other processes that `forward` needs."""
        return begin_halo(tokens, tuple(self.weight.shape[2:]), grid=grid, group=group)

    def extra_repr(self) -> str:
        """Channels and filter size, for `print(model)`."""
        return f"{len(self.bias)}, kernel_size={tuple(self.weight.shape[2:])}"


class Inputs(NamedTuple):
    """What attention computes with; see the arguments of `AddedAttention.forward`."""

    query: Tensor
    key: Tensor
    value: Tensor
    of_input: Sequence[Tensor]
    grid: tuple[int, ...]
    rotary: tuple[Tensor, Tensor] | None
    group: Any
    extra: tuple[Tensor, ...] | None


class AddedAttention(nn.Module):
    """The child module that replaces a layer's attention over queries, keys and values.

    Args:
        num_heads: Number of heads.
        head_dim: Channels per head.
        config: Settings.
    """

    mixing: nn.Parameter | None
    """MHLA's mixing matrix, where it has one."""
    conv_class: ClassVar[type[DepthwiseConv]] = DepthwiseConv
    conv: DepthwiseConv | None
    gate: nn.Module | None

    def __init__(self, num_heads: int, head_dim: int, config: AttentionConfig):
        super().__init__()
        self.config: Any = config
        self.num_heads = num_heads
        self.head_dim = head_dim

    def add_parts(self, hidden_size: int, rank: int) -> None:
        """Create the convolution and the gate, if configured, for grids of `rank` axes."""
        config, inner_dim = self.config, self.num_heads * self.head_dim
        size = config.conv_kernel_size
        self.conv = self.conv_class(inner_dim, size, rank) if config.conv else None
        self.gate = make_gate(config.gate, hidden_size, self.num_heads, self.head_dim)

    @torch.no_grad()
    def reset_parts(self) -> None:
        """Reset the convolution and the gate to the identity."""
        if self.conv is not None:
            for parameter in self.conv.parameters():
                parameter.zero_()
        if self.gate is not None:
            reset_gate(self.gate)

    def input_layers(self) -> tuple[Any, ...]:
        """Linear layers that read the attention layer's input and may join its projections."""
        return () if self.gate is None else (input_layer(self.gate),)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        hidden_states: Tensor,
        grid: tuple[int, ...],
        rotary: tuple[Tensor, Tensor] | None = None,
        group: Any = None,
        extra: tuple[Tensor, ...] | None = None,
        of_input: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Attend over a token grid, and to keys off it.

        Args:
            query: `[batch, seq_len, num_heads, head_dim]`, before the feature map, raster order.
            key: Like `query`.
            value: Like `query`.
            hidden_states: Input of the layer, `[batch, seq_len, hidden_size]`.
            grid: Number of tokens along each axis.
            rotary: See `mhla_gen.ops.mhla`, or `mhla_rotated_by_head` for tables of 4 axes.
            group: Processes that share the sequence, each with its own part of all tensors above
                (`mhla_gen.ops.sharded`), or None if this process has the whole sequence.
            extra: Keys and values off the grid that every token reads exactly, and optionally a
                mask of the valid ones; see `mhla_gen.ops.tile_attention`.
            of_input: Outputs of `input_layers` for `hidden_states`, if already computed.

        Returns:
            `[batch, seq_len, num_heads * head_dim]`.

        Raises:
            ValueError: If processes share the sequence of a layer that needs all of it.
        """
        if group is not None and self.config.unshared:
            raise UserError(
                f"layers with {self.config.unshared} cannot share a sequence among processes"
            )
        if of_input is None:
            of_input = products(self.input_layers(), hidden_states)
        logits = None if self.gate is None else gate_logits(self.gate, of_input[0])
        given = Inputs(query, key, value, of_input, grid, rotary, group, extra)
        if self.conv is not None and group is None:
            out = self._begin(given)()
            out = out if isinstance(out, Blend) else out.flatten(2)
            return self.conv(value.flatten(2), grid, after=(out, logits, self.num_heads))
        halo = None
        if self.conv is not None:
            halo = self.conv.begin_halo(value.flatten(2), grid, group)
        attend = self._begin(given)
        # This overlaps with the communication between the processes that share the sequence.
        convolved = None if self.conv is None else self.conv(value.flatten(2), grid, group, halo)
        out = attend()
        out = (out.combined() if isinstance(out, Blend) else out).flatten(2)
        if convolved is not None:
            out = out + convolved
        return out if logits is None else times_silu(out, logits, self.num_heads)

    def _begin(self, given: Inputs) -> Callable[[], Tensor | Blend]:
        """Start the attention that precedes convolution and gate; calling the result ends it.

        The output is `[batch, seq_len, num_heads, head_dim]`.
        """
        raise NotImplementedError

    @property
    def kind(self) -> str:
        """The kind of attention that the layer computes, in a word or two."""
        raise NotImplementedError
