"""What a decoder of transformers hands to its layers with causal MHLA: padding and the cache."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.llama import LlamaModel

from mhla_gen.errors import UserError
from mhla_gen.models.causal_cache import take_places

# Names of the cache argument of forward, which transformers renamed.
CACHE = (
    "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
)


class CausalModel(nn.Module):
    """Mixin for a decoder: gives MHLA layers the padding mask and their places in the cache."""

    config: Any
    layers: Any

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the decoder's; masks must be padding masks `[batch, cached and new tokens]`.

        Raises:
            ValueError: If a mask is of another kind, positions start again inside a row, or the
                cache cannot hold the states of MHLA layers.
        """
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        cache = kwargs.pop(CACHE, None)
        if use_cache is None:
            # Training needs no cache and is faster without one.
            use_cache = self.config.use_cache and not self.training
        if cache is None and use_cache:
            cache = DynamicCache(config=self.config)
        if cache is not None:
            take_places(self.layers, cache)
        mask = None
        if attention_mask is not None and tokens is not None:
            mask = _padding(attention_mask, tokens, cache)
        if _is_packed(position_ids, mask):
            raise UserError(
                "position_ids start again inside a row, but causal MHLA reads a row as one "
                "sequence; give every sequence a row of its own"
            )
        if tokens is not None and all(hasattr(layer.self_attn, "mhla") for layer in self.layers):
            # A mask with four axes is passed on unchanged. Without one, transformers builds that of
            # all pairs, or waits for the device to see whether there must be one.
            attention_mask = torch.empty(1, 1, 1, 1, device=tokens.device)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            token_mask=mask,
            **{CACHE: cache},
            **kwargs,
        )


def _padding(attention_mask: Tensor, tokens: Tensor, cache: Any) -> Tensor | None:
    """False at padding among the new tokens; None if there is none."""
    batch, new = tokens.shape[:2]
    cached = 0 if cache is None else cache.get_seq_length()
    if tuple(attention_mask.shape) != (batch, cached + new):
        raise UserError(
            "attention_mask must be [batch, cached and new tokens], 0 at padding, here "
            f"{(batch, cached + new)}, for causal MHLA; found {tuple(attention_mask.shape)}"
        )
    mask = attention_mask[:, -new:].bool()
    return None if mask.all() else mask


def _is_packed(position_ids: Tensor | None, mask: Tensor | None) -> bool:
    """Whether positions start again; those of padding mean nothing."""
    # One token has nothing to compare, and a step would wait for the device.
    if position_ids is None or position_ids.shape[-1] == 1:
        return False
    falls = position_ids.diff(dim=-1) < 0
    if mask is not None:
        falls = falls & mask[:, 1:] & mask[:, :-1]
    return bool(falls.any())
