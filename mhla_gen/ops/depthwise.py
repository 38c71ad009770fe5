"""Depthwise convolution over the token grid, in place, and the gate that may follow.

torch's convolutions expect channels before positions. For tokens `[batch, seq_len, channels]` this
needs a transposed copy each way, and a compiled model then also keeps other tensors with four axes,
such as queries and keys, in that order. The Triton kernels here read raster order directly.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mhla_gen.errors import UserError
from mhla_gen.ops.fused_limits import HAS_TRITON, require_triton
from mhla_gen.ops.partition import check_grid
from mhla_gen.ops.transforms import transformed


class Blend(NamedTuple):
    """Two tensors that are combined with one weight per token and head."""

    first: Tensor
    """`[batch, seq_len, num_heads, head_dim]`."""
    second: Tensor
    """Like `first`."""
    logits: Tensor
    """Logits of the weight of `first`, `[batch, seq_len, num_heads]`; `second` gets the rest."""

    def combined(self) -> Tensor:
        """`σ(logits) · first + σ(-logits) · second`."""
        # A small weight of the second tensor keeps its precision in bfloat16; computed as 1 - σ it
        # would not.
        weight = self.logits.neg().sigmoid().unsqueeze(-1).type_as(self.first)
        return self.first.lerp(self.second, weight)


def depthwise_conv(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    grid: tuple[int, ...],
    implementation: str = "auto",
) -> Tensor:
    """Convolve every channel with its own odd-sized filter, with zeros outside the grid.

    Args:
        tokens: `[batch, seq_len, channels]`, raster order of `grid`.
        weight: `[channels, 1, size, …]`, one odd size per axis of `grid`.
        bias: `[channels]`, or None.
        grid: Tokens along each axis; 1 to 3 axes.
        implementation: `torch`, `fused` (Triton, on a CUDA device) or `auto`: `fused` where it can
            run.

    Returns:
        A tensor like `tokens`; products are summed in float32 by the kernel.

    Raises:
        ValueError: If sizes do not fit, or `fused` is requested on another device than CUDA.
    """
    if picked(tokens, weight, bias, grid, implementation) == "torch":
        return _torch_conv(tokens, weight, bias, grid)
    from mhla_gen.ops.kernels.depthwise import depthwise_tokens

    return depthwise_tokens(tokens, weight, bias, list(grid))


def gated_conv(
    added: Tensor | Blend,
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    *,
    grid: tuple[int, ...],
    num_heads: int,
    implementation: str = "auto",
) -> Tensor:
    """`(added + depthwise_conv(tokens)) · SiLU(logits)`: an attention layer's end in one pass.

    Args:
        added: Attention's output, shaped like `tokens`, or two outputs and their weights.
        tokens: Values, as in `depthwise_conv`.
        weight: Filters, as in `depthwise_conv`.
        bias: As in `depthwise_conv`.
        logits: `[batch, seq_len, channels or num_heads]`: one per channel or per head; None for no
            gate.
        grid: Number of tokens along each axis.
        num_heads: Number of heads, which divide the channels.
        implementation: As in `depthwise_conv`.

    Returns:
        A tensor like `tokens`.

    Raises:
        ValueError: As `depthwise_conv`, or if `added` or `logits` have another size.
    """
    implementation = picked(tokens, weight, bias, grid, implementation)
    _check_gate(added, tokens, logits, num_heads)
    if implementation == "torch":
        added = added.combined().flatten(2) if isinstance(added, Blend) else added
        out = added + _torch_conv(tokens, weight, bias, grid)
        return out if logits is None else times_silu(out, logits, num_heads)
    from mhla_gen.ops.kernels.gated_conv import gated_conv_tokens

    beside = shares = None
    if isinstance(added, Blend):
        added, beside, shares = added.first.flatten(2), added.second.flatten(2), added.logits
    parts = added, beside, shares
    given = (*parts, tokens, weight, logits)
    keeps = logits is not None and torch.is_grad_enabled()
    keeps = keeps and any(x is not None and x.requires_grad for x in given)
    return gated_conv_tokens(*parts, tokens, weight, bias, logits, list(grid), num_heads, keeps)[0]


def _check_gate(
    added: Tensor | Blend, tokens: Tensor, logits: Tensor | None, num_heads: int
) -> None:
    """Raise `ValueError` unless what is added to a convolution and multiplies it fits it."""
    batch, seq_len, channels = tokens.shape
    if num_heads < 1 or channels % num_heads:
        raise ValueError(f"num_heads must divide {channels} channels, found {num_heads}")
    whole, by_head = (batch, seq_len, channels), (batch, seq_len, num_heads)
    if isinstance(added, Blend):
        half = (*by_head, channels // num_heads)
        _check_shape("first", added.first, half)
        _check_shape("second", added.second, half)
        _check_shape("logits of a blend", added.logits, by_head)
    else:
        _check_shape("added", added, whole)
    if logits is not None:
        _check_shape("logits", logits, whole, by_head)


def _check_shape(name: str, x: Tensor, *allowed: tuple[int, ...]) -> None:
    if tuple(x.shape) not in allowed:
        expected = " or ".join(str(list(shape)) for shape in allowed)
        raise ValueError(f"{name} must be {expected}, found {list(x.shape)}")


def times_silu(out: Tensor, logits: Tensor, num_heads: int) -> Tensor:
    """Multiply channels by the SiLU of logits `[batch, seq_len, channels or heads]`."""
    if logits.shape[-1] == out.shape[-1]:
        return out * F.silu(logits)
    return (torch.unflatten(out, 2, (num_heads, -1)) * F.silu(logits).unsqueeze(-1)).flatten(2)


def picked(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: tuple[int, ...],
    implementation: str,
    seq_len: int | None = None,
) -> str:
    """`torch` or `fused`, after all checks; `seq_len` if it is not all tokens of `grid`."""
    check_grid(tuple(grid))
    if tokens.ndim != 3 or not tokens.is_floating_point():
        raise ValueError(
            "tokens must be [batch, seq_len, channels] in a floating dtype, found "
            f"{tokens.dtype} {tuple(tokens.shape)}"
        )
    sizes = weight.shape[2:]
    if len(sizes) != len(grid) or any(size % 2 == 0 for size in sizes):
        raise ValueError(
            f"weight needs one odd size for each axis of grid={grid}, found {tuple(weight.shape)}"
        )
    seq_len = math.prod(grid) if seq_len is None else seq_len
    if weight.shape[:2] != (tokens.shape[2], 1) or seq_len != tokens.shape[1]:
        raise UserError(
            f"tokens {tuple(tokens.shape)} do not fit weight {tuple(weight.shape)} and grid={grid}"
        )
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.device != tokens.device:
            raise ValueError(f"{name} is on {x.device} but tokens on {tokens.device}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], found {tuple(bias.shape)}")
    if implementation == "auto":
        implementation = "fused" if _fused_can_run(tokens) else "torch"
    if implementation not in ("torch", "fused"):
        raise UserError(f"implementation must be auto, torch or fused, found {implementation!r}")
    if implementation == "fused":
        require_triton(instead="torch")
        from mhla_gen.ops.kernels.depthwise import INTERPRETED

        if not tokens.is_cuda and not INTERPRETED:
            raise UserError(
                f"implementation='fused' needs a CUDA device, found {tokens.device}; use 'torch'"
            )
        if transformed():
            raise UserError(
                "implementation='fused' runs outside of torch.func and forward-mode "
                "differentiation; use 'torch'"
            )
    return implementation


def _fused_can_run(tokens: Tensor) -> bool:
    plain = tokens.is_cuda and tokens.dtype != torch.float64 and HAS_TRITON
    return plain and not transformed()


def _torch_conv(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, grid: tuple[int, ...]
) -> Tensor:
    conv = (F.conv1d, F.conv2d, F.conv3d)[len(grid) - 1]
    padding = [size // 2 for size in weight.shape[2:]]
    image = torch.unflatten(tokens.transpose(1, 2), 2, grid)
    out = conv(image, weight, bias, padding=padding, groups=tokens.shape[2])
    return out.flatten(2).transpose(1, 2)
