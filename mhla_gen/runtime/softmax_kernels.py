"""Kernels that torch's softmax attention may run on, in compiled code as well.

torch chooses among them while it compiles, and keeps what it compiled on disk, for other processes
too, under a key that does not say which ones were allowed (torch 2.11 and 2.14). So compiled code
could bring a kernel back that is not allowed any more. Here the key gets a tag that says so.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

compile_settings: Any = torch.compiler.config


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


def _tag(*words: str) -> str:
    """These words, after a tag that a user may have set."""
    return " ".join((compile_settings.cache_key_tag, *words)).strip()
