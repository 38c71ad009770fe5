"""SHA-256 of files, tensors and settings, which identify cached results."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_BLOCK_BYTES = 1 << 20


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weights_digest(model: nn.Module, dtype: torch.dtype) -> str:
    """SHA-256 of a model's weights as `dtype` holds them, whatever the dtype they are in now."""
    return tensors_digest({name: tensor.to(dtype) for name, tensor in model.state_dict().items()})


def settings_digest(settings: Mapping[str, Any]) -> str:
    """SHA-256 over plain values."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
