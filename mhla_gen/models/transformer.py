"""The base of every `MHLA…` transformer class: building, loading, and unsupported methods."""

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from diffusers.configuration_utils import register_to_config
from torch import nn

from mhla_gen.config import FOR_PRETRAINED, AttentionConfig, attention_from_dict
from mhla_gen.config.fields import expand_home
from mhla_gen.errors import UserError
from mhla_gen.models.family import Family
from mhla_gen.models.parallel import check_parallelism
from mhla_gen.models.saved_class import check_saved_class
from mhla_gen.models.settling import resolve
from mhla_gen.models.surgery import add_mhla, become
from mhla_gen.runtime.compiling import keep_shapes_of_sums

# Arguments of from_pretrained that locate the config, rather than say how to load weights.
_LOCATION = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "proxies")
_NO_OTHER_PROCESSOR = (
    "MHLA layers need their own processors; call mhla_gen.restore(model) first, or set a processor "
    "on a single layer with layer.set_processor"
)


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

    diffusers reads a model's config from the signature of its `__init__`. Arguments are passed on
    by keyword, because `register_to_config` treats positional ones as defaults.
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
    """What every `MHLA…` transformer class adds to its diffusers base class.

    A subclass with a `family` is completed when it is defined: it gets an `__init__` that takes the
    arguments of the base class and `mhla`, unless it defines one, and the class attributes that
    tell diffusers how to treat MHLA's weights.
    """

    family: ClassVar[Family]

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "family" not in cls.__dict__:
            return
        # A saved pipeline names this module; diffusers looks there for the class and ModelMixin.
        cls.__module__ = "mhla_gen"
        base = cls.family.base_class
        for attribute, more in (
            ("_keep_in_fp32_modules", "mixing"),
            ("_skip_layerwise_casting_patterns", "mhla"),
        ):
            setattr(cls, attribute, [*(getattr(base, attribute, None) or ()), more])
        if "__init__" not in cls.__dict__:
            cls.__init__ = _converting_init(cls, base)  # type: ignore[method-assign]
        if type(cls.family).arguments is not Family.arguments:
            cls.forward = _forward(cls.family)  # type: ignore[attr-defined]

    def convert_new(self, mhla: AttentionConfig | dict[str, Any] | None) -> None:
        """Convert a newly built model; called at the end of the class's `__init__`."""
        config = mhla if isinstance(mhla, AttentionConfig) else attention_from_dict(mhla or {})
        resolved = resolve(self.family, self, config, new=True)  # type: ignore[arg-type]
        add_mhla(self.family, self, resolved)  # type: ignore[arg-type]

    @property
    def mhla_config(self) -> Any:
        """The settings this model was converted with."""
        return attention_from_dict(self.config.mhla)  # type: ignore[attr-defined]

    @classmethod
    def from_base(
        cls,
        base_model_or_path: Any,
        config: AttentionConfig | None = None,
        **kwargs: Any,
    ) -> Any:
        """Create an MHLA model from a softmax model, which is not changed.

        Args:
            base_model_or_path: A transformer of the family, or what its `from_pretrained` takes.
            config: Settings; None takes those of `inject`.
            kwargs: Passed to `from_pretrained` of the base class (`subfolder`, `torch_dtype`, …).

        Returns:
            A new model whose projections equal the base's.

        Raises:
            ValueError: If the model, or that in the folder, belongs to another family, or `config`
                does not fit it.
        """
        base_class = cls.family.base_class
        if isinstance(base_model_or_path, nn.Module):
            if kwargs:
                raise UserError(f"{sorted(kwargs)} only apply when a path is given, not a model")
            if type(base_model_or_path) not in (base_class, *cls.family.variants):
                raise UserError(
                    f"{cls.__name__}.from_base needs a {base_class.__name__}, found a "
                    f"{type(base_model_or_path).__name__}"
                )
            resolve(cls.family, base_model_or_path, config or FOR_PRETRAINED)
            base_model = copy.deepcopy(base_model_or_path)
        else:
            base_model_or_path = expand_home("the model", base_model_or_path)
            location = {k: kwargs[k] for k in _LOCATION if k in kwargs}
            saved = base_class.load_config(base_model_or_path, **location)
            check_saved_class(cls, base_model_or_path, saved, cls.family.variants)
            variants = {variant.__name__: variant for variant in cls.family.variants}
            base_class = variants.get(saved.get("_class_name"), base_class)
            base_model = base_class.from_pretrained(base_model_or_path, **kwargs)
        return become(cls.family, cls, base_model, config or FOR_PRETRAINED)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load a saved MHLA model; arguments as for any diffusers model.

        Raises:
            ValueError: If the folder holds a model of another class or no MHLA settings, or MHLA
                weights are missing or do not belong to these settings. Softmax checkpoints go
                through `from_base`. With `low_cpu_mem_usage=False`, if diffusers refuses that for
                the base class.
        """
        pretrained_model_name_or_path = expand_home("the model", pretrained_model_name_or_path)
        location = {k: kwargs[k] for k in _LOCATION if k in kwargs}
        saved = cls.load_config(pretrained_model_name_or_path, **location)  # type: ignore[attr-defined]
        check_saved_class(cls, pretrained_model_name_or_path, saved, cls.family.variants)
        if "mhla" not in saved and "mhla" not in kwargs:
            raise UserError(
                f"{pretrained_model_name_or_path} has no MHLA settings; convert a softmax "
                f"checkpoint with {cls.__name__}.from_base(path, MHLAConfig(...))"
            )
        if kwargs.get("parallel_config") is not None:
            settings = attention_from_dict(kwargs.get("mhla", saved.get("mhla")))
            check_parallelism(cls.family, settings, kwargs["parallel_config"])
        with_info = kwargs.pop("output_loading_info", False)
        loader = cls if kwargs.get("low_cpu_mem_usage", True) is not False else _built_whole(cls)
        model, info = super(MHLATransformerMixin, loader).from_pretrained(  # type: ignore[misc]
            pretrained_model_name_or_path, output_loading_info=True, **kwargs
        )
        model.__class__ = cls
        for problem in ("missing", "unexpected"):
            keys = sorted(key for key in info[f"{problem}_keys"] if ".mhla." in key)
            if keys:
                raise UserError(
                    f"{pretrained_model_name_or_path}: {problem} MHLA weights {_few(keys)}; the "
                    "file and the mhla settings in config.json do not belong together"
                )
        return (model, info) if with_info else model

    def set_attn_processor(self, *args: Any, **kwargs: Any) -> None:
        """Raise: another processor would bypass MHLA and leave its weights unused.

        Raises:
            ValueError: Always.
        """
        raise UserError(_NO_OTHER_PROCESSOR)

    def set_default_attn_processor(self) -> None:
        """Raise, as `set_attn_processor` does.

        Raises:
            ValueError: Always.
        """
        raise UserError(_NO_OTHER_PROCESSOR)

    def enable_parallelism(self, *, config: Any, **kwargs: Any) -> None:
        """Share every sequence among processes; as in diffusers, for context parallelism.

        Each process computes its part of the tokens and returns the whole output. In training, each
        process has its share of the weights' gradients: see `mhla_gen.models.parallel`.

        Raises:
            NotImplementedError: For tensor parallelism, for families that cannot share sequences,
                and for layers with an exact half.
        """
        check_parallelism(self.family, self.mhla_config, config)
        keep_shapes_of_sums()
        super().enable_parallelism(config=config, **kwargs)  # type: ignore[misc]


def _converting_init(cls: type, base_class: type) -> Any:
    @register_to_config
    @accepts_mhla(base_class)
    def __init__(self: Any, mhla: AttentionConfig | dict[str, Any] | None = None, **base: Any):
        super(cls, self).__init__(**base)
        self.convert_new(mhla)

    return __init__


def _built_whole(cls: Any) -> type:
    """The class that loads a model of `cls` with `low_cpu_mem_usage=False`.

    diffusers refuses that option for classes that list weights to keep in float32. Mixing is built
    in float32, so it need not be listed if weights are copied into the built model.

    Raises:
        ValueError: If the base class keeps weights of its own in float32.
    """
    base = cls.family.base_class
    if getattr(base, "_keep_in_fp32_modules", None) is not None:
        raise UserError(
            f"low_cpu_mem_usage must not be False for {cls.__name__}: diffusers refuses that for "
            f"{base.__name__}, which keeps some weights in float32; leave the argument out"
        )
    listed = {"_keep_in_fp32_modules": None, "_supports_param_buffer_assignment": False}
    return type(cls.__name__, (cls,), listed)


def _forward(family: Family) -> Any:
    base_forward = family.base_class.forward  # type: ignore[attr-defined]
    names = list(inspect.signature(base_forward).parameters)[1:]

    @functools.wraps(base_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        return base_forward(self, **family.arguments(self, given))

    return forward


class FusesSelfAttention(MHLATransformerMixin):
    """Base of a class whose own `fuse_qkv_projections` would replace the MHLA processors."""

    def fuse_qkv_projections(self) -> None:
        """Compute queries, keys and values of every self-attention layer in one product."""
        for _, attention in self.family.attentions(self):
            attention.fuse_projections(fuse=True)

    def unfuse_qkv_projections(self) -> None:
        """Undo `fuse_qkv_projections`."""
        for _, attention in self.family.attentions(self):
            attention.fused_projections = False


def _few(keys: Sequence[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
