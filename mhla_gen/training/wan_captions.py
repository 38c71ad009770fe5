"""Attention of a clip's tokens to its caption, in groups, for a shorter backward pass."""

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor

from mhla_gen.models.families.wan import TEXT_LENGTH_WITH_IMAGE

# Keys of which one program of flash attention's backward pass sums the gradients, over all queries.
_TILE = 128
# Programs that fill a GPU: about three for each multiprocessor.
_PROGRAMS = 384
# Queries over which such a program should sum, to be worth its start.
_FEWEST_QUERIES = 1024


class CaptionAttnProcessor(WanAttnProcessor):
    """`WanAttnProcessor` that cuts queries into groups where gradients are computed.

    The backward pass of flash attention runs in parallel over samples, heads and tiles of keys, not
    over queries. A caption of 512 tokens and 12 heads makes 48 programs, which leave two thirds of
    an H100 idle. Groups of queries are samples of their own with the same keys and values, whose
    gradients are summed over groups. Outputs and gradients are the same but for rounding.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """As `WanAttnProcessor`, with tokens `[batch, seq_len, hidden_size]`."""
        if (
            not torch.is_grad_enabled()
            or encoder_hidden_states is None
            or attention_mask is not None
            or rotary_emb is not None
            or attn.fused_projections
        ):
            return super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb
            )
        length = encoder_hidden_states.shape[1]
        of_image = length - TEXT_LENGTH_WITH_IMAGE if attn.add_k_proj is not None else 0
        image, text = encoder_hidden_states.split((of_image, length - of_image), dim=1)
        query = attn.norm_q(attn.to_q(hidden_states))
        out = self._attend(attn, query, attn.norm_k(attn.to_k(text)), attn.to_v(text))
        if attn.add_k_proj is not None:
            key = attn.norm_added_k(attn.add_k_proj(image))
            out = out + self._attend(attn, query, key, attn.add_v_proj(image))
        return attn.to_out[1](attn.to_out[0](out))

    def _attend(self, attn: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`[batch, seq_len, hidden_size]`, as all arguments."""
        groups = query_groups(query.shape[1], len(query) * attn.heads * -(-key.shape[1] // _TILE))
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
        out = dispatch_attention_fn(
            query.unflatten(1, (groups, -1)).flatten(0, 1),
            key.repeat_interleave(groups, dim=0),
            value.repeat_interleave(groups, dim=0),
            backend=self._attention_backend,
        )
        return out.flatten(2).unflatten(0, (-1, groups)).flatten(1, 2).type_as(query)


def query_groups(length: int, programs: int) -> int:
    """The number of equal groups of queries that fills a GPU.

    A length that is a multiple of 128 stays one in each group, see `training.softmax`.

    Args:
        length: Queries of a sample.
        programs: That the backward pass has for each group.
    """
    parts = length if length % _TILE else length // _TILE
    possible = [n for n in range(1, length // _FEWEST_QUERIES + 1) if parts % n == 0]
    return next((n for n in possible if n * programs >= _PROGRAMS), max(possible, default=1))


def attend_in_groups(model: Any) -> None:
    """Let a Wan's layers that read captions attend in groups where gradients are computed.

    Args:
        model: A `WanTransformer3DModel`, whose layers are replaced only if their processor is its
            own.
    """
    for block in model.blocks:
        if type(block.attn2.processor) is WanAttnProcessor:
            block.attn2.set_processor(CaptionAttnProcessor())
