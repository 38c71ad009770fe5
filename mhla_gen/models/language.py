"""Llama-style language models of transformers with causal MHLA, and their conversion in place."""

# The classes of transformers annotate forward and attributes more narrowly than the mixins here.
# pyright: reportIncompatibleMethodOverride=false, reportIncompatibleVariableOverride=false

from copy import copy
from dataclasses import replace
from typing import Any, ClassVar

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.llama import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.mistral import MistralConfig, MistralForCausalLM, MistralModel
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2 import Qwen2Config, Qwen2ForCausalLM, Qwen2Model
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3 import Qwen3Config, Qwen3ForCausalLM, Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from mhla_gen.config import CausalMHLAConfig
from mhla_gen.errors import UserError
from mhla_gen.models.attention import CONVERTED_START, NEW_START
from mhla_gen.models.causal_attention import CausalAttention, CausalMHLA
from mhla_gen.models.causal_decoder import CausalModel
from mhla_gen.models.saved_class import check_saved_class
from mhla_gen.models.settling import mhla_layers
from mhla_gen.models.surgery import change_class, computing_device
from mhla_gen.ops import FEATURE_MAPS


class MHLALanguageModel(nn.Module):
    """Base of the converted models, which are built with MHLA and saved and loaded as usual."""

    config: Any
    model: Any

    softmax_classes: ClassVar[tuple[type, type, type, type]]
    """Softmax classes of model, decoder, attention and config."""
    mhla_classes: ClassVar[tuple[type, type]]
    """The classes of decoder and attention with MHLA."""
    # The state cannot be rolled back; this makes transformers refuse assisted decoding.
    _is_stateful = True
    _keep_in_fp32_modules_strict: ClassVar[set[str]] = {"log_weights"}

    def __init__(self, config: Any):
        super().__init__(config)
        settings = CausalMHLAConfig.from_dict(config.mhla or {})
        _add_layers(self, resolve_language(self, settings, new=True))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a saved model, as transformers does; weights that its settings freeze stay frozen.

        Raises:
            OSError: If there is no model.
            ValueError: If it is of another class of this package or of diffusers.
        """
        place = pretrained_model_name_or_path
        if place is not None and kwargs.get("config") is None:
            saved, _ = PretrainedConfig.get_config_dict(place, **kwargs)
            check_saved_class(cls, place, saved)
        loaded = super().from_pretrained(place, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # transformers loads weights into new parameters, which are all trained.
        for module in model.modules():
            if isinstance(module, CausalMHLA) and module.log_weights is not None:
                module.log_weights.requires_grad_(module.config.mixing_learnable)
        return loaded

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, CausalMHLA):
            module.reset_parameters()
        else:
            super()._init_weights(module)  # pyright: ignore[reportAttributeAccessIssue]


class MHLALlamaConfig(LlamaConfig):
    """Llama's settings and, in `mhla`, those of `CausalMHLAConfig`."""

    model_type = "mhla_llama"
    mhla: dict[str, Any] | None = None


class MHLALlamaAttention(CausalAttention, LlamaAttention):
    """Llama's attention with causal MHLA."""


class MHLALlamaModel(CausalModel, LlamaModel):
    """Llama's decoder with causal MHLA."""


class MHLALlamaForCausalLM(MHLALanguageModel, LlamaForCausalLM):
    """Llama with causal MHLA."""

    config_class = MHLALlamaConfig
    softmax_classes = (LlamaForCausalLM, LlamaModel, LlamaAttention, LlamaConfig)
    mhla_classes = (MHLALlamaModel, MHLALlamaAttention)


class MHLAMistralConfig(MistralConfig):
    """Mistral's settings and, in `mhla`, those of `CausalMHLAConfig`."""

    model_type = "mhla_mistral"
    mhla: dict[str, Any] | None = None


class MHLAMistralAttention(CausalAttention, MistralAttention):
    """Mistral's attention with causal MHLA, without a sliding window."""


class MHLAMistralModel(CausalModel, MistralModel):
    """Mistral's decoder with causal MHLA."""


class MHLAMistralForCausalLM(MHLALanguageModel, MistralForCausalLM):
    """Mistral with causal MHLA."""

    config_class = MHLAMistralConfig
    softmax_classes = (MistralForCausalLM, MistralModel, MistralAttention, MistralConfig)
    mhla_classes = (MHLAMistralModel, MHLAMistralAttention)


class MHLAQwen2Config(Qwen2Config):
    """Qwen2's settings and, in `mhla`, those of `CausalMHLAConfig`."""

    model_type = "mhla_qwen2"
    mhla: dict[str, Any] | None = None


class MHLAQwen2Attention(CausalAttention, Qwen2Attention):
    """Qwen2's attention with causal MHLA."""


class MHLAQwen2Model(CausalModel, Qwen2Model):
    """Qwen2's decoder with causal MHLA."""


class MHLAQwen2ForCausalLM(MHLALanguageModel, Qwen2ForCausalLM):
    """Qwen2 with causal MHLA."""

    config_class = MHLAQwen2Config
    softmax_classes = (Qwen2ForCausalLM, Qwen2Model, Qwen2Attention, Qwen2Config)
    mhla_classes = (MHLAQwen2Model, MHLAQwen2Attention)


class MHLAQwen3Config(Qwen3Config):
    """Qwen3's settings and, in `mhla`, those of `CausalMHLAConfig`."""

    model_type = "mhla_qwen3"
    mhla: dict[str, Any] | None = None


class MHLAQwen3Attention(CausalAttention, Qwen3Attention):
    """Qwen3's attention with causal MHLA."""


class MHLAQwen3Model(CausalModel, Qwen3Model):
    """Qwen3's decoder with causal MHLA."""


class MHLAQwen3ForCausalLM(MHLALanguageModel, Qwen3ForCausalLM):
    """Qwen3 with causal MHLA."""

    config_class = MHLAQwen3Config
    softmax_classes = (Qwen3ForCausalLM, Qwen3Model, Qwen3Attention, Qwen3Config)
    mhla_classes = (MHLAQwen3Model, MHLAQwen3Attention)


# Base class → the class it becomes.
LANGUAGE_CLASSES: dict[type, Any] = {
    mhla_class.softmax_classes[0]: mhla_class
    for mhla_class in (
        MHLALlamaForCausalLM,
        MHLAMistralForCausalLM,
        MHLAQwen2ForCausalLM,
        MHLAQwen3ForCausalLM,
    )
}
for _mhla_class in LANGUAGE_CLASSES.values():
    AutoConfig.register(_mhla_class.config_class.model_type, _mhla_class.config_class)
    AutoModelForCausalLM.register(_mhla_class.config_class, _mhla_class)


def attentions(model: Any) -> list[tuple[str, Any]]:
    """Name and module of every attention layer.

    Raises:
        ValueError: If the model cannot be converted.
    """
    if not isinstance(model, MHLALanguageModel):
        class_for(model)
    return [(f"model.layers.{i}.self_attn", x.self_attn) for i, x in enumerate(model.model.layers)]


def resolve_language(model: Any, config: CausalMHLAConfig, new: bool = False) -> CausalMHLAConfig:
    """Check a config against a model, and resolve `layers` to indices and `exact_start`.

    Args:
        model: Not converted yet.
        config: Settings.
        new: Whether the model's weights are new; a pretrained model is disturbed as little as
            possible.

    Raises:
        ValueError: If layers or feature map do not fit, the rotary embedding scales attention, or
            attention weights are dropped.
    """
    if config.feature_map not in FEATURE_MAPS:
        raise UserError(
            f"feature_map must be one of {', '.join(FEATURE_MAPS)}, found {config.feature_map!r}"
        )
    scaling = getattr(model.model.rotary_emb, "attention_scaling", 1.0)
    if scaling != 1:
        raise UserError(
            f"the model's rotary embedding scales attention by {scaling}, which causal MHLA has "
            "nothing for; set another rope_type"
        )
    settings: Any = config
    chosen = mhla_layers(settings, [name for name, _ in attentions(model)])
    if rate := model.config.attention_dropout:
        raise UserError(
            f"the model drops {rate:g} of its attention weights in training, which causal MHLA "
            "does not have; set attention_dropout to 0"
        )
    start = config.exact_start
    if config.has_halves and start is None:
        start = NEW_START if new else CONVERTED_START
    return replace(config, layers=chosen, exact_start=start)


def inject_language(model: Any, config: CausalMHLAConfig) -> Any:
    """Convert in place; see `mhla_gen.inject`."""
    mhla_class: Any = class_for(model)
    config = resolve_language(model, config)
    model.config.__class__ = mhla_class.config_class
    change_class(model, mhla_class)
    _add_layers(model, config)
    return model


def restore_language(model: Any) -> Any:
    """Undo `inject_language`; see `mhla_gen.restore`."""
    if not isinstance(model, MHLALanguageModel):
        raise UserError("the model has no MHLA layers to restore")
    softmax_class, decoder_class, attention_class, config_class = model.softmax_classes
    for _, attention in attentions(model):
        if hasattr(attention, "mhla"):
            del attention.mhla
            change_class(attention, attention_class)
    change_class(model.model, decoder_class)
    change_class(model, softmax_class)
    del model.config.mhla
    model.config.__class__ = config_class
    model.config.architectures = [softmax_class.__name__]
    return model


def class_for(model: Any) -> type:
    """The class that a softmax model becomes.

    Raises:
        ValueError: If the model is already converted, or cannot be.
    """
    if isinstance(model, MHLALanguageModel):
        raise UserError("the model already has MHLA layers; call mhla_gen.restore on it first")
    if type(model) not in LANGUAGE_CLASSES:
        decoders = [c.softmax_classes[1] for c in LANGUAGE_CLASSES.values()]
        hint = "; convert it with its head" if type(model) in decoders else ""
        names = ", ".join(c.__name__ for c in LANGUAGE_CLASSES)
        raise UserError(
            f"of transformers' models, {names} can be converted, found a "
            f"{type(model).__name__}{hint}"
        )
    return LANGUAGE_CLASSES[type(model)]


def _add_layers(model: Any, config: CausalMHLAConfig) -> None:
    """Add the child to the chosen layers; `config` comes from `resolve_language`."""
    decoder_class, attention_class = model.mhla_classes
    model.config.mhla = config.to_dict()
    model.config.architectures = [type(model).__name__]
    change_class(model.model, decoder_class)
    # transformers records hidden states only in classes of which a model was built. Building checks
    # the attention, which the model that is converted has already chosen.
    settings = copy(model.config)
    settings._attn_implementation = "eager"
    PreTrainedModel.__init__(decoder_class.__new__(decoder_class), settings)
    for index, (_, attention) in enumerate(attentions(model)):
        if index in config.layers:
            sizes = attention.config
            heads, key_heads = sizes.num_attention_heads, sizes.num_key_value_heads
            child = CausalMHLA(heads, key_heads, sizes.hidden_size, config)
            child.to(computing_device(attention.o_proj))
            if child.combine is not None:
                child.combine.to(model.dtype)
            attention.mhla = child.train(attention.training)
            change_class(attention, attention_class)
