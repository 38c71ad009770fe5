"""What the toolkit knows of a family of transformers, and the base of its MHLA class.

A family says where self-attention sits, what its grid is, and which processors to set. Everything
else (conversion, undoing it, loading, saving) is the same for all families and lives here.
"""

import copy
import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from diffusers.configuration_utils import FrozenDict
from torch import nn

from mhla_gen.config import MHLAConfig
from mhla_gen.models.attention import MHLA
from mhla_gen.ops import auto_layout

# Arguments of from_pretrained that say where a config lies rather than how to load weights.
_LOCATION = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "proxies")


class Family(ABC):
    """One kind of diffusers transformer."""

    base_class: ClassVar[type]
    """The diffusers class that is converted."""
    rank: ClassVar[int]
    """Axes of the token grid."""
    stock_processor: ClassVar[type]
    """Processor class of an unconverted layer."""
    mhla_processor: ClassVar[type]
    """Processor class of an MHLA layer; stateless."""
    softmax_processor: ClassVar[type]
    """Processor class of a layer that stays softmax inside a converted model."""
    replaced_modules: ClassVar[dict[str, tuple[type, type]]] = {}
    """Path of a module outside the layers → its stock class and the class it has in a converted
    model, which must have the same state."""
    variants: ClassVar[tuple[type, ...]] = ()
    """Further softmax classes that are converted like `base_class`, with the same weights."""
    stock_kind: ClassVar[str] = "softmax"
    """What an unconverted layer computes: softmax, or linear where the family does so itself."""

    @abstractmethod
    def attentions(self, model: Any) -> list[tuple[str, Any]]:
        """Name and module of every self-attention layer, in order."""

    @abstractmethod
    def sizes(self, model: Any) -> tuple[int, int, int]:
        """Heads, channels of a head, channels of the layer's input."""

    @abstractmethod
    def native_grid(self, model: Any) -> tuple[int, ...]:
        """The token grid that `layout="auto"` is made for."""

    def bystanders(self, model: Any) -> list[tuple[str, Any]]:
        """Layers that are never converted but are handed the grid: get `softmax_processor`."""
        return []

    def output_projection(self, attention: Any) -> nn.Module:
        """The layer's last linear map, which unlike the input projections is never fused."""
        return attention.to_out[0]

    def settings(self, model: Any) -> dict[str, Any]:
        """What the MHLA class must be saved with, besides `mhla` and the arguments of its base."""
        return {}

    def softmax_class(self, model: Any) -> type:
        """The class that `model` has without its MHLA layers."""
        return self.base_class


def mhla_layers(config: MHLAConfig, num_layers: int) -> tuple[int, ...]:
    """Indices of the layers that `config.layers` converts.

    A fraction `a/b` keeps the first `b - a` of every `b` layers softmax.

    Raises:
        ValueError: If an index is not below `num_layers`, or no layer is left to convert.
    """
    if config.layers == "all":
        return tuple(range(num_layers))
    if isinstance(config.layers, str):
        part, whole = map(int, config.layers.split("/"))
        chosen = tuple(i for i in range(num_layers) if i % whole >= whole - part)
        if not chosen:
            raise ValueError(f"layers={config.layers!r} converts none of {num_layers} layers")
        return chosen
    if max(config.layers) >= num_layers:
        raise ValueError(
            f"layers={list(config.layers)} names layer {max(config.layers)}, but the model has "
            f"layers 0 to {num_layers - 1}"
        )
    return config.layers


def resolve(family: Family, model: Any, config: MHLAConfig) -> MHLAConfig:
    """Check a config against a model and replace `layout="auto"` by block counts.

    Raises:
        ValueError: If layers, rank, layout or processors do not fit the model.
    """
    attentions = family.attentions(model)
    mhla_layers(config, len(attentions))
    known = (family.stock_processor, family.softmax_processor, family.mhla_processor)
    for name, attention in attentions + family.bystanders(model):
        if type(attention.processor) not in known:
            raise ValueError(
                f"{name} has the processor {type(attention.processor).__name__}, which MHLA would "
                f"drop; set {family.stock_processor.__name__} first"
            )
        if getattr(attention.processor, "_parallel_config", None) is not None:
            raise ValueError(f"{name} is context-parallel; convert before enable_parallelism")
    grid = family.native_grid(model)
    if config.layout == "auto":
        return replace(config, layout=auto_layout(grid))
    if len(config.layout) != family.rank:
        raise ValueError(
            f"{family.base_class.__name__} has a {family.rank}-D token grid, so layout needs "
            f"{family.rank} entries, found {config.layout}"
        )
    if any(count > length for count, length in zip(config.layout, grid, strict=True)):
        raise ValueError(
            f"layout={config.layout} has more blocks than the model's own token grid {grid} has "
            f"tokens along an axis; take at most {grid}, or layout='auto'"
        )
    return config


def convert(family: Family, model: Any, config: MHLAConfig) -> None:
    """Give the chosen layers their `mhla` child; `config` comes from `resolve`."""
    attentions = family.attentions(model)
    chosen = set(mhla_layers(config, len(attentions)))
    for index, (_, attention) in enumerate(attentions):
        if index in chosen:
            child = MHLA(*family.sizes(model), config).train(attention.training)
            attention.mhla = _like(family.output_projection(attention), child)
            _swap_processor(attention, family.mhla_processor)
        else:
            _swap_processor(attention, family.softmax_processor)
    for _, attention in family.bystanders(model):
        _swap_processor(attention, family.softmax_processor)
    for path, (_, converted_class) in family.replaced_modules.items():
        model.get_submodule(path).__class__ = converted_class
    settings = {"mhla": config.to_dict(), **family.settings(model)}
    # from_config ignores what is marked as the default; that may have been another class's.
    defaults = [k for k in model.config.get("_use_default_values", ()) if k not in settings]
    marks = {"_use_default_values": defaults} if defaults else {}
    kept = {k: v for k, v in model.config.items() if k != "_use_default_values"}
    model._internal_dict = FrozenDict({**kept, **settings, **marks})


def unconvert(family: Family, model: Any) -> None:
    """Take away what `convert` added, the class included."""
    for _, attention in family.attentions(model) + family.bystanders(model):
        if hasattr(attention, "mhla"):
            del attention.mhla
        _swap_processor(attention, family.stock_processor)
    for path, (stock_class, _) in family.replaced_modules.items():
        model.get_submodule(path).__class__ = stock_class
    softmax_class = family.softmax_class(model)
    added = _argument_names(type(model)) - _argument_names(softmax_class)
    model._internal_dict = FrozenDict({k: v for k, v in model.config.items() if k not in added})
    model.__class__ = softmax_class


def _argument_names(model_class: Any) -> set[str]:
    return set(inspect.signature(model_class.__init__).parameters)


def _like(projection: nn.Module, module: MHLA) -> MHLA:
    """Move a new module to where its layer's output projection is; mixing stays float32.

    The projection's weight may be quantized, then the bias tells the dtype.
    """
    parameters = list(projection.parameters())
    floating = next((p for p in parameters if p.is_floating_point()), None)
    module = module.to(parameters[0].device, None if floating is None else floating.dtype)
    module.mixing.data = module.mixing.data.float()
    return module


def _swap_processor(attention: Any, processor_class: type) -> None:
    processor = processor_class()
    # set_attention_backend chooses kernels of softmax layers through this attribute.
    if hasattr(processor, "_attention_backend"):
        processor._attention_backend = getattr(attention.processor, "_attention_backend", None)
    attention.set_processor(processor)


def accepts_mhla(
    base_class: type, **more: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give `__init__(self, mhla, **base)` the signature of `base_class` plus `mhla`.

    Args:
        base_class: The diffusers class.
        more: Further arguments of the MHLA class and their defaults.
    """
    return accepts(base_class, mhla=None, **more)


def accepts(base_class: Any, **more: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give `__init__` the signature of `base_class` plus keywords with their defaults.

    diffusers reads a model's config from the signature of its `__init__`. Arguments are handed on
    by keyword, because `register_to_config` takes positional ones for defaults.
    """
    base = inspect.signature(base_class.__init__)
    extra = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
        for name, default in more.items()
    ]
    signature = base.replace(parameters=[*base.parameters.values(), *extra])

    def decorate(init: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(init)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
            init(**signature.bind(self, *args, **kwargs).arguments)

        wrapper.__signature__ = signature  # type: ignore[attr-defined]
        return wrapper

    return decorate


class MHLATransformerMixin:
    """What every `MHLA…` transformer class adds to its diffusers base class."""

    family: ClassVar[Family]

    def convert_new(self, mhla: MHLAConfig | dict[str, Any] | None) -> None:
        """Convert a freshly built model; the last line of the class's `__init__`."""
        config = mhla if isinstance(mhla, MHLAConfig) else MHLAConfig(**(mhla or {}))
        convert(self.family, self, resolve(self.family, self, config))  # type: ignore[arg-type]

    @property
    def mhla_config(self) -> MHLAConfig:
        """The settings this model was converted with."""
        return MHLAConfig(**self.config.mhla)  # type: ignore[attr-defined]

    @classmethod
    def from_base(
        cls,
        base_model_or_path: Any,
        config: MHLAConfig | None = None,
        **kwargs: Any,
    ) -> Any:
        """An MHLA model from a softmax model, which is left as it is.

        Args:
            base_model_or_path: A transformer of the family, or what its `from_pretrained` takes.
            config: Settings; the defaults if None.
            kwargs: Passed to `from_pretrained` of the base class (`subfolder`, `torch_dtype`, …).

        Returns:
            A new model whose projections equal the base's.

        Raises:
            ValueError: If the model is of another family, or `config` does not fit it.
        """
        base_class: Any = cls.family.base_class
        if isinstance(base_model_or_path, nn.Module):
            if kwargs:
                raise ValueError(f"{sorted(kwargs)} only apply when a path is given, not a model")
            if type(base_model_or_path) not in (base_class, *cls.family.variants):
                raise ValueError(
                    f"{cls.__name__}.from_base needs a {base_class.__name__}, found a "
                    f"{type(base_model_or_path).__name__}"
                )
            resolve(cls.family, base_model_or_path, config or MHLAConfig())
            base_model = copy.deepcopy(base_model_or_path)
        else:
            location = {k: kwargs[k] for k in _LOCATION if k in kwargs}
            saved = base_class.load_config(base_model_or_path, **location)
            variants = {variant.__name__: variant for variant in cls.family.variants}
            base_class = variants.get(saved.get("_class_name"), base_class)
            base_model = base_class.from_pretrained(base_model_or_path, **kwargs)
        return become(cls.family, cls, base_model, config or MHLAConfig())

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load a saved MHLA model; arguments as for any diffusers model.

        Raises:
            ValueError: If the folder holds no MHLA settings, or MHLA weights are missing or do not
                belong to these settings. Softmax checkpoints go through `from_base`.
        """
        location = {k: kwargs[k] for k in _LOCATION if k in kwargs}
        saved = cls.load_config(pretrained_model_name_or_path, **location)  # type: ignore[attr-defined]
        if "mhla" not in saved and "mhla" not in kwargs:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds no MHLA settings; convert a softmax "
                f"checkpoint with {cls.__name__}.from_base(path, MHLAConfig(...))"
            )
        if kwargs.get("parallel_config") is not None:
            raise NotImplementedError(_NO_PARALLELISM)
        with_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(  # type: ignore[misc]
            pretrained_model_name_or_path, output_loading_info=True, **kwargs
        )
        for problem in ("missing", "unexpected"):
            keys = sorted(key for key in info[f"{problem}_keys"] if ".mhla." in key)
            if keys:
                raise ValueError(
                    f"{pretrained_model_name_or_path}: {problem} MHLA weights {_few(keys)}; the "
                    "file and the mhla settings in config.json do not belong together"
                )
        return (model, info) if with_info else model

    def enable_parallelism(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: block summaries would cover the local shard of tokens only.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(_NO_PARALLELISM)


_NO_PARALLELISM = (
    "context and tensor parallelism are not supported by MHLA layers: a rank would sum its own "
    "tokens only; call mhla_gen.restore(model) first, or run on one device"
)


def become(family: Family, mhla_class: type, model: Any, config: MHLAConfig) -> Any:
    """Turn a base model into its MHLA class in place; all checks come first."""
    resolved = resolve(family, model, config)
    model.__class__ = mhla_class
    convert(family, model, resolved)
    return model


def _few(keys: Sequence[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
