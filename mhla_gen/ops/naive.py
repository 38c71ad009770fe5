"""The definitions of MHLA, of its frame-causal form and of tile attention: plain loops.

Source of MHLA: Zhang et al. 2026, arXiv:2601.07832, Eq. (4), Sec. 4 and App. C. Every other
implementation is tested against this one in float64.

The paper mixes the key sums and then multiplies them by the query, as here. The authors' code mixes
the products q·z across blocks instead, which normalises a token by the queries of other blocks.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mhla_gen.ops.feature_maps import FEATURE_MAPS, rotate
from mhla_gen.ops.partition import block_of_tokens
from mhla_gen.ops.tiles import Tiling, window_tiles


def _without_autocast(definition: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast would compute the products of float32 tensors in bfloat16."""

    @functools.wraps(definition)
    def defined(query: Tensor, *tensors: Tensor, **options: Any) -> Any:
        with torch.autocast(query.device.type, enabled=False):
            return definition(query, *tensors, **options)

    return defined


@_without_autocast
def naive_mhla(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixing: Tensor,
    *,
    grid: tuple[int, ...],
    layout: tuple[int, ...],
    feature_map: str,
    rotary: tuple[Tensor, Tensor] | None,
    normalize: bool,
    causal: bool,
    eps: float,
) -> Tensor:
    """MHLA in the dtype of the inputs (float32 at least); see `mhla_gen.ops.mhla`."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    phi = FEATURE_MAPS[feature_map]
    phi_q, phi_k, v = phi(query.to(dtype)), phi(key.to(dtype)), value.to(dtype)
    rotated_q, rotated_k = rotate(phi_q, rotary), rotate(phi_k, rotary)

    num_blocks = math.prod(layout)
    # [heads, blocks, blocks]
    m = mixing.to(dtype).expand(query.shape[2], num_blocks, num_blocks)
    block = block_of_tokens(grid, layout, device=query.device)
    tokens = [(block == b).nonzero().squeeze(1) for b in range(num_blocks)]

    # S_b = Σ_{n∈b} R(φ(k_n)) v_nᵀ   and   z_b = Σ_{n∈b} φ(k_n)
    summaries = [torch.einsum("bnhk,bnhv->bhkv", rotated_k[:, t], v[:, t]) for t in tokens]
    key_sums = [phi_k[:, t].sum(dim=1) for t in tokens]  # [batch, heads, head_dim]

    out = torch.zeros_like(v)
    for i, t in enumerate(tokens):
        read = range(i) if causal else range(num_blocks)
        mixed_summary = torch.zeros_like(summaries[i])
        mixed_key_sum = torch.zeros_like(key_sums[i])
        for b in read:
            mixed_summary = mixed_summary + m[:, i, b, None, None] * summaries[b]
            mixed_key_sum = mixed_key_sum + m[:, i, b, None] * key_sums[b]
        # numerator R(φ(q_n))ᵀ S̃_i and denominator φ(q_n)ᵀ z̃_i
        numerator = torch.einsum("bnhk,bhkv->bnhv", rotated_q[:, t], mixed_summary)
        denominator = torch.einsum("bnhk,bhk->bnh", phi_q[:, t], mixed_key_sum)
        if causal:
            # Own block: m_ii · tril(φ(Q_i) φ(K_i)ᵀ) V_i
            own = m[:, i, i, None, None]
            scores = torch.einsum("bnhk,bshk->bhns", rotated_q[:, t], rotated_k[:, t]).tril() * own
            plain_scores = torch.einsum("bnhk,bshk->bhns", phi_q[:, t], phi_k[:, t]).tril() * own
            numerator = numerator + torch.einsum("bhns,bshv->bnhv", scores, v[:, t])
            denominator = denominator + plain_scores.sum(dim=-1).transpose(1, 2)
        if normalize:
            numerator = numerator / (denominator + eps).unsqueeze(-1)
        out = out.index_copy(1, t, numerator)
    return out.to(query.dtype)


@_without_autocast
def naive_frame_causal_mhla(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    *,
    grid: tuple[int, ...],
    chunk_frames: int,
    layout: tuple[int, ...],
    feature_map: str,
    rotary: tuple[Tensor, Tensor] | None,
    normalize: bool,
    eps: float,
) -> Tensor:
    """Frame-causal MHLA, one pair of chunks at a time; see `mhla_gen.ops.frame_causal_mhla`."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    phi = FEATURE_MAPS[feature_map]
    phi_q, phi_k, v = phi(query.to(dtype)), phi(key.to(dtype)), value.to(dtype)
    q, k = rotate(phi_q, rotary), rotate(phi_k, rotary)
    # [heads, distances, blocks, blocks]
    w = weights.to(dtype).expand(query.shape[2], *weights.shape[-3:])
    frame = torch.arange(query.shape[1], device=query.device) // math.prod(grid[1:])
    chunk = frame // chunk_frames
    block = block_of_tokens(grid, (1, *layout), device=query.device)
    zero = v.new_zeros(())
    out: list[Tensor] = []
    for g in range(int(chunk[-1]) + 1):
        rows, numerator, denominator = chunk == g, zero, zero
        for c in range(g + 1):
            columns = chunk == c
            # w_{min(g - c, D - 1), i, j} of every pair of tokens
            pairs = w[:, min(g - c, w.shape[1] - 1)][:, block[rows]][:, :, block[columns]]
            scores = torch.einsum("bnhk,bshk->bhns", q[:, rows], k[:, columns]) * pairs
            plain = torch.einsum("bnhk,bshk->bhns", phi_q[:, rows], phi_k[:, columns]) * pairs
            numerator = numerator + torch.einsum("bhns,bshv->bnhv", scores, v[:, columns])
            denominator = denominator + plain.sum(dim=-1).transpose(1, 2).unsqueeze(-1)
        out.append(numerator / (denominator + eps) if normalize else numerator)
    return torch.cat(out, dim=1).to(query.dtype)


@_without_autocast
def naive_tile_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    placed: Tiling,
    rotary: tuple[Tensor, Tensor] | None,
    extra: tuple[Tensor, Tensor, Tensor] | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Tile attention in the dtype of the inputs (float32 at least); see `tile_attention`."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    q, k, v = rotate(query.to(dtype), rotary), rotate(key.to(dtype), rotary), value.to(dtype)
    tile = block_of_tokens(placed.grid, placed.tiles, device=q.device)
    group = block_of_tokens(placed.tiles, placed.groups, device=q.device)[tile]
    near = window_tiles(placed, q.device)
    out = torch.zeros_like(v)
    lse = torch.zeros(*q.shape[:2], q.shape[2], dtype=dtype, device=q.device)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            mean_keys = [k[b, tile == t, h].mean(dim=0).detach() for t in range(placed.num_tiles)]
            for g in range(placed.num_groups):
                rows = (group == g).nonzero().squeeze(1)
                mean_query = q[b, rows, h].mean(dim=0).detach()
                # The window, and of the others those with the largest products.
                read = [int(t) for t in near[g]]
                others = [t for t in range(placed.num_tiles) if t not in read]
                others.sort(key=lambda t, m=mean_keys, mean=mean_query: (-(m[t] @ mean).item(), t))
                read = torch.tensor(read + others[: placed.top], device=q.device)
                columns = torch.isin(tile, read).nonzero().squeeze(1)
                keys, values = k[b, columns, h], v[b, columns, h]
                if extra is not None:
                    valid = extra[2][b]
                    keys = torch.cat((keys, extra[0][b, valid, h].to(dtype)))
                    values = torch.cat((values, extra[1][b, valid, h].to(dtype)))
                # softmax(q kᵀ · scale) v and log Σ exp(q kᵀ · scale)
                scores = q[b, rows, h] @ keys.T * scale
                out = out.index_put(
                    (q.new_tensor(b, dtype=torch.int64), rows, q.new_tensor(h, dtype=torch.int64)),
                    # NaN without any key.
                    scores.softmax(dim=-1) @ values if len(keys) else v.new_tensor(math.nan),
                )
                lse = lse.index_put(
                    (q.new_tensor(b, dtype=torch.int64), rows, q.new_tensor(h, dtype=torch.int64)),
                    scores.logsumexp(dim=-1),
                )
    return out.to(query.dtype), lse.transpose(1, 2)
