"""Put MHLA into a model of diffusers, transformers or timm, in place, and take it out."""

import sys
import warnings
from collections.abc import Sequence
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from mhla_gen.config import (
    FOR_PRETRAINED,
    FOR_PRETRAINED_LANGUAGE,
    AttentionConfig,
    CausalMHLAConfig,
    LinformerConfig,
    MHLAConfig,
)
from mhla_gen.errors import UserError
from mhla_gen.models.families import MHLA_CLASSES, refusal
from mhla_gen.models.families.unsupported import reason_of
from mhla_gen.models.settling import resolve
from mhla_gen.models.short import ShortSequenceWarning, too_short
from mhla_gen.models.surgery import become, remove_mhla
from mhla_gen.models.transformer import MHLATransformerMixin

# What a language model takes, and every other one.
_CONFIGS: dict[bool, tuple[type, ...]] = {
    True: (CausalMHLAConfig,),
    False: (MHLAConfig, LinformerConfig),
}


def inject(
    pipe_or_transformer: Any, config: AttentionConfig | CausalMHLAConfig | None = None
) -> Any:
    """Replace softmax self-attention by MHLA or Linformer, in place.

    Projections are kept, so the model's weights still load and train as before. The class becomes
    the family's `MHLA…` class, whose `save_pretrained` and `from_pretrained` include MHLA.
    Everything is checked before anything changes. If softmax is faster at the model's own size, a
    `ShortSequenceWarning` says so.

    Args:
        pipe_or_transformer: A transformer of a supported family (`docs/models.md`), or any pipeline
            that holds one or more of them (both experts of Wan 2.2), or a language model of
            transformers (`docs/language.md`), or a ViT of timm (`docs/classification.md`).
        config: Settings of MHLA or Linformer, for a language model a `CausalMHLAConfig`. None is
            what docs/evidence.md recommends for a pretrained model (an eighth of the pairs exact,
            learned feature maps), for a language model `CausalMHLAConfig(window=256)`; without
            arguments both classes are the paper's MHLA.

    Returns:
        `pipe_or_transformer`.

    Raises:
        ValueError: If nothing can be converted, the model is already converted, or `config` does
            not fit it.
    """
    _refuse_compiled(pipe_or_transformer)
    language = is_language_model(pipe_or_transformer)
    if language:
        from mhla_gen.models.language import class_for

        class_for(pipe_or_transformer)
    if config is None:
        config = FOR_PRETRAINED_LANGUAGE if language else FOR_PRETRAINED
    if not isinstance(config, _CONFIGS[language]):
        expected = " or ".join(kind.__name__ for kind in _CONFIGS[language])
        leaks = language and isinstance(config, LinformerConfig)
        raise UserError(
            f"{type(pipe_or_transformer).__name__} takes {expected}, found {type(config).__name__}"
            + ", which reads later tokens" * leaks
        )
    if isinstance(config, CausalMHLAConfig):
        from mhla_gen.models.language import inject_language

        return inject_language(pipe_or_transformer, config)
    if is_vision_model(pipe_or_transformer):
        from mhla_gen.models.vision import inject_vision, vision_family

        model = inject_vision(pipe_or_transformer, config)
        _warn_if_short(config, vision_family(model).native_grid(model))
        return model
    targets = transformers_of(pipe_or_transformer)
    for transformer in targets:
        if isinstance(transformer, MHLATransformerMixin):
            raise UserError("the model already has MHLA layers; call mhla_gen.restore on it first")
        if type(transformer) not in MHLA_CLASSES:
            raise UserError(refusal(transformer))
        resolve(MHLA_CLASSES[type(transformer)].family, transformer, config)
    for transformer in targets:
        mhla_class = MHLA_CLASSES[type(transformer)]
        become(mhla_class.family, mhla_class, transformer, config)
        _warn_if_short(config, mhla_class.family.native_grid(transformer))
    return update_index(pipe_or_transformer)


def _refuse_compiled(pipe_or_transformer: Any) -> None:
    """Raise if a model, or one of a pipeline that would be converted, is compiled."""
    parts = {"model": pipe_or_transformer}
    if isinstance(pipe_or_transformer, DiffusionPipeline):
        parts = pipe_or_transformer.components
    for name, part in parts.items():
        inner = getattr(part, "_orig_mod", None)
        if inner is not None and (name == "model" or type(inner) in MHLA_CLASSES):
            raise UserError(f"the {name} is compiled; convert it before torch.compile")


def _warn_if_short(config: AttentionConfig, grid: Sequence[int]) -> None:
    """Warn, where `inject` was called, if softmax is faster on a token grid."""
    if note := too_short(config, grid):
        warnings.warn(note, ShortSequenceWarning, stacklevel=3)


def restore(pipe_or_transformer: Any) -> Any:
    """Undo `inject`: softmax attention again, bit for bit; MHLA's own weights are dropped.

    Adapters of peft on the layers that remain are kept unchanged.

    Args:
        pipe_or_transformer: A converted transformer, or a pipeline that holds one or more.

    Returns:
        `pipe_or_transformer`.

    Raises:
        ValueError: If nothing in it is converted, adapters of peft changed MHLA's own layers, or
            the model is context-parallel.
    """
    if is_language_model(pipe_or_transformer):
        from mhla_gen.models.language import restore_language

        return restore_language(pipe_or_transformer)
    if is_vision_model(pipe_or_transformer):
        from mhla_gen.models.vision import restore_vision

        return restore_vision(pipe_or_transformer)
    targets = [
        t for t in transformers_of(pipe_or_transformer) if isinstance(t, MHLATransformerMixin)
    ]
    if not targets:
        raise UserError("the model has no MHLA layers to restore")
    for transformer in targets:
        if adapters := adapted_mhla(transformer):
            raise UserError(
                f"adapters of peft ({', '.join(adapters)}) changed MHLA's own layers and would be "
                "lost silently; remove them first: unload_lora_weights() of the pipeline or "
                "unload_lora() of the model, or load it again where modules_to_save names mhla"
            )
    take_out(targets)
    return update_index(pipe_or_transformer)


def take_out(transformers: Sequence[Any]) -> None:
    """Give converted transformers back their own attention and class.

    Raises:
        UserError: If one of them is context-parallel.
    """
    if any(getattr(each, "_parallel_config", None) is not None for each in transformers):
        raise UserError("the model shares its sequences; restore before enable_parallelism")
    for transformer in transformers:
        remove_mhla(transformer.family, transformer)


def adapted_mhla(transformer: Any) -> list[str]:
    """The peft adapters that train a part of MHLA's own layers."""
    names = getattr(transformer, "peft_config", None) or {}
    held = [
        key
        for key in transformer.state_dict()
        if ".mhla." in key and (".lora_" in key or ".modules_to_save." in key)
    ]
    return [name for name in names if any(f".{name}." in key for key in held)]


def is_language_model(model: Any) -> bool:
    """Whether the model comes from transformers, which is imported only then."""
    module = sys.modules.get("transformers.modeling_utils")
    return module is not None and isinstance(model, module.PreTrainedModel)


def is_vision_model(model: Any) -> bool:
    """Whether the model comes from timm."""
    return any(base.__module__.startswith("timm.models.") for base in type(model).__mro__)


def transformers_of(pipe_or_transformer: Any) -> list[Any]:
    """The supported transformers of a pipeline, or the given transformer, whatever it is.

    Raises:
        ValueError: If a pipeline has none.
    """
    if not isinstance(pipe_or_transformer, DiffusionPipeline):
        return [pipe_or_transformer]
    found = components_of(pipe_or_transformer)
    if not found:
        reasons = filter(None, map(reason_of, pipe_or_transformer.components.values()))
        raise UserError(
            f"{type(pipe_or_transformer).__name__} has no model that can be converted: "
            + (
                "; ".join(dict.fromkeys(reasons))
                or f"none of {', '.join(c.__name__ for c in MHLA_CLASSES)}"
            )
        )
    return list(found.values())


def components_of(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """The supported transformers of a pipeline, converted or not, by their names in it."""
    known = (*MHLA_CLASSES, *MHLA_CLASSES.values())
    return {name: part for name, part in pipeline.components.items() if type(part) in known}


def update_index(pipe_or_transformer: Any) -> Any:
    """Record in a pipeline the classes that its transformers have now; returns its argument.

    A pipeline saves the class names that its components had when they were registered.
    """
    if isinstance(pipe_or_transformer, DiffusionPipeline):
        pipe_or_transformer.register_modules(**components_of(pipe_or_transformer))
    return pipe_or_transformer
