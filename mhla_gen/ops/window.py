"""Softmax over a window of the last tokens: the exact half of causal attention, in parallel."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from mhla_gen.ops.causal import absent_last, place, ranks_of, taken
from mhla_gen.ops.causal_checks import check_causal_tokens, check_window
from mhla_gen.ops.feature_maps import rotate
from mhla_gen.ops.softmax import softmax_attention

Rotary = tuple[Tensor, Tensor] | None
# With fewer queries in a chunk, matrix products would have too few rows.
_SHORTEST_CHUNK = 64


class Late(NamedTuple):
    """Queries, paired with the keys and values one window before them.

    For every query, MHLA over these tokens reads everything before the query's window.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    rotary: Rotary
    """Tables of the keys, also used for queries: distances count from the end of the window."""
    mask: Tensor | None
    """False where a query has nothing before its window or is padding; None if True everywhere."""
    skipped: int
    """Number of queries before these, none of which has anything before its window."""

    def completed(self, linear: Tensor, exact: Tensor) -> Tensor:
        """MHLA's output for all queries, with the exact half's output for the earlier ones."""
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
    r"""Softmax of every token over the last `window` tokens, including itself.

    $$o_n = \sum_{n - W < s \le n} p_{ns} v_s, \quad
      p_n = \mathrm{softmax}_s(R(q_n)^\top R(k_s) / \sqrt{\mathrm{head\_dim}}).$$
    Queries are processed in chunks, each with the keys of its windows, so time and memory grow with
    seq_len · window.

    Args:
        query: As in `causal_mhla`, like all other arguments.
        key: Keys.
        value: Values.
        window: W, in tokens.
        mask: False at padding, which may be anywhere. Outputs there are 0.
        rotary: Tables by position.

    Returns:
        The output, shaped like that of `causal_mhla`, and the tokens for MHLA before the window, or
        None if no query has any.

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
    """`window_attention` with sequences moved to the front, so that padding comes last."""
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
    """Softmax over the last `window` tokens, for rotated queries and keys without padding."""
    seq_len = query.shape[1]
    if seq_len <= window:
        return attend(query, key, value, is_causal=True)
    if _has_kernel(query, value):
        return _windowed(query, key, value, window)
    chunk = max(window, _SHORTEST_CHUNK)
    row = torch.arange(chunk, device=query.device).unsqueeze(1)
    column = torch.arange(-window, chunk, device=query.device)
    band = (column <= row) & (column > row - window)
    # Queries of the first chunk have no keys before the chunk.
    own = band[: min(seq_len, chunk), window : window + seq_len]
    out = attend(query[:, :chunk], key[:, :chunk], value[:, :chunk], own)
    if seq_len <= chunk:
        return out
    fill = (0, 0, 0, 0, 0, -seq_len % chunk)
    query = torch.unflatten(F.pad(query[:, chunk:], fill), 1, (-1, chunk))
    key, value = (
        F.pad(x[:, chunk - window :], fill).unfold(1, window + chunk, chunk).movedim(-1, 2)
        for x in (key, value)
    )
    query, key, value = (x.flatten(0, 1) for x in (query, key, value))
    others = attend(query, key, value, band)
    others = torch.unflatten(others, 0, (out.shape[0], -1)).flatten(1, 2)
    return torch.cat((out, others[:, : seq_len - chunk]), dim=1)


def _has_kernel(query: Tensor, value: Tensor) -> bool:
    """Whether flash attention, which can skip keys before a window, takes these tokens."""
    fits = query.shape[3] == value.shape[3] and query.shape[3] % 8 == 0 and query.shape[3] <= 256
    if not (fits and query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)):
        return False
    return torch.version.cuda is not None and torch.cuda.get_device_capability(query.device)[0] >= 8


def _windowed(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """`banded` by flash attention, as sequences of one length."""
    batch, seq_len = query.shape[:2]
    key, value = _by_query_head(query, key, value)
    ends = torch.arange(batch + 1, dtype=torch.int32, device=query.device) * seq_len
    q, k, v = (x.flatten(0, 1) for x in (query, key, value))
    out = varlen_attn(q, k, v, ends, ends, seq_len, seq_len, window_size=(window - 1, 0))
    return torch.unflatten(out, 0, (batch, seq_len))  # pyright: ignore[reportArgumentType]


def _by_query_head(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values for each query head: not every kernel takes grouped queries."""
    group = query.shape[2] // key.shape[2]
    if group == 1:
        return key, value
    return key.repeat_interleave(group, dim=2), value.repeat_interleave(group, dim=2)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` of `[batch, seq_len, heads, dim]`, with grouped queries."""
    key, value = _by_query_head(query, key, value)
    return softmax_attention(query, key, value, mask=attn_mask, is_causal=is_causal)
