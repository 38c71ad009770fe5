"""In-place conversion of a model and its reversal, the same for every family."""

import inspect
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from types import MethodType
from typing import Any

from diffusers.configuration_utils import FrozenDict
from torch import nn

from mhla_gen.config import AttentionConfig, LinformerConfig, MHLAConfig
from mhla_gen.errors import UserError
from mhla_gen.models.additions import AddedAttention
from mhla_gen.models.attention import CONVERTED_START, MHLA, NEW_START
from mhla_gen.models.exact import exact_share
from mhla_gen.models.family import Family
from mhla_gen.models.features import WHOLE_HEAD_MAPS
from mhla_gen.models.frame_causal import FrameCausalMHLA
from mhla_gen.models.linformer import Linformer
from mhla_gen.ops import FEATURE_MAPS, auto_layout, resolve_implementation


def mhla_layers(config: AttentionConfig, names: Sequence[str]) -> tuple[int, ...]:
    """Indices of the layers that `config.layers` converts.

    A fraction `a/b` keeps the first `b - a` of every `b` layers softmax.

    Args:
        config: Settings.
        names: Names of all self-attention layers of a model, in order.

    Raises:
        ValueError: If an index is too large, or no layer is left to convert.
    """
    return _chosen(config.key("layers"), config.layers, names)


def exact_layers(config: MHLAConfig, names: Sequence[str]) -> tuple[int, ...]:
    """Indices of the layers with an exact half, as `mhla_layers`."""
    setting = config.key("exact_layers")
    chosen = _chosen(setting, config.exact_layers, names)
    if not set(chosen) & set(mhla_layers(config, names)):
        raise UserError(f"{setting} names none of the layers that are converted")
    return chosen


def _chosen(setting: str, layers: Any, names: Sequence[str]) -> tuple[int, ...]:
    num_layers = len(names)
    if layers == "all":
        return tuple(range(num_layers))
    if callable(layers):
        chosen = tuple(i for i, name in enumerate(names) if layers(i, name))
        if not chosen:
            raise UserError(f"the function in {setting} chooses none of {num_layers} layers")
        return chosen
    if isinstance(layers, str):
        part, whole = map(int, layers.split("/"))
        chosen = tuple(i for i in range(num_layers) if i % whole >= whole - part)
        if not chosen:
            raise UserError(f"{setting}={layers!r} chooses none of {num_layers} layers")
        return chosen
    if max(layers) >= num_layers:
        raise UserError(
            f"{setting}={list(layers)} names layer {max(layers)}, but the model has layers 0 to "
            f"{num_layers - 1}"
        )
    return layers


def resolve(
    family: Family, model: Any, config: AttentionConfig, new: bool = False
) -> AttentionConfig:
    """Check a config against a model and resolve the settings that it leaves open.

    Args:
        family: Family of the model.
        model: The unconverted model.
        config: Settings.
        new: Whether the model's weights are new; a pretrained model is disturbed as little as
            possible.

    Returns:
        Settings with block counts for `layout="auto"`, token counts for `grid="auto"`, indices for
        a function in `layers` or `exact_layers`, and a number for `exact_start`.

    Raises:
        ValueError: If layers, rank, layout or processors do not fit the model, or the feature map
            or implementation does not exist.
    """
    for name, attention in family.attentions(model) + family.bystanders(model):
        known = family.processors(attention)
        if type(attention.processor) not in known:
            raise UserError(
                f"{name} has the processor {type(attention.processor).__name__}, which MHLA would "
                f"drop; set {known[0].__name__} first"
            )
        if getattr(attention.processor, "_parallel_config", None) is not None:
            raise UserError(f"{name} is context-parallel; convert before enable_parallelism")
    return settle(family, model, config, new)


def settle(
    family: Family, model: Any, config: AttentionConfig, new: bool = False
) -> AttentionConfig:
    """`resolve` without the processors, which only diffusers' layers have."""
    names = [name for name, _ in family.attentions(model)]
    layers = mhla_layers(config, names)
    if callable(config.layers):
        config = replace(config, layers=layers)
    if isinstance(config, LinformerConfig):
        return _resolve_linformer(family, model, config, len(layers))
    exact = exact_layers(config, names)
    if set(layers) <= set(exact):
        # Refuses settings of MHLA that no layer could use.
        config = replace(config, exact_layers="all")
    elif callable(config.exact_layers):
        config = replace(config, exact_layers=exact)
    return _resolve_mhla(family, model, config, new)


def _resolve_linformer(
    family: Family, model: Any, config: LinformerConfig, num_layers: int
) -> LinformerConfig:
    if config.grid == "auto":
        config = replace(config, grid=family.native_grid(model))
    by_layer = config.projected_len_by_layer
    if by_layer is not None and len(by_layer) != num_layers:
        raise UserError(
            f"{config.key('projected_len_by_layer')} needs an entry for each of {num_layers} "
            f"converted layers, found {len(by_layer)}"
        )
    _check_rank(family, config.key("grid"), config.grid)
    for layer in map(config.of_layer, range(num_layers)):
        if layer.by_axis:
            _check_rank(family, config.key("projected_len"), layer.projected)
        if any(k > n for k, n in zip(layer.projected, layer.lengths, strict=True)):
            raise UserError(
                f"{config.key('projected_len')}={layer.projected_len} is more than the tokens of "
                f"the grid {config.grid} that it projects; take at most "
                f"{layer.lengths if layer.by_axis else layer.lengths[0]}"
            )
    return config


def _check_rank(family: Family, name: str, value: tuple[int, ...]) -> None:
    if len(value) != family.rank:
        raise UserError(
            f"{family.base_class.__name__} has a {family.rank}-D token grid, so {name} needs "
            f"{family.rank} entries, found {value}"
        )


def _resolve_mhla(family: Family, model: Any, config: MHLAConfig, new: bool) -> MHLAConfig:
    config = _settle_start(family, model, config, new)
    resolve_implementation(config.implementation)
    names = (*FEATURE_MAPS, *WHOLE_HEAD_MAPS)
    if config.feature_map not in names:
        raise UserError(
            f"{config.key('feature_map')} must be one of {', '.join(names)}, found "
            f"{config.feature_map!r}"
        )
    grid = family.native_grid(model)
    for name in ("exact_tile", "exact_group", "exact_window"):
        value = getattr(config, name)
        if value is not None:
            _check_rank(family, config.key(name), value)
    if config.exact > 0 and exact_share(config, grid) == 0:
        raise UserError(
            f"{config.key('exact_window')} and exact_top leave no exact pair on the model's token "
            f"grid {grid}; give one of them more tiles"
        )
    if config.causal_frames is not None and not family.frame_causal:
        raise UserError(
            f"{config.key('causal_frames')} is for Wan's text-to-video transformers, found a "
            f"{type(model).__name__}"
        )
    if config.layout == "auto":
        chunks = None if config.causal_frames is None else -(-grid[0] // config.causal_frames)
        return replace(config, layout=auto_layout(grid, chunks))
    _check_rank(family, config.key("layout"), config.layout)
    if any(count > length for count, length in zip(config.layout, grid, strict=True)):
        raise UserError(
            f"{config.key('layout')}={config.layout} has more blocks than the model's own token "
            f"grid {grid} has tokens along an axis; take at most {grid}, or layout='auto'"
        )
    return config


def _settle_start(family: Family, model: Any, config: MHLAConfig, new: bool) -> MHLAConfig:
    reads_text = any(family.reads_text(attention) for _, attention in family.attentions(model))
    without_exact = config.exact == 0 or config.exact_layers != "all"
    if reads_text and without_exact and config.combine != "gate":
        if config.combine == "projection":
            raise UserError(
                f"{config.key('combine')}=projection starts with the exact half alone, which "
                "without a share of exact pairs is the text; take gate or denominator, or such a "
                "share in all layers"
            )
        if not config.normalize:
            raise UserError(
                f"{config.key('combine')}=denominator needs {config.key('normalize')}=true"
            )
    if config.exact_start is not None:
        return config
    if config.has_halves:
        return replace(config, exact_start=NEW_START if new else CONVERTED_START)
    if reads_text and config.exact == 0:
        return replace(config, exact_start=text_share(family, model))
    return config


def text_share(family: Family, model: Any) -> float:
    """Share of text among all tokens that a joint layer attends to, at the model's own size.

    It is the initial weight of text beside MHLA: softmax over identical keys weighs text and image
    by their numbers of tokens.
    """
    return family.text_length / (family.text_length + math.prod(family.native_grid(model)))


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
    parameters = list(projection.parameters())
    floating = next((p for p in parameters if p.is_floating_point()), None)
    device, hook = parameters[0].device, getattr(projection, "_hf_hook", None)
    if device.type == "meta" and hook is not None:
        # The layer's weights are loaded for each call; the new module's are few and stay loaded.
        device = hook.execution_device
    module = module.to(device, None if floating is None else floating.dtype)
    if module.mixing is not None:
        module.mixing.data = module.mixing.data.float()
    return module


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
