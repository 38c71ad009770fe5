"""A table of a model's self-attention layers: their kind, and the share that is softmax."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from mhla_gen.errors import UserError
from mhla_gen.models.additions import AddedAttention
from mhla_gen.models.exact import exact_share, tile_layout
from mhla_gen.models.families import MHLA_CLASSES, family_of, refusal
from mhla_gen.models.family import Family
from mhla_gen.models.injection import is_language_model, is_vision_model, transformers_of
from mhla_gen.models.transformer import MHLATransformerMixin
from mhla_gen.ops import resolve_implementation
from mhla_gen.ops.tile_attention import resolve_tile_implementation
from mhla_gen.ops.tiles import tiling


@dataclass(frozen=True)
class LayerSummary:
    """One self-attention layer."""

    name: str
    """Path of the layer inside the model."""
    kind: str
    """softmax, mhla, or linear: MHLA with a single block, or the model's own linear attention.
    exact is softmax on a share of the pairs, "exact + mhla" both halves; linformer is softmax over
    projected keys."""
    exact: float
    """Share of the pairs that softmax computes, on the model's own token grid."""
    layout: tuple[int, ...] | None
    """Blocks along each axis; None without MHLA."""
    implementation: str
    """Implementation that runs on the layer's device."""
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
    """A table of a model's self-attention layers, one row per layer.

    Args:
        pipe_or_transformer: A supported transformer, converted or not, or a pipeline.

    Returns:
        A list of `LayerSummary` that prints as a table.

    Raises:
        ValueError: If there is no supported transformer.
    """
    rows = Summary()
    if is_language_model(pipe_or_transformer):
        from mhla_gen.models.language import attentions

        named = attentions(pipe_or_transformer)
        rows.extend(_summarise_causal(name, attention) for name, attention in named)
        return rows
    if is_vision_model(pipe_or_transformer):
        from mhla_gen.models.vision import vision_family

        family = vision_family(pipe_or_transformer)
        grid = family.native_grid(pipe_or_transformer)
        named = family.attentions(pipe_or_transformer)
        rows.extend(_summarise(family, name, attention, grid) for name, attention in named)
        return rows
    targets = transformers_of(pipe_or_transformer)
    for number, transformer in enumerate(targets):
        mhla_class = MHLA_CLASSES.get(type(transformer), type(transformer))
        if not issubclass(mhla_class, MHLATransformerMixin):
            raise UserError(refusal(transformer))
        prefix = f"transformer_{number + 1}." if number else ""
        grid = mhla_class.family.native_grid(transformer)
        for name, attention in mhla_class.family.attentions(transformer):
            rows.append(_summarise(mhla_class.family, prefix + name, attention, grid))
    return rows


def exact_pairs(transformer: Any, grid: tuple[int, ...]) -> float:
    """The share of pairs that softmax computes on a token grid, the mean over layers.

    Args:
        transformer: Of a known class, with MHLA layers or without.
        grid: Tokens along each axis.
    """
    family = family_of(transformer)
    named = family.attentions(transformer)
    rows = [_summarise(family, name, attention, grid) for name, attention in named]
    return sum(row.exact for row in rows) / len(rows)


def _summarise(family: Family, name: str, attention: Any, grid: tuple[int, ...]) -> LayerSummary:
    child = getattr(attention, "mhla", None)
    if child is None:
        softmax = family.stock_kind == "softmax"
        processor = getattr(attention, "processor", None)
        backend = getattr(processor, "_attention_backend", None)
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
        implementation=_implementation(child, next(attention.parameters()).device, grid),
        added_parameters=_added(child),
        converted=True,
    )


def _added(child: Any) -> int:
    """Parameters of MHLA alone, without peft's trained copies or low-rank updates of it."""
    own = getattr(child, "original_module", child)
    return sum(p.numel() for name, p in own.named_parameters() if "lora_" not in name)


def _summarise_causal(name: str, attention: Any) -> LayerSummary:
    child = getattr(attention, "mhla", None)
    if child is None:
        return LayerSummary(
            name=name,
            kind="softmax",
            exact=1.0,
            layout=None,
            implementation=attention.config._attn_implementation,
            added_parameters=0,
            converted=False,
        )
    config = child.config
    kinds = ["exact"] * (config.window > 0) + ["mhla"] * config.linear
    codes = ["sdpa"] * (config.window > 0)
    if config.linear:
        device, head_dim = attention.o_proj.weight.device, attention.head_dim
        sizes = {"head_dim": head_dim, "value_dim": head_dim, "num_blocks": config.num_blocks}
        codes.append(resolve_implementation("auto", device=device, **sizes))
    return LayerSummary(
        name=name,
        kind=" + ".join(kinds),
        exact=_window_share(config.window, attention.config.max_position_embeddings),
        layout=(config.num_blocks,) if config.linear else None,
        implementation=" + ".join(codes),
        added_parameters=_added(child),
        converted=True,
    )


def _window_share(window: int, seq_len: int) -> float:
    """Share of a sequence's causal pairs that lie within the window."""
    window = min(window, seq_len)
    return (2 * seq_len - window + 1) * window / (seq_len * (seq_len + 1))


def _implementation(child: AddedAttention, device: torch.device, grid: tuple[int, ...]) -> str:
    """Implementation that runs on a device; that of both halves if they differ."""
    config, found = child.config, []
    if config.exact == 1 or child.kind == "linformer":
        return "sdpa"
    if config.has_tiles:
        token = torch.empty(1, 1, 1, child.head_dim, dtype=torch.bfloat16, device=device)
        tile, group, window, top = tile_layout(config, grid)
        num_tiles = tiling(grid, tile, window, top, group).num_tiles
        found.append(
            resolve_tile_implementation(config.implementation, token, token, None, num_tiles)
        )
    if config.has_linear:
        found.append(
            resolve_implementation(
                config.implementation,
                device=device,
                head_dim=child.head_dim,
                value_dim=child.head_dim,
                num_blocks=math.prod(config.layout),
            )
        )
    return " + ".join(dict.fromkeys(found))
