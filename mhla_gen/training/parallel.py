"""Several processes: replicas of the model (DDP) or shards (FSDP2), through accelerate."""

import copy
import os
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    ProjectConfiguration,
    convert_outputs_to_fp32,
    is_tensorboard_available,
    is_wandb_available,
)
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from mhla_gen.config import TrainConfig
from mhla_gen.errors import UserError

# Gradients stay in the buckets that travel: half as much to copy and to launch. Buffers of
# transformers are tables, the same everywhere.
_REPLICATION = DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)

# Modules whose parts are gathered before their turn: two hide a transfer of twice the time that a
# module computes, and take the memory of their whole weights.
_AHEAD = 2

# The share of a GPU's memory that whole weights may take from the forward to the backward pass.
_KEPT_WHOLE = 1 / 8


def check_tracker(config: TrainConfig) -> None:
    """Raise unless the package that `report_to` names is installed.

    Raises:
        ValueError: Naming it.
    """
    available = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}
    if config.report_to != "none" and not available[config.report_to]():
        # accelerate would silently leave it out.
        raise UserError(
            f"report_to={config.report_to} needs the package {config.report_to}; install it, or "
            "use report_to=none"
        )


def build_accelerator(config: TrainConfig) -> Accelerator:
    """Accelerate's state for a run.

    Raises:
        ValueError: If parts of a model are asked for on one process, or with FSDP's first version,
            a tracker is not installed, or the processes that were started do not know each other.
    """
    check_tracker(config)
    # accelerate's own name for float32 is "no", which YAML reads as false.
    precision = "no" if config.mixed_precision == "fp32" else config.mixed_precision
    sharded = config.parallelism == "fsdp"
    accelerator = Accelerator(
        mixed_precision=precision,
        log_with=None if config.report_to == "none" else config.report_to,
        project_config=ProjectConfiguration(config.output_dir, logging_dir=config.output_dir),
        fsdp_plugin=_sharding_plugin() if sharded else None,
        kwargs_handlers=[_REPLICATION],
    )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        # Each would train alone, and all of them write into one folder.
        raise UserError(
            f"{started} processes were started but accelerate sees {accelerator.num_processes}; "
            "without GPUs, set ACCELERATE_USE_CPU=1 and start them with torchrun"
        )
    if sharded and accelerator.num_processes == 1:
        raise UserError(
            "parallelism=fsdp splits a model among processes, found only one; start several with "
            "`accelerate launch train/train.py CONFIG.yaml`, or use parallelism=ddp"
        )
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise UserError("accelerate is configured for FSDP 1; set fsdp_version to 2")
    if sharded and accelerator.device.type == "cpu":
        # accelerate shards on accelerators only, PyTorch anywhere: this is how the tests run it.
        accelerator.state.fsdp_plugin = _sharding_plugin()
        for state in (accelerator.state, PartialState()):
            state.distributed_type = DistributedType.FSDP
    return accelerator


def _sharding_plugin() -> FullyShardedDataParallelPlugin:
    # accelerate reads the version from here before it looks at the argument.
    os.environ["FSDP_VERSION"] = "2"
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        # Autocast chooses the arithmetic, as without sharding: the same numbers either way.
        mixed_precision_policy=MixedPrecisionPolicy(),
    )


def shard_by(accelerator: Accelerator, model: nn.Module, names: Sequence[str]) -> None:
    """Say which modules of a model are gathered one at a time, where it is shared.

    Args:
        accelerator: Of the run.
        model: Not yet prepared.
        names: Classes; those that the model does not have are left out.
    """
    if accelerator.is_fsdp2:
        found = {type(module).__name__ for module in model.modules()}
        plugin: Any = accelerator.state.fsdp_plugin
        plugin.transformer_cls_names_to_wrap = [name for name in names if name in found]


def keep_gathered(accelerator: Accelerator, model: Any, names: Sequence[str]) -> None:
    """Leave modules of a shared model whole between their forward and their backward pass.

    If the whole weights are small beside the memory, all modules stay whole. This spares the host,
    which FSDP2 keeps busy, the second gathering of each step.

    Args:
        accelerator: Of the run.
        model: Prepared.
        names: Those of its blocks that stay whole in any case.
    """
    if not accelerator.is_fsdp2:
        return
    kept = [model.get_submodule(name) for name in names]
    if has_room(accelerator.device, model):
        kept = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in kept:
        module.set_reshard_after_forward(False, recurse=False)


def has_room(device: torch.device, model: nn.Module) -> bool:
    """Whether the whole weights of a model take a small part of a device's memory."""
    if device.type != "cuda":
        return False
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return weights <= _KEPT_WHOLE * torch.cuda.get_device_properties(device).total_memory


def gather_ahead(accelerator: Accelerator, model: Any) -> None:
    """Gather the parts of the next modules of a shared model while one computes, in both passes.

    By itself FSDP2 asks for those of a module when the host comes to launch it, and in the backward
    pass for those of one module ahead. A busy host, or a module with little work, then waits.

    Args:
        accelerator: Of the run.
        model: Prepared; its modules are called in the order in which it has them.
    """
    if not accelerator.is_fsdp2:
        return
    root, *modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    root.set_modules_to_forward_prefetch(modules[:_AHEAD])
    root.set_modules_to_backward_prefetch(modules[: -_AHEAD - 1 : -1])
    for number, module in enumerate(modules):
        after, before = modules[number + 1 :], modules[:number][::-1]
        module.set_modules_to_forward_prefetch(after[:_AHEAD])
        module.set_modules_to_backward_prefetch(before[:_AHEAD])


def autocast_shared(accelerator: Accelerator, model: Any) -> None:
    """Compute a shared model in the run's arithmetic, which accelerate does for others only."""
    if accelerator.is_fsdp2 and accelerator.mixed_precision == "bf16":
        autocast = torch.autocast(accelerator.device.type, torch.bfloat16)
        model.forward = convert_outputs_to_fp32(autocast(model.forward))


def without_weights(model: nn.Module) -> nn.Module:
    """A copy of a model whose parameters have a shape only.

    With adapters and all else that its config does not tell: `load_state_dict(…, assign=True)`
    makes a whole model of it.
    """
    shapes = {
        id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()
    }
    return copy.deepcopy(model, shapes)


def free_whole(model: nn.Module) -> None:
    """Leave each process its parts alone, of a model that was called without a backward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """The weights of a model on the CPU; every process must call this.

    Args:
        model: Shared among processes, or not.
        keep: Whether this process gets them; nothing otherwise.
    """
    state = {}
    for name, tensor in model.state_dict().items():
        gathered = whole(tensor)
        if keep:
            state[name] = gathered.cpu()
    return state
