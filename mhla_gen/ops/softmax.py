"""Softmax attention by torch's kernels."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mhla_gen.ops.transforms import transformed


def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Softmax of all pairs.

    Args:
        query: `[batch, seq_len, num_heads, head_dim]`, rotated like keys.
        key: `[batch, key_len, num_heads, head_dim]`.
        value: `[batch, key_len, num_heads, value_dim]`.
        mask: Bool, which broadcasts to `[batch, num_heads, seq_len, key_len]`, True for pairs that
            attend; None if all do.
        is_causal: Whether a query attends only to keys that are not after it.

    Returns:
        `[batch, seq_len, num_heads, value_dim]`.
    """
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
    return with_contiguous_gradient(out.transpose(1, 2))


def with_contiguous_gradient(out: Tensor) -> Tensor:
    """An output of attention, whose backward pass gets a gradient that lies in one piece.

    torch plans cuDNN's backward pass for the strides of queries, keys, values and this gradient,
    and takes the same plan wherever those of queries, keys and values are the same (torch 2.11).
    In FLUX, whose two kinds of blocks cut this gradient out of tensors of different widths, one of
    them then reads it as the other's lies: wrongly, and beyond its end.

    Args:
        out: `[batch, seq_len, num_heads, value_dim]`.
    """
    if not torch.is_grad_enabled() or transformed():
        return out
    return _ContiguousGradient.apply(out)


class _ContiguousGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].contiguous()
