"""What the fused kernels take; asked without Triton, which is not installed everywhere."""

import importlib.util
import os

import torch
from torch import Tensor

from mhla_gen.errors import UserError
from mhla_gen.ops.transforms import transformed

HAS_TRITON = importlib.util.find_spec("triton") is not None
MAX_DIM = 128
"""Largest head_dim and value_dim: a summary has to fit into the registers of one program."""
MAX_BLOCKS = 2048
"""Most blocks: one program holds 16 rows of the mixing matrix."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def unsupported(
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    num_blocks: int,
    trainable_rotary: bool,
) -> str | None:
    """Why the kernels cannot run a call, or None if they can."""
    if torch.device(device).type != "cuda" and not INTERPRETED:
        return f"needs tensors on a CUDA device, found {device}"
    if max(head_dim, value_dim) > MAX_DIM:
        return f"takes head_dim and value_dim up to {MAX_DIM}, found {head_dim} and {value_dim}"
    if num_blocks > MAX_BLOCKS:
        return f"takes up to {MAX_BLOCKS} blocks, found {num_blocks}"
    if dtype not in DTYPES:
        return f"takes float32, float16 and bfloat16, found {dtype}"
    if trainable_rotary:
        return "treats rotary as constant, found tables that require a gradient"
    if transformed():
        return "runs outside of torch.func and forward-mode differentiation, found one of them"
    return None


def trains(rotary: tuple[Tensor, Tensor] | None) -> bool:
    """Whether there are rotary tables that require a gradient."""
    return rotary is not None and any(table.requires_grad for table in rotary)


def require_triton(instead: str = "blockwise") -> None:
    """Raise `ValueError`, naming the implementation to use `instead`, if Triton is missing."""
    if not HAS_TRITON:
        raise UserError(f"implementation='fused' needs the package triton; use {instead!r}")


def require_fused(
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    num_blocks: int,
    trainable_rotary: bool = False,
) -> None:
    """Raise `ValueError` unless the fused kernels support a call; the message says why not."""
    require_triton()
    reason = unsupported(device, dtype, head_dim, value_dim, num_blocks, trainable_rotary)
    if reason is not None:
        raise UserError(f"implementation='fused' {reason}; use 'blockwise' or 'auto'")
