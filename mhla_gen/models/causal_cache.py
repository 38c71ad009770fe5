"""States of causal MHLA in a cache of transformers, in place of keys and values."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from mhla_gen.errors import UserError
from mhla_gen.models.causal_attention import CausalMHLA, LayerState


def take_places(layers: Any, cache: Any) -> None:
    """Put MHLA's layers into a cache that is still empty.

    Args:
        layers: Of the decoder.
        cache: A `DynamicCache`.

    Raises:
        ValueError: If it is another cache, or holds tokens of these layers.
    """
    places = getattr(cache, "layers", None)
    if places is None:
        raise UserError(f"expected a DynamicCache, found {type(cache).__name__}; give that or none")
    for index, layer in enumerate(layers):
        if len(places) <= index:
            places.append(DynamicLayer())
        if not hasattr(layer.self_attn, "mhla") or isinstance(places[index], CausalCacheLayer):
            continue
        if not isinstance(places[index], DynamicLayer) or places[index].get_seq_length() > 0:
            raise UserError(
                "causal MHLA needs an empty DynamicCache, found one with "
                f"{places[index].get_seq_length()} tokens in a {type(places[index]).__name__}; "
                "leave out cache and cache_implementation"
            )
        places[index] = CausalCacheLayer()


class CausalCacheLayer(CacheLayerMixin):
    """A `LayerState` in the place of a layer's keys and values in a transformers cache."""

    def __init__(self):
        super().__init__()
        self.state = LayerState()
        self.num_tokens = 0

    def read(self, mhla: CausalMHLA, query: Tensor, *others: Any) -> Tensor:
        """Read the next tokens and return the output of `mhla(query, *others)` for them."""
        self.is_initialized = True
        self.num_tokens += query.shape[1]
        return mhla(query, *others, state=self.state)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the state is created by the first tokens."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Refuse: keys and values are not kept."""
        raise UserError("an MHLA layer keeps no keys and values; use the cache of its own model")

    def get_seq_length(self) -> int:
        """Number of tokens read, padding included."""
        return self.num_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask over the cached tokens."""
        return self.num_tokens + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.num_tokens, self.is_initialized = LayerState(), 0, False

    def offload(self) -> None:
        """Move to the CPU."""
        self.state.to("cpu")

    def prefetch(self) -> None:
        """Do nothing: a cache does not offload layers with one small state."""

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: a summary cannot forget its last tokens."""
        if tokens_to_remove != 0:
            raise UserError("a causal MHLA state cannot go back; generate without an assistant")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace sequence i by sequence `beam_idx[i]`."""
        self.state.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these sequences."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        if self.state.lengths is not None:
            batch = torch.arange(len(self.state.lengths))
            self.state.reorder(batch.repeat_interleave(repeats))
