"""In-place conversion of a model and its reversal, the same for every family."""

import inspect
from dataclasses import replace
from functools import partial
from types import MethodType
from typing import Any

from diffusers.configuration_utils import FrozenDict
from torch import nn

from mhla_gen.config import AttentionConfig, LinformerConfig, MHLAConfig
from mhla_gen.models.additions import AddedAttention
from mhla_gen.models.attention import MHLA
from mhla_gen.models.family import Family
from mhla_gen.models.frame_causal import FrameCausalMHLA
from mhla_gen.models.linformer import Linformer
from mhla_gen.models.settling import exact_layers, mhla_layers, resolve, text_share


def new_modules(family: Family, model: Any, config: AttentionConfig) -> dict[str, AddedAttention]:
    """The new child of each chosen layer, by the layer's name.

    Args:
        family: Family of the model.
        model: Model with the layers and their sizes.
        config: Settings from `resolve`.

    Raises:
        ValueError: If the model does not have the layers that `config` names.
    """
    attentions = family.attentions(model)
    names = [name for name, _ in attentions]
    with_exact = exact_layers(config, names) if isinstance(config, MHLAConfig) else ()
    added: dict[str, AddedAttention] = {}
    owner = None
    for index in mhla_layers(config, names):
        name, attention = attentions[index]
        if isinstance(config, LinformerConfig):
            child = Linformer(*family.sizes(model), config.of_layer(len(added)), owner)
            owner = owner or child
        else:
            kind = MHLA if config.causal_frames is None else FrameCausalMHLA
            reads_text, settings = family.reads_text(attention), config.with_exact()
            if index not in with_exact:
                start = text_share(family, model) if reads_text else None
                settings = replace(config.without_exact(), exact_start=start)
            child = kind(*family.sizes(model), settings, reads_text)
        added[name] = child
    return added


def add_mhla(family: Family, model: Any, config: AttentionConfig) -> None:
    """Add the `mhla` child to the chosen layers; `config` comes from `resolve`."""
    added = new_modules(family, model, config)
    for name, attention in family.attentions(model):
        if name in added:
            child = added[name].train(attention.training)
            attention.mhla = placed_beside(family.output_projection(attention), child)
            swap_processor(attention, family.processors(attention)[1])
        else:
            swap_processor(attention, family.processors(attention)[2])
    for _, attention in family.bystanders(model):
        swap_processor(attention, family.processors(attention)[2])
    for module, _, converted_class in family.replaced(model):
        change_class(module, converted_class)
    settings = {"mhla": config.to_dict(), **family.settings(model)}
    # from_config ignores values marked as defaults, but the mark may come from another class.
    defaults = [k for k in model.config.get("_use_default_values", ()) if k not in settings]
    marks = {"_use_default_values": defaults} if defaults else {}
    kept = {k: v for k, v in model.config.items() if k != "_use_default_values"}
    model._internal_dict = FrozenDict({**kept, **settings, **marks})


def remove_mhla(family: Family, model: Any) -> None:
    """Undo `add_mhla`, including the change of class."""
    for _, attention in family.attentions(model) + family.bystanders(model):
        if hasattr(attention, "mhla"):
            del attention.mhla
        swap_processor(attention, family.processors(attention)[0])
    for module, stock_class, _ in family.replaced(model):
        change_class(module, stock_class)
    softmax_class = family.softmax_class(model)
    added = _argument_names(type(model)) - _argument_names(softmax_class)
    model._internal_dict = FrozenDict({k: v for k, v in model.config.items() if k not in added})
    change_class(model, softmax_class)


def _argument_names(model_class: Any) -> set[str]:
    return set(inspect.signature(model_class.__init__).parameters)


def placed_beside(projection: nn.Module, module: AddedAttention) -> AddedAttention:
    """Give a new module the device and dtype of the layer's output projection; mixing is float32.

    If the projection's weight is quantized, the dtype is that of its bias.
    """
    floating = next((p for p in projection.parameters() if p.is_floating_point()), None)
    module = module.to(computing_device(projection), None if floating is None else floating.dtype)
    if module.mixing is not None:
        module.mixing.data = module.mixing.data.float()
    return module


def computing_device(projection: nn.Module) -> Any:
    """Where a layer computes, also if its weights are offloaded.

    They are then loaded for each call; those that are added are few and stay loaded.
    """
    device, hook = next(projection.parameters()).device, getattr(projection, "_hf_hook", None)
    return hook.execution_device if device.type == "meta" and hook is not None else device


def change_class(module: Any, new_class: Any) -> None:
    """Change a module's class in place, and the `forward` that offloading has wrapped."""
    module.__class__ = new_class
    # accelerate's hooks store the original method.
    if "_old_forward" in vars(module):
        module._old_forward = MethodType(new_class.forward, module)


def swap_processor(attention: Any, processor_class: type) -> None:
    """Set a stateless processor, keeping the layer's attention backend."""
    processor = processor_class()
    # set_attention_backend selects the kernels of softmax layers through this attribute.
    if hasattr(processor, "_attention_backend"):
        processor._attention_backend = getattr(attention.processor, "_attention_backend", None)
    # Some layers of diffusers have no method for it.
    getattr(attention, "set_processor", partial(setattr, attention, "processor"))(processor)


def become(family: Family, mhla_class: type, model: Any, config: AttentionConfig) -> Any:
    """Turn a base model into its MHLA class in place; all checks come first."""
    resolved = resolve(family, model, config)
    change_class(model, mhla_class)
    add_mhla(family, model, resolved)
    return model
