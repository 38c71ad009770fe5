"""Which of torch's implementations of softmax attention a training may take."""

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from mhla_gen.runtime.softmax_kernels import leave_out_cudnn

# Queries or keys in a tile of cuDNN's kernels for Hopper.
_TILE = 128


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


def avoid_faulty_softmax(lengths: Collection[int] | None, kinds: int, device: torch.device) -> None:
    """Keep cuDNN's attention out of this process where its backward pass may fault.

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
        return
    reason = None
    if lengths is None or any(length % _TILE for length in lengths):
        reason = f"the number of tokens may not be a multiple of {_TILE}"
    elif lengths and kinds > 1:
        reason = "blocks of several kinds attend"
    if reason is not None and torch.backends.cuda.cudnn_sdp_enabled():
        leave_out_cudnn()
        tqdm.write(f"softmax attention runs without cuDNN, which may fault where {reason}")
