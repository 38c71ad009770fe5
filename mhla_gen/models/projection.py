"""What most attention layers of diffusers do around attention: project, normalise, project back."""

from typing import Any

from torch import Tensor

from mhla_gen.models.transformer import MHLATransformerMixin


def refuse_mask_and_other_keys(attention_mask: Any, encoder_hidden_states: Any) -> None:
    """Raise if a processor was handed what MHLA cannot use.

    Raises:
        ValueError: If either argument is not None.
    """
    if attention_mask is not None or encoder_hidden_states is not None:
        raise ValueError("MHLA layers take neither an attention mask nor other keys and values")


def mhla_attention(
    attn: Any,
    hidden_states: Tensor,
    grid: tuple[int, ...],
    rotary: tuple[Tensor, Tensor] | None = None,
    *,
    norm_across_heads: bool = False,
    group: Any = None,
) -> Tensor:
    """Project, attend with the layer's `mhla` child, project back.

    Args:
        attn: A layer with `to_q`, `to_k`, `to_v`, `to_out` and maybe `norm_q` and `norm_k`.
        hidden_states: `[batch, seq_len, hidden_size]`.
        grid: Tokens along each axis.
        rotary: See `MHLA.forward`.
        norm_across_heads: Queries and keys are normalised over all heads at once, not per head.
        group: Processes that share the sequence, see `MHLA.forward`.

    Returns:
        `[batch, seq_len, hidden_size]`.
    """
    if getattr(attn, "fused_projections", False):
        query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
    else:
        query, key, value = (
            project(hidden_states) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
    if norm_across_heads:
        query, key = _normalized(attn, query, key)
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
    else:
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
        query, key = _normalized(attn, query, key)
    # Autocast may leave float32 behind a norm.
    query, key = query.type_as(value), key.type_as(value)
    out = attn.mhla(query, key, value, hidden_states, grid, rotary, group)
    return attn.to_out[1](attn.to_out[0](out))


def _normalized(attn: Any, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    query = query if attn.norm_q is None else attn.norm_q(query)
    return query, key if attn.norm_k is None else attn.norm_k(key)


class PatchGridCarrier:
    """Mixed into a rotary embedding of latents, makes it tell its grid to the attention layers.

    The grid travels as the shape `(frames, height, width, 0)` of an empty third tensor: unlike
    module state that survives `torch.compile`, checkpointing with two grids alive, copies of the
    model and offloading hooks.
    """

    patch_size: tuple[int, int, int]

    def forward(self, hidden_states: Tensor) -> Any:
        """`(cos, sin, grid carrier)` for latents `[batch, channels, frames, height, width]`."""
        cos, sin = super().forward(hidden_states)  # type: ignore[misc]
        sizes = zip(hidden_states.shape[2:], self.patch_size, strict=True)
        return cos, sin, cos.new_empty((*(length // patch for length, patch in sizes), 0))


class FusesSelfAttention(MHLATransformerMixin):
    """Base of a class whose own `fuse_qkv_projections` would replace the MHLA processors."""

    def fuse_qkv_projections(self) -> None:
        """Compute queries, keys and values of every self-attention layer in one product."""
        for _, attention in self.family.attentions(self):
            attention.fuse_projections(fuse=True)

    def unfuse_qkv_projections(self) -> None:
        """Undo `fuse_qkv_projections`."""
        for _, attention in self.family.attentions(self):
            attention.fused_projections = False
