"""How a model is compiled for training, and recorded as CUDA graphs."""

from accelerate import Accelerator
from torch import nn

from mhla_gen.compiling import compile_blocks
from mhla_gen.config import TrainConfig
from mhla_gen.cuda_graphs import RecordedTraining


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
