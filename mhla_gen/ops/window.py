"""Softmax within the last tokens: the exact half of causal attention, for whole sequences."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mhla_gen.ops.causal import absent_last, place, ranks_of, taken
from mhla_gen.ops.causal_checks import check_causal_tokens, check_window
from mhla_gen.ops.feature_maps import rotate

Rotary = tuple[Tensor, Tensor] | None
# Fewer queries in a chunk would leave matrix products too few rows.
_SHORTEST_CHUNK = 64


class Late(NamedTuple):
    """Queries beside the keys and values that lie one window before them.

    MHLA of these tokens reads, for every query, all that its window does not hold.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    rotary: Rotary
    """Tables of the keys, for queries too: distances count from the end of the window."""
    mask: Tensor | None
    """False where a query has nothing before its window, or is padding; None: nowhere."""
    skipped: int
    """Queries before these, none of which has anything before its window."""

    def completed(self, linear: Tensor, exact: Tensor) -> Tensor:
        """MHLA's output for all queries: the exact half's for those that are not here."""
        if self.mask is not None:
            linear = torch.where(self.mask[..., None, None], linear, exact[:, self.skipped :])
        return linear if self.skipped == 0 else torch.cat((exact[:, : self.skipped], linear), dim=1)


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int,
    mask: Tensor | None = None,
    rotary: Rotary = None,
) -> tuple[Tensor, Late | None]:
    r"""Softmax of every token over the last `window` tokens, its own among them.

    $$o_n = \sum_{n - W < s \le n} p_{ns} v_s, \quad
      p_n = \mathrm{softmax}_s(R(q_n)^\top R(k_s) / \sqrt{\mathrm{head\_dim}}).$$
    Queries are taken in chunks, each beside the keys of its windows: cost and memory grow with
    seq_len · window.

    Args:
        query: As in `causal_mhla`, like all others.
        key: Keys.
        value: Values.
        window: W, in tokens.
        mask: False at padding, wherever it is. Outputs there are 0.
        rotary: Tables by position.

    Returns:
        The output, shaped as that of `causal_mhla`, and the tokens of MHLA before the window; None
        where no query has any.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit; the message says what does.
    """
    check_causal_tokens(query, key, value, mask, rotary)
    check_window(window)
    if mask is not None:
        return _padded(query, key, value, window, mask, rotary)
    out = banded(rotate(query, rotary), rotate(key, rotary), value, window)
    seq_len = query.shape[1]
    if seq_len <= window:
        return out, None
    before = seq_len - window
    tables = None if rotary is None else (rotary[0][..., :before, :], rotary[1][..., :before, :])
    return out, Late(query[:, window:], key[:, :before], value[:, :before], tables, None, window)


def _padded(
    query: Tensor, key: Tensor, value: Tensor, window: int, mask: Tensor, rotary: Rotary
) -> tuple[Tensor, Late | None]:
    """Sequences moved to the front, where padding stands behind all that is read."""
    ranks = ranks_of(mask)
    length = mask.shape[1]
    positions = absent_last(ranks, mask, length)
    query, key, value = (x.masked_fill(~mask[..., None, None], 0) for x in (query, key, value))
    q, k = rotate(query, rotary), rotate(key, rotary)
    q, k, v = (place(x, positions, length) for x in (q, k, value))
    out = taken(banded(q, k, v, window), positions, mask)
    has_past = mask & (ranks >= window)
    before = (ranks - window).clamp(min=0)
    key, value = (taken(place(x, positions, length), before, has_past) for x in (key, value))
    if rotary is not None:
        tables = (x.expand(*mask.shape, -1).unsqueeze(2) for x in rotary)
        cos, sin = (taken(place(x, positions, length), before, has_past) for x in tables)
        rotary = cos.squeeze(2), sin.squeeze(2)
    return out, Late(query, key, value, rotary, has_past, 0)


def banded(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """Softmax over the last `window` tokens, of rotated queries and keys and without padding."""
    seq_len = query.shape[1]
    if seq_len <= window:
        return attend(query, key, value, is_causal=True)
    chunk = max(window, _SHORTEST_CHUNK)
    row = torch.arange(chunk, device=query.device).unsqueeze(1)
    column = torch.arange(-window, chunk, device=query.device)
    band = (column <= row) & (column > row - window)
    # Queries of the first chunk have no key before it.
    own = band[: min(seq_len, chunk), window : window + seq_len]
    out = attend(query[:, :chunk], key[:, :chunk], value[:, :chunk], own)
    if seq_len <= chunk:
        return out
    fill = (0, 0, 0, 0, 0, -seq_len % chunk)
    query = F.pad(query[:, chunk:], fill).unflatten(1, (-1, chunk))
    key, value = (
        F.pad(x[:, chunk - window :], fill).unfold(1, window + chunk, chunk).movedim(-1, 2)
        for x in (key, value)
    )
    query, key, value = (x.flatten(0, 1) for x in (query, key, value))
    others = attend(query, key, value, band)
    others = others.unflatten(0, (out.shape[0], -1)).flatten(1, 2)
    return torch.cat((out, others[:, : seq_len - chunk]), dim=1)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` of `[batch, seq_len, heads, dim]`, with grouped queries."""
    group = query.shape[2] // key.shape[2]
    if group > 1:
        # Not every kernel that takes a mask takes groups.
        key, value = (x.repeat_interleave(group, dim=2) for x in (key, value))
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal)
    return out.transpose(1, 2)
