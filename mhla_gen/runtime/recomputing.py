"""Activations that are recomputed in the backward pass instead of being stored."""

from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from mhla_gen.runtime.compiling import repeated_blocks


def recompute_activations(model: Any, share: float = 1.0) -> None:
    """Enable gradient checkpointing for the blocks of a diffusers model.

    Where nothing in a block draws random numbers, their state is not kept either: reading it waits
    for the GPU, and cannot be recorded as part of a CUDA graph.

    Args:
        model: Not yet called.
        share: Of the blocks. The first ones are computed again: what the last ones kept is free
            by then.
    """
    names = repeated_blocks(model)
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    kept = set(map(id, blocks[round(share * len(blocks)) :]))
    draw = draws(model)

    def call(block: Any, *args: Any) -> Any:
        if id(block) in kept:
            return block(*args)
        return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=draw)

    model.enable_gradient_checkpointing(call)


def draws(model: nn.Module) -> bool:
    """Whether dropout, of channels or of labels, draws in a model's forward pass when it trains."""
    return any(
        (isinstance(module, nn.Dropout) and module.p > 0) or getattr(module, "dropout_prob", 0) > 0
        for module in model.modules()
    )
