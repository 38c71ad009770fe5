"""Context parallelism: processes share the tokens of every sequence.

diffusers splits the sequence before the first block and joins it after the last. Its softmax layers
run ring or Ulysses attention; MHLA layers sum their block summaries over all processes
(`mhla_gen.ops.sharded`).

**Training.** Every process has the whole output and computes the whole loss, but receives gradients
of its own tokens only. So the gradient of every weight, mixing included, is the *sum* over the
processes. DDP and FSDP average over all processes: multiply the loss by the number of processes
that share a sequence to correct for that. Without either, call `sum_gradients` before the
optimizer's step.
"""

from typing import Any

import torch.distributed as dist
from diffusers import TensorParallelConfig
from torch import nn

from mhla_gen.config import AttentionConfig
from mhla_gen.models.family import Family


def sequence_group(parallel_config: Any) -> Any:
    """The group that shares a sequence, from a processor's parallel settings; None if none."""
    if parallel_config is None:
        return None
    return parallel_config.context_parallel_config._flattened_mesh.get_group()


def check_parallelism(family: Family, settings: AttentionConfig, config: Any) -> None:
    """Check that MHLA layers of a family support the parallelism of `config`.

    Args:
        family: Family of the model.
        settings: MHLA settings of the model.
        config: Argument of `enable_parallelism`.

    Raises:
        NotImplementedError: If a rank would attend only to its own tokens or heads.
    """
    tensor_parallel = getattr(config, "tensor_parallel_config", None) is not None
    if tensor_parallel or isinstance(config, TensorParallelConfig):
        raise NotImplementedError(
            "MHLA layers have no tensor parallelism: mixing and convolution would keep all heads; "
            "use ContextParallelConfig, or call mhla_gen.restore(model) first"
        )
    if not family.shares_sequences:
        raise NotImplementedError(
            f"MHLA layers of {family.base_class.__name__} cannot share a sequence: a rank would "
            "sum its own tokens only; call mhla_gen.restore(model) first, or run on one device"
        )
    if settings.unshared:
        raise NotImplementedError(
            f"layers with {settings.unshared} cannot share a sequence: other ranks would "
            "hold keys that they read; use plain MHLA, one device, or mhla_gen.restore(model) first"
        )


def sum_gradients(model: nn.Module, group: Any = None) -> None:
    """Sum gradients of all parameters over the processes that share sequences, in place.

    A gradient missing on one process counts as zero if another process may have it.

    Args:
        model: The model, the same on every process.
        group: The process group; all processes by default.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = parameter.new_zeros(parameter.shape)
            dist.all_reduce(parameter.grad, group=group)
