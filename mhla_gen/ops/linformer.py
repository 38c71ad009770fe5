"""Linformer attention, the other static mixer over the token axis."""

import torch
from torch import Tensor

from mhla_gen.errors import UserError
from mhla_gen.ops.dispatch import check_alike
from mhla_gen.ops.softmax import softmax_attention


def linformer_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_projection: Tensor,
    value_projection: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    r"""Softmax attention over keys and values projected to a few mixed tokens.

    $$o = \mathrm{softmax}(Q (E K)^\top / \sqrt{d}) \, F V$$

    Args:
        query: `[batch, seq_len, num_heads, head_dim]`.
        key: `[batch, kv_len, num_heads, head_dim]`.
        value: `[batch, kv_len, num_heads, value_dim]`.
        key_projection: E, `[projected_len, kv_len]` or `[num_heads, projected_len, kv_len]`.
        value_projection: F, like E, also in `projected_len`; E itself by default (key-value
            sharing).
        mask: Bool `[batch, kv_len]`, True for valid keys, at least one per sample. Other keys do
            not contribute to projected tokens; a projected token without valid keys has no weight.
        causal: Must be false.

    Returns:
        `[batch, seq_len, num_heads, value_dim]` in the dtype of `query`.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit, or `causal` is true.

    Source:
        Wang et al. 2020, arXiv:2006.04768, Eq. (7).
    """
    if causal:
        raise UserError(
            "Linformer cannot be causal: each projected key holds tokens of the whole sequence, "
            "later ones too; use mhla(..., causal=True)"
        )
    value_projection = key_projection if value_projection is None else value_projection
    _check_tokens(query, key, value)
    _check_projections(key, key_projection, value_projection)
    entered = None
    if mask is not None:
        if mask.shape != key.shape[:2] or mask.dtype != torch.bool or mask.device != key.device:
            raise UserError(
                f"mask must be bool of shape {tuple(key.shape[:2])} on {key.device}, found "
                f"{mask.dtype} of shape {tuple(mask.shape)} on {mask.device}"
            )
        key, value = (x.masked_fill(~mask[..., None, None], 0) for x in (key, value))
        entered = entered_by((key_projection, value_projection), mask)
    projected = project(key_projection, key, 1), project(value_projection, value, 1)
    return attend_projected(query, *projected, entered)


def _check_tokens(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.ndim != 4 or key.ndim != 4 or value.ndim != 4:
        raise ValueError(
            "query, key and value must be [batch, seq_len, num_heads, dim], found "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    batch, _, heads, head_dim = query.shape
    expected = (batch, key.shape[1], heads)
    if key.shape != (*expected, head_dim) or value.shape[:3] != expected or 0 in key.shape[1:]:
        raise ValueError(
            f"key and value must have the batch and heads of query {tuple(query.shape)} and at "
            f"least one token, key its head_dim, found {tuple(key.shape)} and {tuple(value.shape)}"
        )
    check_alike(query, key, value)


def _check_projections(key: Tensor, key_projection: Tensor, value_projection: Tensor) -> None:
    heads = key.shape[2]
    for name, projection in (("key", key_projection), ("value", value_projection)):
        if projection.ndim not in (2, 3) or projection.shape[-1] != key.shape[1]:
            raise UserError(
                f"{name}_projection must end in (projected_len, {key.shape[1]}), one column per "
                f"key, found shape {tuple(projection.shape)}"
            )
        if projection.ndim == 3 and projection.shape[0] != heads:
            raise UserError(
                f"{name}_projection must have one matrix or {heads}, one per head, found shape "
                f"{tuple(projection.shape)}"
            )
        if not projection.is_floating_point() or projection.device != key.device:
            raise UserError(
                f"{name}_projection must be in a floating dtype on {key.device}, found "
                f"{projection.dtype} on {projection.device}"
            )
    if key_projection.shape[-2] != value_projection.shape[-2]:
        raise UserError(
            f"value_projection must project to the {key_projection.shape[-2]} tokens of "
            f"key_projection, found {value_projection.shape[-2]}"
        )
    if key_projection.shape[-2] == 0:
        raise UserError("projections need at least one row, found none")


def project(projection: Tensor, tokens: Tensor, axis: int) -> Tensor:
    """Multiply E along one axis of tokens.

    Args:
        projection: `[projected_len, length]` or `[num_heads, projected_len, length]`.
        tokens: `[batch, ..., num_heads, dim]` with `length` tokens along `axis`.
        axis: 1 or greater.

    Returns:
        Like `tokens`, with `projected_len` along `axis`.
    """
    names = "bxyzhd" if tokens.ndim == 6 else "bxyhd" if tokens.ndim == 5 else "bxhd"
    along = names[axis]
    heads = "h" if projection.ndim == 3 else ""
    equation = f"{heads}k{along},{names}->{names.replace(along, 'k')}"
    return torch.einsum(equation, projection.to(tokens.dtype), tokens)


def entered_by(projections: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
    """The projected tokens that the valid keys contribute to, in E or in F.

    Args:
        projections: E and F, as in `linformer_attention`.
        mask: Bool `[batch, kv_len]`.

    Returns:
        Bool `[batch, 1 or num_heads, projected_len]`.
    """
    heads_first = (e if e.ndim == 3 else e.unsqueeze(0) for e in projections)
    counts = [torch.einsum("hkn,bn->bhk", (e != 0).float(), mask.float()) for e in heads_first]
    return counts[0] + counts[1] > 0


def attend_projected(
    query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None = None
) -> Tensor:
    """Softmax over projected tokens.

    Args:
        query: `[batch, seq_len, num_heads, head_dim]`.
        key: `[batch, projected_len, num_heads, head_dim]`.
        value: `[batch, projected_len, num_heads, value_dim]`.
        valid: Bool `[batch or 1, num_heads or 1, projected_len]`, False for tokens without weight.

    Returns:
        `[batch, seq_len, num_heads, value_dim]`.
    """
    mask = None if valid is None else valid.unsqueeze(2)
    return softmax_attention(query, key, value, mask=mask)
