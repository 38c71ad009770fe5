"""Put MHLA into a diffusers model or pipeline in place, take it out, and say what is there."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from mhla_gen.config import MHLAConfig
from mhla_gen.errors import UserError
from mhla_gen.models.attention import MHLA
from mhla_gen.models.cogvideox import MHLACogVideoXTransformer3DModel
from mhla_gen.models.dit import MHLADiTTransformer2DModel
from mhla_gen.models.exact import exact_share
from mhla_gen.models.family import Family
from mhla_gen.models.flux import MHLAFlux2Transformer2DModel, MHLAFluxTransformer2DModel
from mhla_gen.models.hunyuan_dit import MHLAHunyuanDiT2DModel
from mhla_gen.models.hunyuan_video import (
    MHLAHunyuanVideo15Transformer3DModel,
    MHLAHunyuanVideoTransformer3DModel,
)
from mhla_gen.models.kandinsky5 import MHLAKandinsky5Transformer3DModel
from mhla_gen.models.ltx import MHLALTXVideoTransformer3DModel
from mhla_gen.models.mochi import MHLAMochiTransformer3DModel
from mhla_gen.models.pixart import MHLAPixArtTransformer2DModel
from mhla_gen.models.qwen_image import MHLAQwenImageTransformer2DModel
from mhla_gen.models.sana_video import MHLASanaVideoTransformer3DModel
from mhla_gen.models.sd3 import MHLASD3Transformer2DModel
from mhla_gen.models.surgery import become, remove_mhla, resolve
from mhla_gen.models.transformer import MHLATransformerMixin
from mhla_gen.models.wan import MHLAWanTransformer3DModel
from mhla_gen.models.z_image import MHLAZImageTransformer2DModel
from mhla_gen.ops import resolve_implementation

# Base class → the class it becomes. A new family is one file and one line here.
MHLA_CLASSES: dict[type, type] = {
    softmax_class: mhla_class
    for mhla_class in (
        MHLAZImageTransformer2DModel,
        MHLASD3Transformer2DModel,
        MHLAQwenImageTransformer2DModel,
        MHLAMochiTransformer3DModel,
        MHLAHunyuanVideo15Transformer3DModel,
        MHLAHunyuanVideoTransformer3DModel,
        MHLAFlux2Transformer2DModel,
        MHLAFluxTransformer2DModel,
        MHLACogVideoXTransformer3DModel,
        MHLADiTTransformer2DModel,
        MHLAHunyuanDiT2DModel,
        MHLAKandinsky5Transformer3DModel,
        MHLALTXVideoTransformer3DModel,
        MHLAPixArtTransformer2DModel,
        MHLASanaVideoTransformer3DModel,
        MHLAWanTransformer3DModel,
    )
    for softmax_class in (mhla_class.family.base_class, *mhla_class.family.variants)
}


def inject(pipe_or_transformer: Any, config: MHLAConfig | None = None) -> Any:
    """Replace softmax self-attention by MHLA, in place.

    Projections are kept, so the model's weights still load and train as before; the class becomes
    the family's `MHLA…` class, whose `save_pretrained` and `from_pretrained` carry everything.
    All checks are made before anything changes.

    Args:
        pipe_or_transformer: A transformer of a supported family (`docs/models.md`), or any pipeline
            that holds one or more of them (both experts of Wan 2.2).
        config: Settings; the defaults if None.

    Returns:
        Its argument.

    Raises:
        ValueError: If nothing can be converted, it already was, or `config` does not fit.
    """
    config = config or MHLAConfig()
    targets = _transformers(pipe_or_transformer)
    for transformer in targets:
        if isinstance(transformer, MHLATransformerMixin):
            raise UserError("the model already has MHLA layers; call mhla_gen.restore on it first")
        if type(transformer) not in MHLA_CLASSES:
            raise UserError(_unsupported(transformer))
        resolve(MHLA_CLASSES[type(transformer)].family, transformer, config)
    for transformer in targets:
        mhla_class = MHLA_CLASSES[type(transformer)]
        become(mhla_class.family, mhla_class, transformer, config)
    return _update_index(pipe_or_transformer)


def restore(pipe_or_transformer: Any) -> Any:
    """Undo `inject`: softmax attention again, bit for bit; MHLA's own weights are dropped.

    Args:
        pipe_or_transformer: A converted transformer, or a pipeline that holds one or more.

    Returns:
        Its argument.

    Raises:
        ValueError: If nothing in it is converted, or it is context-parallel.
    """
    targets = [t for t in _transformers(pipe_or_transformer) if isinstance(t, MHLATransformerMixin)]
    if not targets:
        raise UserError("the model has no MHLA layers to restore")
    if any(getattr(transformer, "_parallel_config", None) is not None for transformer in targets):
        raise UserError("the model shares its sequences; restore before enable_parallelism")
    for transformer in targets:
        remove_mhla(transformer.family, transformer)
    return _update_index(pipe_or_transformer)


@dataclass(frozen=True)
class LayerSummary:
    """One self-attention layer."""

    name: str
    """Path of the layer inside the model."""
    kind: str
    """softmax, mhla, or linear: MHLA with a single block, or the model's own linear attention.
    exact is softmax on a share of the pairs, "exact + mhla" both halves."""
    exact: float
    """Share of the pairs that softmax computes, on the model's own token grid."""
    layout: tuple[int, ...] | None
    """Blocks along each axis; None without MHLA."""
    implementation: str
    """Which code runs on the layer's device."""
    added_parameters: int
    """Parameters that MHLA adds to the layer."""
    converted: bool
    """Whether `inject` replaced the layer's attention."""


class Summary(list[LayerSummary]):
    """Rows of `summary`; prints as a table."""

    def __str__(self) -> str:
        header = ("layer", "attention", "exact", "layout", "implementation", "added parameters")
        rows = [
            (
                row.name,
                row.kind,
                f"{row.exact:.1%}",
                "×".join(map(str, row.layout)) if row.layout else "-",
                row.implementation,
                f"{row.added_parameters:,}",
            )
            for row in self
        ]
        total = f"{sum(row.added_parameters for row in self):,}"
        converted = sum(row.converted for row in self)
        rows.append(("total", f"{converted} of {len(self)}", "", "", "", total))
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
            for line in (header, *rows)
        ]
        return "\n".join(lines)

    __repr__ = __str__


def summary(pipe_or_transformer: Any) -> Summary:
    """What every self-attention layer is, one row a layer.

    Args:
        pipe_or_transformer: A supported transformer, converted or not, or a pipeline.

    Returns:
        A list of `LayerSummary` that prints as a table.

    Raises:
        ValueError: If there is no supported transformer.
    """
    rows = Summary()
    targets = _transformers(pipe_or_transformer)
    for number, transformer in enumerate(targets):
        mhla_class = MHLA_CLASSES.get(type(transformer), type(transformer))
        if not issubclass(mhla_class, MHLATransformerMixin):
            raise UserError(_unsupported(transformer))
        prefix = f"transformer_{number + 1}." if number else ""
        grid = mhla_class.family.native_grid(transformer)
        for name, attention in mhla_class.family.attentions(transformer):
            rows.append(_summarise(mhla_class.family, prefix + name, attention, grid))
    return rows


def _summarise(family: Family, name: str, attention: Any, grid: tuple[int, ...]) -> LayerSummary:
    child = getattr(attention, "mhla", None)
    if child is None:
        softmax = family.stock_kind == "softmax"
        backend = getattr(attention.processor, "_attention_backend", None)
        backend = backend or ("sdpa" if softmax else "diffusers")
        return LayerSummary(
            name=name,
            kind=family.stock_kind,
            exact=float(softmax),
            layout=None,
            implementation=str(getattr(backend, "value", backend)),
            added_parameters=0,
            converted=False,
        )
    config = child.config
    return LayerSummary(
        name=name,
        kind=child.kind,
        exact=exact_share(config, grid),
        layout=config.layout if config.has_linear else None,
        implementation=_implementation(child, next(attention.parameters()).device),
        added_parameters=sum(p.numel() for p in child.parameters()),
        converted=True,
    )


def _implementation(child: MHLA, device: torch.device) -> str:
    if child.config.exact == 1:
        return "sdpa"
    return resolve_implementation(
        child.config.implementation,
        device=device,
        head_dim=child.head_dim,
        value_dim=child.head_dim,
        num_blocks=math.prod(child.config.layout) if child.config.has_linear else 1,
    )


def _transformers(pipe_or_transformer: Any) -> list[Any]:
    if isinstance(pipe_or_transformer, DiffusionPipeline):
        known = (*MHLA_CLASSES, *MHLA_CLASSES.values())
        found = [m for m in pipe_or_transformer.components.values() if type(m) in known]
        if not found:
            raise UserError(
                f"{type(pipe_or_transformer).__name__} holds none of "
                f"{', '.join(c.__name__ for c in MHLA_CLASSES)}"
            )
        return found
    return [pipe_or_transformer]


def _update_index(pipe_or_transformer: Any) -> Any:
    """Tell a pipeline that classes changed, so that it saves the right names."""
    if isinstance(pipe_or_transformer, DiffusionPipeline):
        for name, component in pipe_or_transformer.components.items():
            if type(component) in (*MHLA_CLASSES, *MHLA_CLASSES.values()):
                pipe_or_transformer.register_modules(**{name: component})
    return pipe_or_transformer


def _unsupported(transformer: Any) -> str:
    hint = "; convert before torch.compile" if hasattr(transformer, "_orig_mod") else ""
    return (
        f"expected a pipeline or one of {', '.join(c.__name__ for c in MHLA_CLASSES)}, found a "
        f"{type(transformer).__name__}{hint}"
    )
