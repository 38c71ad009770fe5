"""LoRA beside MHLA: read it from a model, add it to another, remove it."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from mhla_gen.errors import UserError

_NAME = "mhla_adapter"
"""Name in peft of an adapter's LoRA; others may be loaded beside it."""
_SETTINGS = (
    "r",
    "lora_alpha",
    "target_modules",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
)


def lora_of(model: Any) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """Settings and weights of a model's LoRA.

    Raises:
        ValueError: If the model has several, or its LoRA trains biases.
    """
    configs = getattr(model, "peft_config", None) or {}
    if not configs:
        return None, {}
    if len(configs) > 1:
        raise UserError(
            f"an adapter can have one LoRA, found {', '.join(configs)}; "
            "delete_adapters removes the others"
        )
    from peft import get_peft_model_state_dict

    ((name, config),) = configs.items()
    if config.bias != "none":
        raise UserError(f"an adapter can only have LoRA without biases, found bias={config.bias!r}")
    settings = {key: getattr(config, key) for key in _SETTINGS}
    targets = settings["target_modules"]
    settings["target_modules"] = targets if isinstance(targets, str) else sorted(targets)
    return settings, get_peft_model_state_dict(model, adapter_name=name)


def check_lora(
    path: Path, model: Any, settings: dict[str, Any] | None, tensors: Mapping[str, Tensor]
) -> None:
    """Check that a model can take a LoRA.

    Raises:
        ValueError: If peft is not installed, a layer is missing or has a different size, or the
            model's weights are offloaded one by one.
    """
    if settings is None:
        return
    if find_spec("peft") is None:
        raise UserError(f"{path} contains a LoRA, which needs the package peft: pip install peft")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UserError(f"{path} contains a LoRA; load it before weights are offloaded")
    layers = dict(model.named_modules())
    for name, tensor in tensors.items():
        layer, found, _ = name.partition(".lora_A.")
        if found and getattr(layers.get(layer), "in_features", None) != tensor.shape[1]:
            raise UserError(
                f"{path} holds a LoRA for {layer} with {tensor.shape[1]} channels, which the model "
                "does not have"
            )


def add_lora_weights(
    model: Any, settings: dict[str, Any] | None, tensors: Mapping[str, Tensor]
) -> None:
    """Add a LoRA that passed `check_lora` to a model; other weights train as before."""
    if settings is None:
        return
    from peft import LoraConfig, set_peft_model_state_dict

    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    model.add_adapter(LoraConfig(**settings), adapter_name=_NAME)
    state = {name: tensor for name, tensor in tensors.items() if ".lora_" in name}
    set_peft_model_state_dict(model, state, adapter_name=_NAME)
    # Adding it, peft has frozen all other weights.
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained.get(name.replace(".base_layer.", "."), True))


def remove_lora(model: Any) -> None:
    """Remove the LoRA of an adapter, if there is one; others stay."""
    configs = getattr(model, "peft_config", None) or {}
    if _NAME not in configs:
        return
    if len(configs) == 1:
        model.unload_lora()
    else:
        model.delete_adapters([_NAME])
