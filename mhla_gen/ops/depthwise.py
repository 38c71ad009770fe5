"""Depthwise convolution of tokens on their grid, where they lie.

torch's convolutions want channels before positions. For tokens `[batch, seq_len, channels]` that is
a transposed copy each way, and a compiled model then keeps other tensors of four axes, such as
queries and keys, in that order too. The Triton kernels here read raster order in place.
"""

import importlib.util
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mhla_gen.errors import UserError

_HAS_TRITON = importlib.util.find_spec("triton") is not None


def depthwise_conv(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    grid: tuple[int, ...],
    implementation: str = "auto",
) -> Tensor:
    """Convolve every channel with its own odd-sized filter, zeros outside the grid.

    Args:
        tokens: `[batch, seq_len, channels]`, raster order of `grid`.
        weight: `[channels, 1, size, …]`, one odd size an axis of `grid`.
        bias: `[channels]`, or None.
        grid: Tokens along each axis; 1 to 3 axes.
        implementation: `torch`, `fused` (Triton, on a CUDA device) or `auto`: `fused` where it can
            run.

    Returns:
        A tensor like `tokens`; products are summed in float32 by the kernel.

    Raises:
        ValueError: If sizes do not fit, or kernels are asked for on another device than CUDA.
    """
    sizes = weight.shape[2:]
    if len(sizes) != len(grid) or any(size % 2 == 0 for size in sizes):
        raise ValueError(
            f"weight needs one odd size for each axis of grid={grid}, found {tuple(weight.shape)}"
        )
    if weight.shape[:2] != (tokens.shape[2], 1) or math.prod(grid) != tokens.shape[1]:
        raise UserError(
            f"tokens {tuple(tokens.shape)} do not fit weight {tuple(weight.shape)} and grid={grid}"
        )
    if implementation == "auto":
        implementation = "fused" if _fused_can_run(tokens) else "torch"
    if implementation == "torch":
        return _torch_conv(tokens, weight, bias, grid)
    if implementation != "fused":
        raise UserError(f"implementation must be auto, torch or fused, found {implementation!r}")
    from mhla_gen.ops.kernels.depthwise import INTERPRETED, depthwise_tokens

    if not tokens.is_cuda and not INTERPRETED:
        raise UserError(
            f"implementation='fused' needs a CUDA device, found {tokens.device}; use 'torch'"
        )
    return depthwise_tokens(tokens, weight, bias, list(grid))


def _fused_can_run(tokens: Tensor) -> bool:
    return tokens.is_cuda and tokens.dtype != torch.float64 and _HAS_TRITON


def _torch_conv(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, grid: tuple[int, ...]
) -> Tensor:
    conv = (F.conv1d, F.conv2d, F.conv3d)[len(grid) - 1]
    padding = [size // 2 for size in weight.shape[2:]]
    image = tokens.transpose(1, 2).unflatten(2, grid)
    out = conv(image, weight, bias, padding=padding, groups=tokens.shape[2])
    return out.flatten(2).transpose(1, 2)
