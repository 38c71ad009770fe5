"""Linformer attention, the other static mixer over the token axis, kept as a baseline."""

import torch
import torch.nn.functional as F
from torch import Tensor


def linformer_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_projection: Tensor,
    value_projection: Tensor | None = None,
) -> Tensor:
    r"""Softmax attention over keys and values projected to a few mixed tokens.

    $$o = \mathrm{softmax}(Q (E K)^\top / \sqrt{d}) \, F V$$

    Args:
        query: `[batch, seq_len, num_heads, head_dim]`.
        key: `[batch, kv_len, num_heads, head_dim]`.
        value: `[batch, kv_len, num_heads, value_dim]`.
        key_projection: E, `[projected_len, kv_len]` or `[num_heads, projected_len, kv_len]`.
        value_projection: F, shaped like E; E itself by default (key-value sharing).

    Returns:
        `[batch, seq_len, num_heads, value_dim]` in the dtype of `query`.

    Raises:
        ValueError: If a projection does not fit the number of keys.

    Source:
        Wang et al. 2020, arXiv:2006.04768, Eq. (7).
    """
    value_projection = key_projection if value_projection is None else value_projection
    for name, projection in (("key", key_projection), ("value", value_projection)):
        if projection.ndim not in (2, 3) or projection.shape[-1] != key.shape[1]:
            raise ValueError(
                f"{name}_projection must end in (projected_len, {key.shape[1]}), one column per "
                f"key, found shape {tuple(projection.shape)}"
            )
    projected_key = _project(key_projection, key)
    projected_value = _project(value_projection, value)
    out = F.scaled_dot_product_attention(query.transpose(1, 2), projected_key, projected_value)
    return out.transpose(1, 2)


def _project(projection: Tensor, tokens: Tensor) -> Tensor:
    """`[batch, kv_len, heads, dim]` → `[batch, heads, projected_len, dim]`."""
    return torch.matmul(projection.to(tokens.dtype), tokens.transpose(1, 2))
