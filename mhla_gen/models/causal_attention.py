"""Causal MHLA as an attention layer of a language model."""

from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from mhla_gen.config import CausalMHLAConfig
from mhla_gen.models.attention import NEW_START
from mhla_gen.models.combination import GateCombination
from mhla_gen.models.rotary import interleaved
from mhla_gen.ops import (
    CausalState,
    WindowState,
    causal_mhla,
    locality_weights,
    window_attention,
)


class LayerState:
    """A layer's memory of a batch of sequences, empty until the first token is read.

    Attributes:
        window: The last tokens; None without an exact half.
        linear: Summaries of the tokens before the window; None without MHLA.
    """

    def __init__(self):
        self.window: WindowState | None = None
        self.linear: CausalState | None = None

    @property
    def parts(self) -> list[WindowState | CausalState]:
        """The parts that are not None."""
        return [part for part in (self.window, self.linear) if part is not None]

    @property
    def lengths(self) -> Tensor | None:
        """Number of tokens read of each sequence; None before the first."""
        return self.parts[0].lengths if self.parts else None

    def reorder(self, index: Tensor) -> None:
        """Replace sequence i by sequence `index[i]`."""
        for part in self.parts:
            part.reorder(index)

    def to(self, device: torch.device | str) -> Self:
        """Move to a device; returns the state itself."""
        for part in self.parts:
            part.to(device)
        return self


class CausalMHLA(nn.Module):
    """Causal MHLA over projected queries, keys and values, with all its learned parts.

    With a window, softmax attends to the tokens within it and MHLA to those before it; tokens with
    nothing before their window use softmax alone.

    Args:
        num_heads: Number of query heads.
        num_key_heads: Number of key and value heads.
        hidden_size: Channels of the layer's input.
        config: Settings. If `exact_start` is left open, it is that of a new layer.
    """

    def __init__(
        self, num_heads: int, num_key_heads: int, hidden_size: int, config: CausalMHLAConfig
    ):
        super().__init__()
        if config.has_halves and config.exact_start is None:
            config = replace(config, exact_start=NEW_START)
        self.config = config
        self.log_weights, self.combine = None, None
        if config.linear:
            shape = (num_key_heads,) * config.mixing_per_head + (config.num_blocks,)
            # The parameter is the logarithm, so that the weights stay positive under any optimizer.
            weights = torch.empty(shape)
            self.log_weights = nn.Parameter(weights, requires_grad=config.mixing_learnable)
        if config.has_halves:
            assert config.exact_start is not None
            self.combine = GateCombination(num_heads, hidden_size, config.exact_start)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Reset the weights to favour near blocks, and the gate to its initial value."""
        if self.log_weights is not None:
            self.log_weights.copy_(locality_weights(self.config.num_blocks).log())
        if self.combine is not None:
            self.combine.reset_parameters()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        hidden_states: Tensor,
        state: LayerState | None = None,
    ) -> Tensor:
        """Attend within whole sequences, or continue those of a state, which is updated.

        Args:
            query: As in `mhla_gen.ops.causal_mhla`, like the next four arguments.
            key: Keys.
            value: Values.
            rotary: Tables.
            mask: False at padding.
            hidden_states: The layer's input, `[batch, seq_len, hidden_size]`.
            state: Memory of the tokens read before; with None there are none, and none are kept.
        """
        if state is not None and not state.parts:
            self._begin(state)
        if not self.config.window:
            return self._linear(query, key, value, rotary, mask, state)
        if state is None:
            exact, late = window_attention(
                query, key, value, window=self.config.window, mask=mask, rotary=rotary
            )
        else:
            assert state.window is not None
            exact, late = state.window.read(query, key, value, mask=mask, rotary=rotary)
        if self.combine is None or late is None:
            return exact
        linear = self._linear(late.query, late.key, late.value, late.rotary, late.mask, state)
        linear = late.completed(linear, exact)
        logits = self.combine.to_share(hidden_states)
        return self.combine(exact, linear, logits).combined()

    def _linear(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        state: LayerState | None,
    ) -> Tensor:
        if state is None:
            options = {"mask": mask, "rotary": rotary, **self._settings()}
            return causal_mhla(query, key, value, self.weights(), **options)
        assert state.linear is not None
        if query.shape[1] == 1 and mask is None:
            return state.linear.step(query, key, value, rotary=rotary)
        return state.linear.prefill(query, key, value, mask=mask, rotary=rotary)

    def weights(self) -> Tensor:
        """One weight per block distance, positive, float32."""
        assert self.log_weights is not None
        return self.log_weights.float().exp()

    def _begin(self, state: LayerState) -> None:
        if self.config.window:
            state.window = WindowState(self.config.window)
        if self.config.linear:
            options = {"memory_blocks": self.config.memory_blocks, **self._settings()}
            state.linear = CausalState(self.weights(), **options)

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        config = self.config
        return (
            f"block_size={config.block_size}, num_blocks={config.num_blocks}, "
            f"window={config.window}, linear={config.linear}"
        )

    def _settings(self) -> dict[str, Any]:
        names = ("block_size", "feature_map", "normalize", "eps")
        return {name: getattr(self.config, name) for name in names}


class CausalAttention(nn.Module):
    """Mixin for Llama-style attention: a `forward` that attends with the `mhla` child."""

    mhla: Any
    q_proj: Any
    k_proj: Any
    v_proj: Any
    o_proj: Any
    q_norm: Any
    k_norm: Any
    head_dim: int
    layer_idx: int

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        cache: Any = None,
        token_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attend; `token_mask` is bool `[batch, seq_len]`, False at padding, or None."""
        cache = kwargs.get("past_key_values") if cache is None else cache
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if hasattr(self, "q_norm"):
            # Under autocast, norms with float32 weights return float32.
            query, key = (
                norm(x).type_as(value) for norm, x in ((self.q_norm, query), (self.k_norm, key))
            )
        # Llama pairs channel i with i + head_dim / 2. Dot products do not depend on the order.
        query, key = interleaved(query), interleaved(key)
        rotary = _half_tables(position_embeddings)
        tokens = (query, key, value, rotary, token_mask, hidden_states)
        if cache is None:
            out = self.mhla(*tokens)
        else:
            out = cache.layers[self.layer_idx].read(self.mhla, *tokens)
        return self.o_proj(out.flatten(2)), None


def _half_tables(tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Tables with one angle a pair, from those of Llama, whose two halves repeat the angles."""
    cos, sin = (table[..., : table.shape[-1] // 2] for table in tables)
    if cos.ndim == 3 and cos.shape[0] == 1:
        cos, sin = cos[0], sin[0]
    return cos, sin
