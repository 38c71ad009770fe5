"""torch.compile for a transformer: its blocks, which are alike, or the whole of it."""

from typing import Any

import torch
from torch import Tensor, nn


def repeated_blocks(model: nn.Module) -> tuple[str, ...]:
    """Names of the classes of the blocks that a transformer repeats.

    Those that diffusers has for it, or else the class that the largest list of modules is of.

    Raises:
        ValueError: If it has no list of blocks.
    """
    named = getattr(model, "_repeated_blocks", None)
    if named:
        return tuple(named)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    lists = [blocks for blocks in lists if len({type(block) for block in blocks}) == 1]
    if not lists:
        raise ValueError(f"{type(model).__name__} repeats no blocks")
    largest = max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))
    return (type(largest[0]).__name__,)


def compile_model(model: nn.Module, how: str) -> None:
    """Compile a model in place; its parameters keep their names.

    Args:
        model: A transformer.
        how: none; regional, each of its blocks, which compile once for all; or whole.
    """
    if how == "whole":
        model.compile()
    elif how == "regional":
        compile_blocks(model)


def compile_blocks(model: nn.Module) -> None:
    """Compile the blocks of a transformer in place, each class once for all of its blocks.

    Raises:
        ValueError: If it repeats none.
    """
    for name in repeated_blocks(model):
        blocks = [module for module in model.modules() if type(module).__name__ == name]
        for block in blocks:
            # What FSDP2 hooks to a block then runs around the compiled code, not inside.
            block.forward = torch.compile(block.forward, fullgraph=True)
        for block in blocks[:1]:
            block.register_forward_pre_hook(_dense)


def _dense(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The first block's tokens as those of the others lie: in patch order they are transposed.

    Otherwise all would be compiled a second time for the first.
    """
    return tuple(x.contiguous() if isinstance(x, Tensor) else x for x in args[:1]) + args[1:]
