"""Which device a command runs on."""

import torch


def resolve_device(name: str) -> torch.device:
    """The device that a config's `device` means.

    Args:
        name: auto (a GPU if there is one), cpu or cuda.

    Raises:
        ValueError: If PyTorch finds no CUDA device but one is asked for.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError("device=cuda but PyTorch finds no CUDA device; use device=auto")
    return torch.device("cuda" if available and name != "cpu" else "cpu")
