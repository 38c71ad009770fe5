"""torch.compile for a transformer: its blocks, which are alike, or the whole; and CUDA graphs."""

import torch
from accelerate import Accelerator
from torch import nn

from mhla_gen.config import TrainConfig
from mhla_gen.cuda_graphs import RecordedTraining


def block_class(model: nn.Module) -> str:
    """Name of the class of the blocks that a transformer repeats.

    Raises:
        ValueError: If it has no list of blocks.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    lists = [blocks for blocks in lists if len({type(block) for block in blocks}) == 1]
    if not lists:
        raise ValueError(f"{type(model).__name__} repeats no blocks")
    largest = max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))
    return type(largest[0]).__name__


def compile_model(model: nn.Module, how: str) -> None:
    """Compile a model in place; its parameters keep their names.

    Args:
        model: A transformer.
        how: none; regional, each of its blocks, which compile once for all; or whole.
    """
    if how == "whole":
        model.compile()
    elif how == "regional":
        name = block_class(model)
        for module in model.modules():
            if type(module).__name__ == name:
                # What FSDP2 hooks to a block then runs around the compiled code, not inside.
                module.forward = torch.compile(module.forward, fullgraph=True)


def record_passes(accelerator: Accelerator, model: nn.Module, config: TrainConfig) -> None:
    """Record a DiT's forward and backward pass as CUDA graphs, where `cuda_graphs` can have it.

    A Wan has work enough for each launch, and clips of several shapes.

    Args:
        accelerator: Of the run.
        model: Prepared by it; called once a step, and in a way that does not change.
        config: Settings.
    """
    if (
        config.cuda_graphs
        and config.compile == "regional"
        and config.wan is None
        and config.gradient_accumulation_steps == 1
        and not config.gradient_checkpointing
        and accelerator.device.type == "cuda"
        and accelerator.num_processes == 1
    ):
        own = accelerator.unwrap_model(model)
        own.forward = RecordedTraining(own, own.forward)
