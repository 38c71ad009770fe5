"""The definition of MHLA: one loop over blocks, one equation a line, never optimised.

Source: Zhang et al. 2026, arXiv:2601.07832, Eq. (4), Sec. 4 and App. C. Every other implementation
is tested against this one in float64.

The paper mixes the key sums and then multiplies by the query, as here. The authors' code instead
mixes the products q·z across blocks, which normalises a token with the queries of other blocks.
"""

import math

import torch
from torch import Tensor

from mhla_gen.ops.feature_maps import FEATURE_MAPS, rotate
from mhla_gen.ops.partition import block_of_tokens


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
