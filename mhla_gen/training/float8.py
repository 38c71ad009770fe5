"""8-bit products in training, through torchao."""

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from mhla_gen.errors import UserError

# Feed-forward layers of all families, two thirds of a transformer's products. Embeddings of a time
# or a class have too few rows, and the one product of queries, keys and values keeps its precision.
_FEED_FORWARD = ("ff", "ffn", "feed_forward", "img_mlp", "proj_mlp")
# What cuBLAS asks of both sides of a matrix of 8 bits.
_MULTIPLE = 16
_CAPABILITY = (8, 9)


def require_float8() -> None:
    """Check that 8-bit products are available.

    Raises:
        UserError: If not.
    """
    if find_spec("torchao") is None:
        raise UserError(
            "float8=true needs the package torchao; pip install 'mhla_gen[float8]', or use "
            "float8=false"
        )
    if not torch.cuda.is_available():
        raise UserError("float8=true needs a GPU with products of 8 bits, found none")
    if torch.cuda.get_device_capability() < _CAPABILITY:
        raise UserError(
            f"float8=true needs a GPU with products of 8 bits (compute capability 8.9 or more), "
            f"found {torch.cuda.get_device_name()}; use float8=false"
        )


def use_float8(model: nn.Module, **config: Any) -> int:
    """Let the feed-forward layers of a model multiply in 8 bits, in place.

    Inputs, weights and gradients are rounded with one scale a tensor for each product; weights stay
    float32 and keep their names, so that checkpoints are the same.

    Args:
        model: Not yet compiled.
        config: Of `torchao.float8.Float8LinearConfig`; its defaults otherwise.

    Returns:
        How many layers.

    Raises:
        UserError: If the model has none that can.
    """
    from torchao.float8 import (  # pyright: ignore[reportMissingImports]
        Float8LinearConfig,
        convert_to_float8_training,
    )

    chosen = []

    def choose(module: nn.Module, name: str) -> bool:
        fits = (
            type(module) is nn.Linear
            and any(part in _FEED_FORWARD for part in name.split("."))
            and module.in_features % _MULTIPLE == 0
            and module.out_features % _MULTIPLE == 0
        )
        chosen.extend([name] if fits else [])
        return fits

    # The gradient of a weight is a sum over tokens, of which there may be any number.
    settings = Float8LinearConfig(pad_inner_dim=True, **config)
    convert_to_float8_training(model, module_filter_fn=choose, config=settings)
    if not chosen:
        raise UserError(
            f"float8=true finds no feed-forward layer of a {type(model).__name__} whose sizes are "
            f"multiples of {_MULTIPLE}; use float8=false"
        )
    return len(chosen)
