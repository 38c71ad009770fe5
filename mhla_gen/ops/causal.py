"""Causal MHLA over blocks of a fixed number of tokens, as language models need.

Source: Zhang et al. 2026, arXiv:2601.07832, App. C. The paper's matrix has one weight per pair of
blocks and is limited to the trained length; here there is one weight per distance between blocks.
"""

import torch
from torch import Tensor

from mhla_gen.errors import UserError
from mhla_gen.ops.blockwise import lengthened
from mhla_gen.ops.causal_checks import check_causal
from mhla_gen.ops.dispatch import IMPLEMENTATIONS, resolve_implementation
from mhla_gen.ops.feature_maps import FEATURE_MAPS, rotate
from mhla_gen.ops.fused_limits import trains


def locality_weights(num_blocks: int) -> Tensor:
    """Weights by distance that favour near blocks: `1 - distance / num_blocks`, float32.

    Args:
        num_blocks: Number of distances that get a weight, 0 to `num_blocks - 1`.

    Raises:
        ValueError: If there are none.

    Source:
        After the locality of Zhang et al. 2026, arXiv:2601.07832, Sec. 4.2, but never 0, since the
        last weight also applies to all blocks farther away.
    """
    if num_blocks < 1:
        raise UserError(f"num_blocks must be at least 1, found {num_blocks}")
    return 1 - torch.arange(num_blocks, dtype=torch.float32) / num_blocks


def distance_mixing(weights: Tensor, num_blocks: int) -> Tensor:
    r"""Mixing matrix for any number of blocks: $m_{ib} = w_{\min(i - b,\, D - 1)}$ for b ≤ i.

    The last weight applies to all blocks at its distance or farther. So the matrix for fewer blocks
    is a part of the matrix for more, and all blocks that far away can be stored as one sum without
    changing the result.

    Args:
        weights: $w$, `[..., D]`.
        num_blocks: Rows and columns of the result.

    Returns:
        `[..., num_blocks, num_blocks]` in the dtype of `weights`, 0 above the diagonal.

    Raises:
        ValueError: If there is no weight or no block.
    """
    if num_blocks < 1 or weights.ndim == 0 or weights.shape[-1] == 0:
        raise UserError(
            f"needs at least one block and one weight, found {num_blocks} blocks and weights "
            f"{tuple(weights.shape)}"
        )
    near = weights[..., :num_blocks]
    far = weights[..., -1:].expand(*weights.shape[:-1], num_blocks - near.shape[-1])
    later = weights.new_zeros(*weights.shape[:-1], num_blocks)
    line = torch.cat((far, near.flip(-1), later), dim=-1)
    # Rows are slices of one vector, each a place before the next one. Indices, or `unfold` in
    # compiled code, would sum gradients in an undefined order.
    rows = line.unsqueeze(-2).expand(*line.shape[:-1], num_blocks, 2 * num_blocks).flatten(-2)
    width = 2 * num_blocks - 1
    shifted = torch.unflatten(rows[..., : num_blocks * width], -1, (num_blocks, width))
    return shifted[..., num_blocks - 1 :]


def by_distance(weights: Tensor, distance: Tensor) -> Tensor:
    """$w_{min(distance, D - 1)}$, `[..., *distance.shape]`."""
    index = distance.clamp(max=weights.shape[-1] - 1)
    return torch.unflatten(weights.index_select(-1, index.flatten()), -1, index.shape)


def causal_mhla(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    *,
    block_size: int,
    mask: Tensor | None = None,
    feature_map: str = "relu",
    rotary: tuple[Tensor, Tensor] | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
) -> Tensor:
    r"""Causal MHLA of whole sequences, in the chunkwise parallel form.

    Token $n$ of block $i = \lfloor n / \text{block\_size} \rfloor$ reads every $s \le n$:
    $$o_n = \sum_s w_{i - b(s)} R(\varphi(q_n))^\top R(\varphi(k_s)) v_s \,/\,
      (\sum_s w_{i - b(s)} \varphi(q_n)^\top \varphi(k_s) + \epsilon),$$
    where the last of `weights` applies to all larger distances. `CausalState` computes the same
    function token by token.

    Args:
        query: `[batch, seq_len, num_heads, head_dim]`, before the feature map. Query heads may be a
            multiple of key heads, which then serve groups of consecutive query heads.
        key: `[batch, seq_len, num_key_heads, head_dim]`.
        value: `[batch, seq_len, num_key_heads, value_dim]`.
        weights: One per distance between blocks, `[num_distances]` or, by key head,
            `[num_key_heads, num_distances]`. Non-negative if `normalize`.
        block_size: Tokens per block; the last block may hold fewer.
        mask: Bool `[batch, seq_len]`, False at padding, which may be anywhere. The result is that
            of the sequence without its padding: blocks begin at its first token. Outputs at padding
            are 0.
        feature_map: Name of φ in `FEATURE_MAPS`.
        rotary: `(cos, sin)`, each `[seq_len, head_dim / 2]` or, if positions differ within a batch,
            `[batch, seq_len, head_dim / 2]`; channels 2i and 2i + 1 are a pair.
        normalize: Divide by the denominator.
        eps: Added to the denominator.

    Returns:
        `[batch, seq_len, num_heads, value_dim]` in the dtype of `query`; sums accumulate in
        float32, or in float64 for float64 inputs.

    Raises:
        ValueError: If shapes, dtypes, devices or names do not fit; the message says what does.

    Source:
        Zhang et al. 2026, arXiv:2601.07832, App. C.
    """
    check_causal(query, key, value, weights, block_size, mask, feature_map, rotary)
    if mask is None and (rotary is None or rotary[0].ndim == 2):
        return _whole_blocks(
            query, key, value, weights, block_size, feature_map, rotary, normalize, eps
        )
    with torch.autocast(query.device.type, enabled=False):
        tokens = Features(query, key, value, mask, feature_map, rotary)
        length = query.shape[1] + -query.shape[1] % block_size
        positions = absent_last(tokens.ranks, mask, length)
        placed = tokens.placed(positions, length)
        numerator, denominator = placed.attend(weights, block_size, normalize)
        if denominator is not None:
            numerator = numerator / (denominator + eps)
        return taken(numerator, positions, mask).to(query.dtype)


def _whole_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    block_size: int,
    feature_map: str,
    rotary: tuple[Tensor, Tensor] | None,
    normalize: bool,
    eps: float,
) -> Tensor:
    """The form without padding: no token reads those that fill up the last block."""
    seq_len, group = query.shape[1], query.shape[2] // key.shape[2]
    missing = -seq_len % block_size
    query, key, value = (lengthened(x, 1, missing) for x in (query, key, value))
    if rotary is not None:
        cos, sin = rotary
        rotary = (lengthened(cos, 0, missing), lengthened(sin, 0, missing))
    num_blocks = query.shape[1] // block_size
    implementation = resolve_implementation(
        "auto",
        device=query.device,
        dtype=query.dtype,
        head_dim=query.shape[3],
        value_dim=value.shape[3],
        num_blocks=num_blocks,
        trainable_rotary=trains(rotary),
    )
    if group > 1 and implementation == "fused":
        # The kernels have a key head for every query head.
        key, value = (x.repeat_interleave(group, dim=2) for x in (key, value))
        weights = weights if weights.ndim == 1 else weights.repeat_interleave(group, dim=0)
    out = IMPLEMENTATIONS[implementation](
        query,
        key,
        value,
        distance_mixing(weights, num_blocks),
        grid=(query.shape[1],),
        layout=(num_blocks,),
        feature_map=feature_map,
        rotary=rotary,
        normalize=normalize,
        causal=True,
        eps=eps,
    )
    return out[:, :seq_len]


class Features:
    """Tokens after φ and rotation, in float32 at least, with padding set to 0 before.

    `q` and `k` are for numerators, `phi_q` and `phi_k` for denominators.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        feature_map: str,
        rotary: tuple[Tensor, Tensor] | None,
    ):
        dtype = torch.promote_types(query.dtype, torch.float32)
        if mask is not None:
            absent = ~mask[..., None, None]
            query, key, value = (x.masked_fill(absent, 0) for x in (query, key, value))
        phi = FEATURE_MAPS[feature_map]
        self.phi_q, self.phi_k, self.v = phi(query.to(dtype)), phi(key.to(dtype)), value.to(dtype)
        self.q, self.k = rotate(self.phi_q, rotary), rotate(self.phi_k, rotary)
        batch, seq_len = query.shape[:2]
        if mask is None:
            self.ranks = torch.arange(seq_len, device=query.device).expand(batch, seq_len)
        else:
            self.ranks = ranks_of(mask)

    def placed(self, positions: Tensor, length: int) -> "Placed":
        """All features at `positions` of `length` empty places; see `place`."""
        q, k, v = (place(x, positions, length) for x in (self.q, self.k, self.v))
        if self.q is self.phi_q:
            return Placed(q, k, q, k, v)
        phi_q, phi_k = (place(x, positions, length) for x in (self.phi_q, self.phi_k))
        return Placed(q, k, phi_q, phi_k, v)


class Placed:
    """Features in whole blocks, 0 where there is no token."""

    def __init__(self, q: Tensor, k: Tensor, phi_q: Tensor, phi_k: Tensor, v: Tensor):
        self.q, self.k, self.phi_q, self.phi_k, self.v = q, k, phi_q, phi_k, v

    def attend(
        self, weights: Tensor, block_size: int, normalize: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Numerators, and denominators `[..., 1]` if they are wanted."""
        numerator = self._sums(self.q, self.k, self.v, weights, block_size)
        if not normalize:
            return numerator, None
        ones = torch.ones_like(self.v[..., :1])
        return numerator, self._sums(self.phi_q, self.phi_k, ones, weights, block_size)

    def _sums(self, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, block_size: int) -> Tensor:
        weights = weights.to(q.dtype)
        return _whole_blocks(
            q,
            k,
            v,
            weights,
            block_size,
            feature_map="identity",
            rotary=None,
            normalize=False,
            eps=0.0,
        )

    def summaries(self, block_size: int) -> tuple[Tensor, Tensor]:
        """`[batch, blocks, key_heads, head_dim, value_dim]`; key sums lack the last axis."""
        return _summed(self.k, self.phi_k, self.v, block_size)


def block_summaries(
    key: Tensor,
    value: Tensor,
    block_size: int,
    feature_map: str,
    rotary: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Summaries and key sums of tokens without padding, as `Placed.summaries`."""
    dtype = torch.promote_types(key.dtype, torch.float32)
    phi_k = FEATURE_MAPS[feature_map](key.to(dtype))
    parts, missing = (rotate(phi_k, rotary), phi_k, value.to(dtype)), -key.shape[1] % block_size
    k, phi_k, v = (lengthened(x, 1, missing) for x in parts)
    return _summed(k, phi_k, v, block_size)


def _summed(k: Tensor, phi_k: Tensor, v: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    k, phi_k, v = (torch.unflatten(x, 1, (-1, block_size)) for x in (k, phi_k, v))
    return torch.einsum("bmshk,bmshv->bmhkv", k, v), phi_k.sum(dim=2)


def ranks_of(mask: Tensor) -> Tensor:
    """Rank of every token among the tokens of its sequence; -1 for padding before the first."""
    return mask.long().cumsum(dim=1) - 1


def absent_last(positions: Tensor, mask: Tensor | None, length: int) -> Tensor:
    """Positions in which padding is moved to `length`, after all places."""
    return positions if mask is None else positions.masked_fill(~mask, length)


def place(x: Tensor, positions: Tensor, length: int) -> Tensor:
    """`[batch, length, ...]` with `x` at `positions`, 0 elsewhere; position `length` is dropped."""
    index = positions[..., None, None].expand_as(x)
    return x.new_zeros(x.shape[0], length + 1, *x.shape[2:]).scatter(1, index, x)[:, :length]


def taken(placed: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
    """Inverse of `place`: the entries at `positions`, and 0 for padding."""
    index = positions.clamp(max=placed.shape[1] - 1)[..., None, None]
    out = placed.gather(1, index.expand(*positions.shape, *placed.shape[2:]))
    return out if mask is None else out.masked_fill(~mask[..., None, None], 0)
