"""One step of AdamW and of the average of weights, for all tensors of a group in one launch."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a program: two vectors of four for each thread.
_CHUNK = 1024
_WARPS = 4


class Tables(NamedTuple):
    """Where the tensors of a launch lie."""

    addresses: Tensor
    """int64 `[tensors, 5]`: weight, gradient, AdamW's two averages, average of the weight."""
    sizes: Tensor
    """int64 `[tensors]`: elements."""
    owners: Tensor
    """int32 `[chunks]`: the tensor of each chunk."""
    firsts: Tensor
    """int64 `[chunks]`: the chunk's first element in its tensor."""
    aligned: bool
    """Whether all tensors consist of aligned vectors of four numbers."""


def make_tables(addresses: Sequence[int], sizes: Sequence[int], device: torch.device) -> Tables:
    """Tables of tensors.

    Args:
        addresses: Five for each tensor, one tensor after the other.
        sizes: Elements of each.
        device: That of the tensors.
    """
    counts = torch.tensor([triton.cdiv(size, _CHUNK) for size in sizes])
    owners = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    firsts = (torch.arange(len(owners)) - (counts.cumsum(0) - counts)[owners]) * _CHUNK
    found = [
        torch.tensor(addresses, dtype=torch.int64).view(-1, 5),
        torch.tensor(sizes, dtype=torch.int64),
        owners.to(torch.int32),
        firsts,
    ]
    if device.type == "cuda":
        # Copied in the order of launches; the host need not wait.
        found = [x.pin_memory().to(device, non_blocking=True) for x in found]
    in_vectors = all(address % 16 == 0 for address in addresses)
    return Tables(*found, in_vectors and all(size % 4 == 0 for size in sizes))


def update(tables: Tables, factor: Tensor, **numbers: float) -> None:
    """Launch `adamw_kernel` for all chunks; arguments as there."""
    with torch.cuda.device_of(factor):
        adamw_kernel[(len(tables.owners),)](
            *tables[:4], factor, **numbers, CHUNK=_CHUNK, ALIGNED=tables.aligned, num_warps=_WARPS
        )


@triton.jit
def _entries(addresses_ptr, owner, NUMBER: tl.constexpr, offsets, ALIGNED: tl.constexpr):
    found = tl.load(addresses_ptr + owner * 5 + NUMBER).to(tl.pointer_type(tl.float32)) + offsets
    if ALIGNED:
        found = tl.multiple_of(found, 16)
    return found


@triton.jit
def adamw_kernel(
    addresses_ptr,
    sizes_ptr,
    owners_ptr,
    firsts_ptr,
    factor_ptr,
    rate,
    shrink,
    rest1,
    beta2,
    rest2,
    root,
    eps,
    share,
    CHUNK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One step of AdamW (Loshchilov and Hutter, arXiv:1711.05101) on a chunk, and its average.

    g = factor · gradient; m += rest1 (g - m); s = beta2 s + rest2 g²;
    w = shrink w - rate m / (root √s + eps); a += share (w - a).

    rest = 1 - beta is given, since float32 keeps few of its digits: of 1 - 0.9999, three.
    """
    owner = tl.load(owners_ptr + tl.program_id(0))
    first = tl.load(firsts_ptr + tl.program_id(0))
    size = tl.load(sizes_ptr + owner)
    if ALIGNED:
        size = tl.multiple_of(size, 4)
    factor = tl.load(factor_ptr)
    offsets = tl.multiple_of(first, CHUNK) + tl.arange(0, CHUNK)
    inside = offsets < size
    w_ptr = _entries(addresses_ptr, owner, 0, offsets, ALIGNED)
    g_ptr = _entries(addresses_ptr, owner, 1, offsets, ALIGNED)
    m_ptr = _entries(addresses_ptr, owner, 2, offsets, ALIGNED)
    s_ptr = _entries(addresses_ptr, owner, 3, offsets, ALIGNED)
    a_ptr = _entries(addresses_ptr, owner, 4, offsets, ALIGNED)
    w = tl.load(w_ptr, mask=inside, other=0.0)
    g = tl.load(g_ptr, mask=inside, other=0.0) * factor
    m = tl.load(m_ptr, mask=inside, other=0.0)
    s = tl.load(s_ptr, mask=inside, other=0.0)
    a = tl.load(a_ptr, mask=inside, other=0.0)
    m += rest1 * (g - m)
    s = beta2 * s + rest2 * g * g
    # Plain square roots and quotients are approximate on a GPU.
    w = shrink * w - tl.div_rn(rate * m, root * tl.sqrt_rn(s) + eps)
    a += share * (w - a)
    tl.store(w_ptr, w, mask=inside)
    tl.store(m_ptr, m, mask=inside)
    tl.store(s_ptr, s, mask=inside)
    tl.store(a_ptr, a, mask=inside)
