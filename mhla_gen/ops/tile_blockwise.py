"""Tile attention in batched PyTorch, for any device: a few groups at a time, sums in float32."""

import torch
from torch import Tensor

from mhla_gen.ops.feature_maps import rotate
from mhla_gen.ops.partition import block_slots
from mhla_gen.ops.tiles import Tiling, filled_slots, group_slots, tile_lists, token_places
from mhla_gen.ops.transforms import recomputed


def blockwise_tile_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    placed: Tiling,
    rotary: tuple[Tensor, Tensor] | None,
    extra: tuple[Tensor, Tensor, Tensor] | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Tile attention summed in float32 (float64 for float64 inputs); see `tile_attention`.

    A few groups are handled at a time, so that the tiles gathered for them take no more memory than
    all keys; backward gathers them again.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        q, k = (rotate(x.to(dtype), rotary).transpose(1, 2) for x in (query, key))
        v = value.to(dtype).transpose(1, 2)  # [batch, heads, seq_len, dim]
        tiles = block_slots(placed.grid, placed.tiles, q.device)
        filled = filled_slots(tiles.filled, tiles.tokens)
        rows, rows_filled = group_slots(placed, q.device)
        lists = tile_lists(
            _means(q, rows, rows_filled), _means(k, tiles.tokens, filled), placed
        )  # [batch, heads, groups, list_size]
        extra_kv = _extra(extra, dtype)

        def attend(
            q: Tensor, k: Tensor, v: Tensor, lists: Tensor, rows: Tensor
        ) -> tuple[Tensor, Tensor]:
            group_q = torch.unflatten(q.index_select(2, rows.flatten()), 2, rows.shape)
            columns = tiles.tokens[lists].flatten(3)  # [batch, heads, groups, keys]
            valid = filled[lists].flatten(3)
            scores = group_q @ _gather(k, columns).transpose(-1, -2) * scale
            scores = scores.masked_fill(~valid.unsqueeze(-2), float("-inf"))
            scored = [(scores, _gather(v, columns))]
            if extra_kv is not None:
                extra_k, extra_v, bias = extra_kv
                scored.append((group_q @ extra_k.transpose(-1, -2) * scale + bias, extra_v))
            return _softmax(scored)

        gathered = placed.num_groups * lists.shape[-1] * tiles.tokens.shape[1]
        some = max(1, placed.num_groups * query.shape[1] // max(gathered, 1))
        parts: list[tuple[Tensor, Tensor]] = []
        for part_lists, part_rows in zip(
            torch.split(lists, some, dim=2), torch.split(rows, some, dim=0), strict=True
        ):
            inputs = (q, k, v, part_lists, part_rows)
            whole = some >= placed.num_groups
            parts.append(attend(*inputs) if whole else recomputed(attend, *inputs))
        places = token_places(placed, q.device)
        out = torch.cat([out for out, _ in parts], dim=2).flatten(2, 3).index_select(2, places)
        lse = torch.cat([lse for _, lse in parts], dim=2).flatten(2, 3).index_select(2, places)
        return out.transpose(1, 2).to(query.dtype), lse


def _softmax(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Softmax over all scores `[..., queries, keys]` of their values, and its log-sum-exp."""
    with torch.no_grad():
        # Any shift gives the same: it needs no gradient. A part without keys has no peak, but
        # stays: the gradients of its inputs are zero, not missing.
        peaks = [scores.amax(dim=-1, keepdim=True) for scores, _ in parts if scores.shape[-1] > 0]
        peak = torch.cat(peaks, dim=-1).amax(dim=-1, keepdim=True)
        peak = peak.masked_fill(peak == float("-inf"), 0)
    # Weights by the log-sum-exp would not sum to one: it is rounded, by 0.001 at 10,000.
    weights = [(scores - peak).exp() for scores, _ in parts]
    # With keys off the grid there are two parts.
    total = _added([w.sum(dim=-1, keepdim=True) for w in weights])
    out = _added([w @ values for w, (_, values) in zip(weights, parts, strict=True)])
    return out / total, (peak + total.log()).squeeze(-1)


def _added(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _extra(
    extra: tuple[Tensor, Tensor, Tensor] | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Keys and values `[batch, heads, 1, extra_len, dim]`, and the mask of their scores."""
    if extra is None:
        return None
    keys, values, valid = extra
    # A weight of 0 would not keep out NaN or infinity.
    keys, values = (x.masked_fill(~valid[..., None, None], 0) for x in (keys, values))
    keys, values = (x.to(dtype).transpose(1, 2).unsqueeze(2) for x in (keys, values))
    bias = torch.zeros_like(valid, dtype=dtype).masked_fill(~valid, float("-inf"))
    return keys, values, bias[:, None, None, None]


def _means(x: Tensor, slots: Tensor, filled: Tensor) -> Tensor:
    """Mean over filled slots `[boxes, slots]` of tokens `[batch, heads, seq_len, dim]`."""
    boxes = torch.unflatten(x.detach().index_select(2, slots.flatten()), 2, slots.shape)
    return (boxes * filled[..., None]).sum(dim=3) / filled.sum(dim=1)[:, None]


def _gather(x: Tensor, columns: Tensor) -> Tensor:
    """Tokens `columns` [batch, heads, groups, keys] of every head of `x`."""
    index = columns.flatten(2).unsqueeze(-1).expand(-1, -1, -1, x.shape[-1])
    return torch.unflatten(x.gather(2, index), 2, columns.shape[2:])
