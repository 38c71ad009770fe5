"""Causal MHLA as an attention layer of a language model, and its place in a cache."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from mhla_gen.config import CausalMHLAConfig
from mhla_gen.errors import UserError
from mhla_gen.ops import CausalState, causal_mhla, locality_weights


class CausalMHLA(nn.Module):
    """Causal MHLA over projected queries, keys and values, with what it learns.

    Args:
        num_key_heads: Heads of keys and values.
        config: Settings.
    """

    def __init__(self, num_key_heads: int, config: CausalMHLAConfig):
        super().__init__()
        self.config = config
        shape = (num_key_heads, config.num_blocks) if config.mixing_per_head else config.num_blocks
        # Of the logarithm, so that any optimizer keeps weights positive.
        self.log_weights = nn.Parameter(torch.empty(shape), requires_grad=config.mixing_learnable)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the weights to favour near blocks."""
        self.log_weights.copy_(locality_weights(self.config.num_blocks).log())

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
    ) -> Tensor:
        """Attend within whole sequences; see `mhla_gen.ops.causal_mhla`."""
        return causal_mhla(
            query, key, value, self.weights(), mask=mask, rotary=rotary, **self._settings()
        )

    def weights(self) -> Tensor:
        """One per distance, positive, float32."""
        return self.log_weights.float().exp()

    def state(self) -> CausalState:
        """Of sequences that have not begun."""
        memory_blocks = self.config.memory_blocks
        return CausalState(self.weights(), memory_blocks=memory_blocks, **self._settings())

    def _settings(self) -> dict[str, Any]:
        names = ("block_size", "feature_map", "normalize", "eps")
        return {name: getattr(self.config, name) for name in names}


class CausalAttention(nn.Module):
    """The forward of a layer whose `mhla` child attends; mixed into a Llama-style attention."""

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
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, rotary = interleaved(query, key, position_embeddings)
        if cache is None:
            out = self.mhla(query, key, value, rotary, token_mask)
        else:
            layer = cache.layers[self.layer_idx]
            out = layer.read(self.mhla, query, key, value, rotary, token_mask)
        return self.o_proj(out.flatten(2)), None


def interleaved(
    query: Tensor, key: Tensor, position_embeddings: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Channels in the order in which 2i and 2i + 1 are a pair, and tables for half of them.

    Llama pairs channel i with i + head_dim / 2. Products of queries and keys stay what they were.
    """
    query, key = (x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2) for x in (query, key))
    cos, sin = (table[..., : table.shape[-1] // 2] for table in position_embeddings)
    if cos.ndim == 3 and cos.shape[0] == 1:
        cos, sin = cos[0], sin[0]
    return query, key, (cos, sin)


class CausalCacheLayer(CacheLayerMixin):
    """A `CausalState` where transformers keeps keys and values of a layer."""

    def __init__(self):
        super().__init__()
        self.state: CausalState | None = None
        self.num_tokens = 0

    def read(
        self,
        mhla: CausalMHLA,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
    ) -> Tensor:
        """Read the next tokens; what `CausalMHLA.forward` gives for them."""
        if self.state is None:
            self.state = mhla.state()
            self.is_initialized = True
        self.num_tokens += query.shape[1]
        if query.shape[1] == 1 and mask is None:
            return self.state.step(query, key, value, rotary=rotary)
        return self.state.prefill(query, key, value, mask=mask, rotary=rotary)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the state begins with the first tokens."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Not there: keys and values are not kept."""
        raise UserError("an MHLA layer keeps no keys and values; use the cache of its own model")

    def get_seq_length(self) -> int:
        """Tokens read, padding included."""
        return self.num_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset that a mask would have."""
        return self.num_tokens + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.num_tokens, self.is_initialized = None, 0, False

    def offload(self) -> None:
        """Move to the CPU."""
        if self.state is not None:
            self.state.to("cpu")

    def prefetch(self) -> None:
        """Nothing: `offload` of a cache leaves layers of one small state alone."""

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to forget the last tokens; a summary cannot."""
        if tokens_to_remove != 0:
            raise UserError("a causal MHLA state cannot go back; generate without an assistant")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let sequence i be what `beam_idx[i]` was."""
        if self.state is not None:
            self.state.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        if self.state is not None and self.state.lengths is not None:
            batch = torch.arange(len(self.state.lengths))
            self.state.reorder(batch.repeat_interleave(repeats))
