"""Kernels that torch's softmax attention may run on, in compiled code as well.

torch chooses among them while it compiles, and keeps what it compiled on disk, for other processes
too, under a key that does not say which ones were allowed (torch 2.11 and 2.14). So compiled code
could bring a kernel back that is not allowed any more. Here the key gets a tag that says so.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

compile_settings: Any = torch.compiler.config

# Queries or keys in a tile of cuDNN's kernels for Hopper.
_TILE = 128


@contextmanager
def softmax_on(*kernels: SDPBackend) -> Iterator[None]:
    """Let softmax attention run on these kernels alone, inside."""
    tag = _tag("softmax on", *(kernel.name for kernel in kernels))
    with sdpa_kernel([*kernels]), compile_settings.patch(cache_key_tag=tag):
        yield


def leave_out_cudnn() -> None:
    """Keep softmax attention off cuDNN's kernels in this process, from now on."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    compile_settings.cache_key_tag = _tag("softmax without cuDNN")


class AttentionLengths(TorchFunctionMode):
    """Collects the lengths of queries and keys of softmax attention that runs in this context."""

    def __init__(self):
        super().__init__()
        self.found: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = dict(zip(("query", "key"), args, strict=False)) | (kwargs or {})
        if func is F.scaled_dot_product_attention:
            self.found |= {given[name].shape[-2] for name in ("query", "key")}
        return func(*args, **(kwargs or {}))


def cudnn_fault(lengths: Collection[int] | None, kinds: int, device: torch.device) -> str | None:
    """Where the backward pass of cuDNN's attention may fault in a model, or None.

    torch prefers cuDNN on Hopper. If a model has several kinds of blocks, as FLUX has, one of them
    may run the plan that torch keeps for another; see `ops.softmax.with_contiguous_gradient`, which
    stock layers lack. At lengths that are not multiples of 128, others report faults and wrong
    gradients (issues 169849 and 196678 of pytorch).

    Args:
        lengths: Of queries and keys that attend by softmax; none if no layer does, None if they
            differ from sample to sample or are not known.
        kinds: How many kinds of blocks the model repeats.
        device: Where the model trains.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return None
    if lengths is None or any(length % _TILE for length in lengths):
        return f"the number of tokens may not be a multiple of {_TILE}"
    return "blocks of several kinds attend" if lengths and kinds > 1 else None


def _tag(*words: str) -> str:
    """These words, after a tag that a user may have set."""
    return " ".join((compile_settings.cache_key_tag, *words)).strip()
