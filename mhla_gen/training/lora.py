"""Low-rank updates of a pretrained transformer, beside what MHLA adds to it."""

import copy
from typing import Any

from mhla_gen.config.model import LoraSettings
from mhla_gen.errors import UserError
from mhla_gen.training.optim import train_only_mhla


def add_lora(model: Any, config: LoraSettings) -> None:
    """Freeze a model except for low-rank updates of its linear layers and what MHLA added.

    Args:
        model: A transformer of diffusers that takes adapters.
        config: Rank, scale and layers.

    Raises:
        ValueError: If peft is not installed, or no layer has one of the names.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise UserError("model.trainable=lora needs the package peft: pip install peft") from error
    if not hasattr(model, "add_adapter"):
        raise UserError(
            f"a {type(model).__name__} takes no adapters; leave model.trainable=lora out"
        )
    targets = list(config.lora_targets)
    ends = tuple(f".{target}" for target in targets)
    if not any(name.endswith(ends) for name, _ in model.named_modules()):
        raise UserError(f"lora_targets {targets} name no layer of a {type(model).__name__}")
    alpha = config.lora_rank if config.lora_alpha is None else config.lora_alpha
    rank = config.lora_rank
    settings: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "target_modules": targets}
    model.add_adapter(LoraConfig(**settings))
    # peft has frozen everything else.
    train_only_mhla(model)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.requires_grad_(True)


def merged(model: Any) -> Any:
    """A copy with updates added to the weights, as a model without adapters."""
    model = copy.deepcopy(model)
    model.fuse_lora()
    model.unload_lora()
    return model
