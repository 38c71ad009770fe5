"""Which of torch's implementations of softmax attention a training may take."""

from collections.abc import Collection

import torch
from tqdm import tqdm

from mhla_gen.runtime.softmax_kernels import cudnn_fault, leave_out_cudnn


def avoid_faulty_softmax(lengths: Collection[int] | None, kinds: int, device: torch.device) -> None:
    """Keep cuDNN's attention out of this process where its backward pass may fault.

    Args:
        lengths: See `cudnn_fault`, like all other arguments.
        kinds: Kinds of blocks.
        device: Where the model trains.
    """
    reason = cudnn_fault(lengths, kinds, device)
    if reason is not None and torch.backends.cuda.cudnn_sdp_enabled():
        leave_out_cudnn()
        tqdm.write(f"softmax attention runs without cuDNN, which may fault where {reason}")
