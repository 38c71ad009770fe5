"""Activations that are computed again in the backward pass, in place of being kept."""

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute_activations(model: Any) -> None:
    """Switch gradient checkpointing on, for the blocks of a diffusers model.

    Where nothing in a block draws random numbers, their state is not kept either: reading it waits
    for the GPU, and cannot be recorded as part of a CUDA graph.
    """
    model.enable_gradient_checkpointing(
        partial(checkpoint, use_reentrant=False, preserve_rng_state=draws(model))
    )


def draws(model: nn.Module) -> bool:
    """Whether dropout, of channels or of labels, draws in a model's forward pass when it trains."""
    return any(
        (isinstance(module, nn.Dropout) and module.p > 0) or getattr(module, "dropout_prob", 0) > 0
        for module in model.modules()
    )
