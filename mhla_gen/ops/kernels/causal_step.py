"""One more token of every sequence, in one launch: the recurrent form of causal MHLA."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mhla_gen.ops.kernels.compiled import launch
from mhla_gen.ops.kernels.features import phi
from mhla_gen.ops.kernels.launch import padded


@triton.jit
def _rotated(x, cos_ptr, sin_ptr, D: tl.constexpr):
    """A vector [BD] with its interleaved pairs rotated."""
    BD: tl.constexpr = x.shape[0]
    pairs = tl.arange(0, BD // 2)
    cos = tl.load(cos_ptr + pairs, mask=pairs < D // 2, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + pairs, mask=pairs < D // 2, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(x, (BD // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (BD,))


@triton.jit
def _features(x_ptr, D: tl.constexpr, BD: tl.constexpr, FEATURE_MAP: tl.constexpr):
    """φ of a row, float32 [BD]; 0 in channels that do not exist."""
    channels = tl.arange(0, BD)
    x = tl.load(x_ptr + channels, mask=channels < D, other=0.0).to(tl.float32)
    return tl.where(channels < D, phi(x, FEATURE_MAP), 0.0)


@triton.jit
def causal_step_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    weights_ptr,
    open_ptr,
    open_keys_ptr,
    mixed_ptr,
    mixed_keys_ptr,
    out_ptr,
    new_open_ptr,
    new_open_keys_ptr,
    q_strides,
    k_strides,
    v_strides,
    table_stride,
    weights_stride,
    num_heads,
    eps,
    D: tl.constexpr,
    V: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    QUERIES: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    ROTARY: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """S ← S + w vᵀ, z ← z + φ(k), then o = uᵀ (S̃ + w₀ S) / (φ(q)·(z̃ + w₀ z) + eps).

    One program handles one key head of one sequence and its `QUERIES` query heads. Strides are
    those of [batch, heads]; everything else is contiguous.
    """
    program = tl.program_id(0).to(tl.int64)
    batch, head = program // num_heads, program % num_heads
    cos_ptr += batch * table_stride
    sin_ptr += batch * table_stride
    rows, columns = tl.arange(0, BD), tl.arange(0, BV)
    tile = program * (D * V) + rows[:, None] * V + columns[None, :]
    inside = (rows < D)[:, None] & (columns < V)[None, :]
    features = _features(k_ptr + batch * k_strides[0] + head * k_strides[1], D, BD, FEATURE_MAP)
    rotated = features
    if ROTARY:
        rotated = _rotated(features, cos_ptr, sin_ptr, D)
    v_ptr += batch * v_strides[0] + head * v_strides[1]
    value = tl.load(v_ptr + columns, mask=columns < V, other=0.0).to(tl.float32)

    own = tl.load(weights_ptr + head * weights_stride).to(tl.float32)
    summary = tl.load(open_ptr + tile, mask=inside, other=0.0)
    summary += rotated[:, None] * value[None, :]
    tl.store(new_open_ptr + tile, summary, mask=inside)
    summary = own * summary + tl.load(mixed_ptr + tile, mask=inside, other=0.0)
    vector = program * D + rows
    key_sum = tl.load(open_keys_ptr + vector, mask=rows < D, other=0.0) + features
    tl.store(new_open_keys_ptr + vector, key_sum, mask=rows < D)
    key_sum = own * key_sum + tl.load(mixed_keys_ptr + vector, mask=rows < D, other=0.0)
    for number in range(QUERIES):
        query = head * QUERIES + number
        features = _features(
            q_ptr + batch * q_strides[0] + query * q_strides[1], D, BD, FEATURE_MAP
        )
        rotated = features
        if ROTARY:
            rotated = _rotated(features, cos_ptr, sin_ptr, D)
        out = tl.sum(rotated[:, None] * summary, axis=0)
        if NORMALIZE:
            out /= tl.sum(features * key_sum, axis=0) + eps
        out_row = out_ptr + (batch * num_heads * QUERIES + query) * V
        tl.store(out_row + columns, out.to(out_ptr.dtype.element_ty), mask=columns < V)


def causal_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    past: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    feature_map: str,
    rotary: tuple[Tensor, Tensor] | None,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output `[batch, num_heads, value_dim]`, and the open block with this token in it.

    Args:
        query: `[batch, num_heads, head_dim]`.
        key: `[batch, num_key_heads, head_dim]`.
        value: `[batch, num_key_heads, value_dim]`.
        weights: As in `causal_mhla`; only the first of each head is read.
        past: Summary and key sum of the open block, and the weighted ones of all others; float32.
        feature_map: Name of φ.
        rotary: `(cos, sin)`, each `[1 or batch, head_dim / 2]`.
        normalize: Divide by the denominator.
        eps: Added to the denominator.
    """
    batch, num_heads, head_dim = query.shape
    key_heads, value_dim = value.shape[1:]
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    past = tuple(x.contiguous() for x in past)  # type: ignore[assignment]
    cos, sin, table_stride = None, None, 0
    if rotary is not None:
        cos, sin = (table.contiguous() for table in rotary)
        table_stride = 0 if cos.shape[0] == 1 else cos.stride(0)
    out = query.new_empty((batch, num_heads, value_dim))
    opened, open_keys = torch.empty_like(past[0]), torch.empty_like(past[1])
    # Triton takes no null pointers into arithmetic.
    tables = (query, query) if cos is None else (cos, sin)
    with torch.cuda.device_of(query):
        launch(
            causal_step_kernel,
            (batch * key_heads,),
            (query, key, value, *tables, weights, *past, out, opened, open_keys),
            (
                query.stride()[:2], key.stride()[:2], value.stride()[:2], table_stride,
                0 if weights.ndim == 1 else weights.stride(0), key_heads, eps,
            ),
            {
                "D": head_dim, "V": value_dim, "BD": padded(head_dim), "BV": padded(value_dim),
                "QUERIES": num_heads // key_heads, "FEATURE_MAP": feature_map,
                "ROTARY": rotary is not None, "NORMALIZE": normalize, "num_warps": 4,
            },
        )  # fmt: skip
    return out, opened, open_keys
