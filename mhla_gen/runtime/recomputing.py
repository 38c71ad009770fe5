"""Activations that are recomputed in the backward pass instead of being stored."""

import math
from collections.abc import Callable
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from mhla_gen.runtime.compiling import repeated_blocks


def recompute_activations(model: Any, share: float | str = 1.0) -> None:
    """Enable gradient checkpointing for the blocks of a diffusers model.

    It is part of a block's own forward pass, so that a block that is compiled later computes again
    only what its gradients need. Where nothing in a block draws random numbers, their state is not
    kept either: reading it waits for the GPU, and cannot be recorded as part of a CUDA graph.

    Args:
        model: Not yet called or compiled.
        share: Of the blocks. The first ones are computed again: what the last ones kept is free
            by then. "selective" for all blocks but their costly outputs, see `worth_keeping`.
    """
    names = repeated_blocks(model)
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": draws(model)}
    if share == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
        share = 1.0
    functions: dict[int, FunctionType] = {}
    for block in blocks[: round(float(share) * len(blocks))]:
        forward = getattr(block.forward, "__func__", None)
        if forward is None:
            block.forward = partial(_computed_again, block.forward, options)
            continue
        # Blocks of a class share a function, so that they also share what is compiled.
        if id(forward) not in functions:
            functions[id(forward)] = _method(forward, options)
        block.forward = MethodType(functions[id(forward)], block)
    ours = set(map(id, blocks))

    def call(block: Any, *args: Any) -> Any:
        return block(*args) if id(block) in ours else checkpoint(block, *args, **options)

    model.enable_gradient_checkpointing(call)


def _method(forward: FunctionType, options: dict[str, Any]) -> Any:
    def computed_again(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Dynamo makes no bound methods.
        def own(*given: Any, **named: Any) -> Any:
            return forward(self, *given, **named)

        return _computed_again(own, options, *args, **kwargs)

    return computed_again


def _computed_again(
    forward: Callable[..., Any], options: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, **options, **kwargs)


def _policy(_context: Any, operator: Any, *args: Any, **_kwargs: Any) -> CheckpointPolicy:
    if worth_keeping(operator, args):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def worth_keeping(operator: Any, args: tuple[Any, ...]) -> bool:
    """Whether the output of an operator takes long to compute for its size.

    These are outputs whose elements take more multiplications than a token has channels: softmax on
    many keys, and products that make tokens narrower, such as the last one of a feed-forward layer.
    """
    name = operator.name().partition(".")[0] if hasattr(operator, "name") else ""
    if name in ("aten::mm", "aten::addmm", "aten::_scaled_mm"):
        left, right = args[1:3] if name == "aten::addmm" else args[:2]
        return left.shape[-1] > right.shape[-1]
    if name.startswith("aten::_scaled_dot_product_"):
        query, key = args[:2]
        return 2 * key.shape[2] > query.shape[1] * query.shape[3]
    if name == "mhla_gen::tile_attend":
        query, (tiles, _, reach, _, top) = args[0], args[9:14]
        keys = query.shape[1] * (math.prod(reach) + top) / math.prod(tiles)
        return 2 * keys > query.shape[2] * query.shape[3]
    return False


def draws(model: nn.Module) -> bool:
    """Whether dropout, of channels or of labels, draws in a model's forward pass when it trains."""
    return any(
        (isinstance(module, nn.Dropout) and module.p > 0) or getattr(module, "dropout_prob", 0) > 0
        for module in model.modules()
    )
