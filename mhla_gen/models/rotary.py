"""Rotary embeddings as the models have them: tables of pairs, halves of heads, one per head."""

import torch
from torch import Tensor

from mhla_gen.ops import mhla
from mhla_gen.ops.feature_maps import FEATURE_MAPS, rotate


def mhla_rotated_by_head(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixing: Tensor,
    *,
    grid: tuple[int, ...],
    layout: tuple[int, ...],
    feature_map: str,
    rotary: tuple[Tensor, Tensor],
    normalize: bool,
    eps: float,
    implementation: str,
) -> Tensor:
    r"""`mhla` with one table of angles per head: exact, by two calls of the operator.

    The operator rotates all heads alike. But the numerator and the denominator of Eq. (4) are each
    an MHLA without denominator: of $R\varphi(q), R\varphi(k), v$ and of
    $\varphi(q), \varphi(k), 1$. So the rotation can be applied outside the operator.

    Args:
        query: As in `mhla`.
        key: Like `query`.
        value: Like `query`.
        mixing: As in `mhla`.
        grid: As in `mhla`.
        layout: As in `mhla`.
        feature_map: As in `mhla`.
        rotary: `(cos, sin)`, each `[batch or 1, seq_len, num_heads, head_dim / 2]`.
        normalize: As in `mhla`.
        eps: As in `mhla`.
        implementation: As in `mhla`.

    Returns:
        Like `value`.

    Source:
        Zhang et al. 2026, arXiv:2601.07832, Eq. (4).
    """
    # Sums before the division exceed the range of float16 and need the precision of float32.
    dtype = torch.promote_types(query.dtype, torch.float32)
    phi = FEATURE_MAPS[feature_map]
    phi_q, phi_k, v = phi(query.to(dtype)), phi(key.to(dtype)), value.to(dtype)

    def sums(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return mhla(
            query,
            key,
            value,
            mixing,
            grid=grid,
            layout=layout,
            feature_map="identity",
            normalize=False,
            implementation=implementation,
        )

    out = sums(rotate_by_head(phi_q, rotary), rotate_by_head(phi_k, rotary), v)
    if normalize:
        out = out / (sums(phi_q, phi_k, torch.ones_like(v[..., :1])) + eps)
    return out.to(value.dtype)


def rotate_by_head(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """`rotate` with tables `[batch or 1, seq_len, num_heads, head_dim / 2]`."""
    # `rotate` takes one table for all heads, so the heads become a separate axis.
    return rotate(x.unsqueeze(-2), rotary).squeeze(-2)


def rotated(x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    """Rotate queries or keys as diffusers does: in the precision of the tables.

    Args:
        x: `[batch, seq_len, num_heads, head_dim]`.
        rotary: `(cos, sin)`, each `[seq_len, head_dim / 2]`, or with the batch first, or `[batch or
            1, seq_len, num_heads, head_dim / 2]`; None to return `x` unchanged.
    """
    if rotary is None:
        return x
    wide = x.to(torch.promote_types(x.dtype, rotary[0].dtype))
    turn = rotate_by_head if rotary[0].ndim == 4 else rotate
    return turn(wide, rotary).to(x.dtype)


def pairs(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Tables `[seq_len, head_dim / 2]` from tables that repeat every angle for both channels."""
    # Contiguous, or every operator of a layer would copy them.
    return cos[..., 0::2].contiguous(), sin[..., 0::2].contiguous()


def interleaved(x: Tensor) -> Tensor:
    """Interleave the halves of a head, so that the channels of a rotary pair are adjacent."""
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
