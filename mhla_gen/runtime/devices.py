"""Which device a command runs on, and how."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mhla_gen.errors import UserError


def resolve_device(name: str) -> torch.device:
    """The device for a config's `device`.

    Args:
        name: auto (a GPU if there is one), cpu or cuda.

    Raises:
        ValueError: If PyTorch finds no CUDA device but one is asked for.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("device=cuda but PyTorch finds no CUDA device; use device=auto")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def device_name(device: torch.device | None = None) -> str:
    """What computed a result: the name of the GPU, or the kind of processor.

    Args:
        device: None takes a GPU if there is one.
    """
    device = device or resolve_device("auto")
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}"


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a CPU tensor to a device.

    To a GPU it goes through pinned memory: a plain copy would wait until the GPU has done all that
    was asked of it before, which then has nothing to do until the next kernels are launched.
    """
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@contextmanager
def without_onednn() -> Iterator[None]:
    """No oneDNN on a CPU inside: the sums of its convolutions depend on the number of threads.

    A VAE decodes more slowly so, but the same with one thread and with many. Transformers have no
    such convolutions.
    """
    backend = torch.backends.mkldnn
    before = backend.enabled
    try:
        backend.enabled = False
        yield
    finally:
        backend.enabled = before


@contextmanager
def repeatable_convolutions() -> Iterator[None]:
    """Convolutions on a GPU add in a fixed order inside, and are not chosen by timing."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    try:
        cudnn.benchmark, cudnn.deterministic = False, True
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before
