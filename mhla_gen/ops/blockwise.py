"""MHLA in batched PyTorch, for any device: no loop over blocks, sums in float32.

Two exact forms of one function; `attention_form_is_cheaper` chooses the cheaper one:

- *linear form*: summaries → mix → apply, with tokens gathered into blocks padded to the largest.
- *attention form*: `((φ(Q) φ(K)ᵀ) ∘ m[block(q), block(k)]) V`, a tile of queries at a time.

Source: Zhang et al. 2026, arXiv:2601.07832, Eq. (4) and App. C (causal).
"""

import math

import torch
from torch import Tensor

from mhla_gen.ops.feature_maps import FEATURE_MAPS, rotate
from mhla_gen.ops.partition import BlockSlots, block_of_tokens, block_slots
from mhla_gen.ops.transforms import recomputed

# Cost in multiply-adds of writing, mixing and reading one element of a summary, besides its own
# arithmetic. Fitted to forward + backward of both forms at 12 shapes (2-core Xeon, 2026-11-22).
_SUMMARY_TRAFFIC = 64
# Chunk of the scan within a causal block: about head_dim, where both parts of it cost the same.
_CHUNK = 64


def attention_form_is_cheaper(seq_len: int, num_blocks: int, head_dim: int, value_dim: int) -> bool:
    """Whether scores cost less than summaries, counting multiply-adds of one head.

    Linear form: `2 N d v` for summaries and output, `M² d v` for mixing, and `64 M d v` for moving
    summaries through memory. Attention form: `N² (d + v)`.
    """
    linear = (2 * seq_len + num_blocks**2 + _SUMMARY_TRAFFIC * num_blocks) * head_dim * value_dim
    return seq_len**2 * (head_dim + value_dim) < linear


def blockwise_mhla(
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
    attention_form: bool | None = None,
) -> Tensor:
    """MHLA summed in float32 (float64 for float64 inputs); see `mhla_gen.ops.mhla`.

    `attention_form` forces one of the two forms; by default the cheaper one runs. Causal attention
    has the linear form only.
    """
    seq_len, head_dim, value_dim = query.shape[1], query.shape[3], value.shape[3]
    num_blocks = math.prod(layout)
    if attention_form is None:
        attention_form = attention_form_is_cheaper(seq_len, num_blocks, head_dim, value_dim)
    dtype = torch.promote_types(query.dtype, torch.float32)
    # Autocast would compute the float32 sums in bfloat16.
    with torch.autocast(query.device.type, enabled=False):
        phi = FEATURE_MAPS[feature_map]
        phi_q, phi_k, v = phi(query.to(dtype)), phi(key.to(dtype)), value.to(dtype)
        q, k = rotate(phi_q, rotary), rotate(phi_k, rotary)
        m = mixing.to(dtype)
        if causal:
            out = _causal(q, k, v, phi_q, phi_k, m, grid, layout, normalize, eps)
        else:
            slots = block_slots(grid, layout, query.device)
            if attention_form:
                out = _attention_form(q, k, v, m, block_of_tokens(grid, layout, query.device))
            else:
                out = _linear_form(q, k, v, m, slots)
            if normalize:
                out = out / (_denominators(phi_q, phi_k, m, slots) + eps)
        return out.to(query.dtype)


def _linear_form(q: Tensor, k: Tensor, v: Tensor, m: Tensor, slots: BlockSlots) -> Tensor:
    blocked_k, blocked_v = to_blocks(k, slots, empty=True), to_blocks(v, slots)
    summaries = torch.einsum("bmshk,bmshv->bmhkv", blocked_k, blocked_v)
    mixed = mix(m, summaries)
    return to_tokens(torch.einsum("bmshk,bmhkv->bmshv", to_blocks(q, slots), mixed), slots)


def _denominators(phi_q: Tensor, phi_k: Tensor, m: Tensor, slots: BlockSlots) -> Tensor:
    """φ(q_n)ᵀ Σ_b m_ib z_b, `[batch, seq_len, num_heads, 1]`."""
    key_sums = to_blocks(phi_k, slots, empty=True).sum(dim=2)  # [batch, blocks, heads, head_dim]
    mixed = mix(m, key_sums.unsqueeze(-1))
    return to_tokens(torch.einsum("bmshk,bmhkv->bmshv", to_blocks(phi_q, slots), mixed), slots)


def _attention_form(q: Tensor, k: Tensor, v: Tensor, m: Tensor, block: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [batch, heads, seq_len, dim]
    seq_len, head_dim, value_dim = q.shape[2], q.shape[3], v.shape[3]
    columns = m.index_select(-1, block)  # [..., blocks, seq_len]

    def attend(q: Tensor, k: Tensor, v: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2) * columns.index_select(-2, rows)) @ v

    # A tile of scores takes as much memory as the summaries of the linear form.
    tile = max(1, m.shape[-1] * head_dim * value_dim // seq_len)
    if tile >= seq_len:
        return attend(q, k, v, columns, block).transpose(1, 2)
    tiles = [
        recomputed(attend, q_tile, k, v, columns, rows)
        for q_tile, rows in zip(torch.split(q, tile, dim=2), torch.split(block, tile), strict=True)
    ]
    return torch.cat(tiles, dim=2).transpose(1, 2)


def _causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    m: Tensor,
    grid: tuple[int, ...],
    layout: tuple[int, ...],
    normalize: bool,
    eps: float,
) -> Tensor:
    slots = block_slots(grid, layout, q.device)
    out = _causal_numerators(q, k, v, m, slots)
    if not normalize:
        return out
    ones = torch.ones_like(v[..., :1])
    return out / (_causal_numerators(phi_q, phi_k, ones, m, slots) + eps)


def _causal_numerators(q: Tensor, k: Tensor, v: Tensor, m: Tensor, slots: BlockSlots) -> Tensor:
    """Earlier blocks by mixed summaries, a token's own block by a scan over its chunks.

    Query heads may be a multiple of key heads, each of which then serves a group of them.
    """
    num_slots = slots.tokens.shape[1]
    q = torch.unflatten(q, 2, (k.shape[2], -1))  # [batch, seq_len, key heads, group, dim]
    q, k, v = (
        _to_chunks(x)
        for x in (to_blocks(q, slots), to_blocks(k, slots, empty=True), to_blocks(v, slots))
    )  # [batch, blocks, chunks, chunk, key heads, dim], of q with the group before dim
    chunk_sums = torch.einsum("bmcshk,bmcshv->bmchkv", k, v)
    earlier_blocks = mix(m.tril(-1), chunk_sums.sum(dim=2))  # [batch, blocks, heads, dim, dim]
    earlier_chunks = chunk_sums.cumsum(dim=2) - chunk_sums
    own = m.diagonal(dim1=-2, dim2=-1)  # [blocks] or [heads, blocks]
    own = own[:, None, None] if m.ndim == 2 else own.mT.unsqueeze(-2)  # [blocks, 1, heads or 1]
    state = earlier_blocks.unsqueeze(2) + own[..., None, None] * earlier_chunks
    scores = torch.einsum("bmcshgk,bmcthk->bmchgst", q, k).tril() * own[..., None, None, None]
    out = torch.einsum("bmcshgk,bmchkv->bmcshgv", q, state)
    out = out + torch.einsum("bmchgst,bmcthv->bmcshgv", scores, v)
    return to_tokens(out.flatten(4, 5).flatten(2, 3)[:, :, :num_slots], slots)


def mix(m: Tensor, summaries: Tensor) -> Tensor:
    """Σ_b m_ib S_b for summaries `[batch, num_blocks, num_heads, ...]`."""
    axes = {2: "ij", 3: "hij"}[m.ndim]
    return torch.einsum(f"{axes},bjhkv->bihkv", m, summaries)


def to_blocks(x: Tensor, slots: BlockSlots, empty: bool = False) -> Tensor:
    """`[batch, seq_len, ...]` → `[batch, num_blocks, slots, ...]`; padding reads 0 if `empty`."""
    blocked = torch.unflatten(
        x.index_select(1, slots.tokens.reshape(-1)), 1, tuple(slots.tokens.shape)
    )
    if empty and slots.filled is not None:
        return blocked * slots.filled[..., None, None]
    return blocked


def to_tokens(blocked: Tensor, slots: BlockSlots) -> Tensor:
    """Inverse of `to_blocks`; padding is dropped."""
    return blocked.flatten(1, 2).index_select(1, slots.slots)


def _to_chunks(blocked: Tensor) -> Tensor:
    """Cut the slots of every block into chunks, zero-padded to a whole number of them."""
    num_slots = blocked.shape[2]
    chunk = min(_CHUNK, num_slots)
    return torch.unflatten(lengthened(blocked, 2, -num_slots % chunk), 2, (-1, chunk))


def lengthened(x: Tensor, axis: int, more: int) -> Tensor:
    """`x` with `more` entries of 0 at the end of an axis.

    `F.pad` would do, but its gradients may have other strides than torch's compiler assumes where
    sizes are dynamic: the backward pass then ends in "view size is not compatible".
    """
    if more == 0:
        return x
    shape = list(x.shape)
    shape[axis] = more
    return torch.cat((x, x.new_zeros(shape)), dim=axis)
