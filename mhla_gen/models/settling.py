"""Settings of attention, checked against a model, and what they leave open resolved."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mhla_gen.config import AttentionConfig, LinformerConfig, MHLAConfig
from mhla_gen.errors import UserError
from mhla_gen.models.attention import CONVERTED_START, NEW_START
from mhla_gen.models.exact import exact_share
from mhla_gen.models.family import Family
from mhla_gen.models.features import WHOLE_HEAD_MAPS
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
    """Indices of the layers with an exact half, with arguments as for `mhla_layers`.

    Raises:
        ValueError: As `mhla_layers`, or if none of the converted layers has an exact half.
    """
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
