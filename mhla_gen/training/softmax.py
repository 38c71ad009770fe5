"""Which of torch's implementations of softmax attention a training may take."""

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

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


def avoid_faulty_softmax(lengths: Collection[int] | None, device: torch.device) -> None:
    """Keep cuDNN's attention out of this process where its backward pass may fault.

    torch prefers cuDNN on Hopper. At a length that is not a multiple of 128, its backward pass has
    ended a training step of FLUX.1 with an illegal memory access (torch 2.11; see also issues
    169849 and 196678 of pytorch).

    Args:
        lengths: Of queries and keys that attend; None if they differ from sample to sample.
        device: Where the model trains.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return
    ragged = lengths is None or any(length % _TILE for length in lengths)
    if ragged and torch.backends.cuda.cudnn_sdp_enabled():
        torch.backends.cuda.enable_cudnn_sdp(False)
        tqdm.write(
            "softmax attention runs without cuDNN, which may fault where the number of tokens is "
            f"not a multiple of {_TILE}"
        )
