"""Run a model on inputs and collect, layer by layer, what the page shows."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mhla_gen.errors import UserError
from mhla_gen.inspection.attention_maps import watch
from mhla_gen.inspection.inputs import Input
from mhla_gen.inspection.statistics import HeadStatistics, head_statistics
from mhla_gen.inspection.subject import Subject
from mhla_gen.inspection.weights import BothHalves, LayerAttention, MHLAAttention


@dataclass(eq=False)
class Layer:
    """One self-attention layer, over all inputs."""

    name: str
    """Path inside the model."""
    kind: str
    """softmax, mhla, linear, exact, or exact + one of the linear kinds."""
    rank_bound: int
    """The largest rank that its form allows for the rows that were looked at."""
    layout: tuple[int, ...] | None
    """Blocks along each axis; None without MHLA."""
    mixing: np.ndarray | None
    """`[num_blocks, num_blocks]`, with heads first if they differ; None without MHLA."""
    maps: np.ndarray
    """Weights of the chosen queries for the first input, `[queries, *grid]`, times their number:
    1 is what uniform attention would give."""
    halves: dict[str, np.ndarray] = field(default_factory=dict)
    """The same of the exact half and of MHLA, by kind, where a layer has both."""
    whole: bool = True
    """Whether `maps` are those of the layer, not of one of its halves."""
    exact_weight: float | None = None
    """Mean weight of the exact half over heads and tokens of the first input, where it has one."""
    statistics: list[list[HeadStatistics]] = field(default_factory=list)
    """One list of heads per input."""

    @property
    def said(self) -> str:
        """Its kind, and the weight of the exact half."""
        if self.exact_weight is None:
            return self.kind
        return f"{self.kind}, exact half {self.exact_weight:.0%}"

    def views(self, title: str) -> dict[str, "Layer"]:
        """The layer by its title, and each half as if it were the layer."""
        halves = {
            f"{title}, {kind} half": replace(self, kind=kind, maps=maps, whole=False)
            for kind, maps in self.halves.items()
        }
        return {title: self, **halves}

    def per_head(self, quantity: str) -> np.ndarray:
        """The mean over inputs of rank, effective_rank or entropy, `[heads]`."""
        return np.array(
            [[getattr(head, quantity) for head in heads] for heads in self.statistics]
        ).mean(axis=0)


@dataclass(frozen=True, eq=False)
class Examination:
    """The results for one model."""

    title: str
    subject: Subject
    layers: dict[int, Layer]
    """By index in the model; layers that are neither softmax nor MHLA are missing."""

    @property
    def missing(self) -> list[str]:
        """Names of layers that could not be examined."""
        names = [name for name, _ in self.subject.family.attentions(self.subject.model)]
        return [name for index, name in enumerate(names) if index not in self.layers]


@dataclass(frozen=True, eq=False)
class Focus:
    """Where to look."""

    grid: tuple[int, ...]
    queries: Tensor
    """Tokens whose maps are kept, int64."""
    rows: Tensor
    """Queries for rank and entropy, int64."""
    head: int | None
    """Head whose maps are kept; None is the mean over heads."""


def examine(title: str, subject: Subject, inputs: Sequence[Input], focus: Focus) -> Examination:
    """Run every input through the model, one after another.

    Args:
        title: What the page calls the model.
        subject: The model, on the device to run it on.
        inputs: At least one.
        focus: Where to look.

    Raises:
        ValueError: If the model's layers cannot be looked at.
    """
    device = next(subject.model.parameters()).device
    names = [name for name, _ in subject.family.attentions(subject.model)]
    layers: dict[int, Layer] = {}

    def observe(index: int, attention: LayerAttention) -> None:
        if index not in layers:
            layers[index] = _new_layer(names[index], attention, focus)
        rows = focus.rows.to(attention.device)
        layers[index].statistics.append(
            [head_statistics(attention, rows, head) for head in range(attention.num_heads)]
        )

    for item in tqdm(inputs, desc=f"inspect {title}", unit="input"):
        watch(subject.family, subject.model, item.on(device).arguments, observe)
    if not layers:
        raise UserError(f"no layer of {subject.source} is softmax or MHLA; nothing to draw")
    return Examination(title, subject, dict(sorted(layers.items())))


def _new_layer(name: str, attention: LayerAttention, focus: Focus) -> Layer:
    if attention.seq_len != int(np.prod(focus.grid)):
        raise UserError(
            f"{name} attends over {attention.seq_len} tokens, not over the grid {focus.grid}; "
            "inspect draws self-attention over the image's or video's own tokens"
        )
    halves = [attention.exact, attention.linear] if isinstance(attention, BothHalves) else []
    mixed = next((part for part in (attention, *halves) if isinstance(part, MHLAAttention)), None)
    share = attention.share if isinstance(attention, BothHalves) else None
    return Layer(
        name=name,
        kind=attention.kind,
        rank_bound=min(len(focus.rows), attention.rank_bound),
        layout=None if mixed is None else mixed.layout,
        mixing=None if mixed is None else mixed.mixing.float().cpu().numpy(),
        maps=_maps(attention, focus),
        halves={half.kind: _maps(half, focus) for half in halves},
        exact_weight=None if share is None else share.float().mean().item(),
    )


def _maps(attention: LayerAttention, focus: Focus) -> np.ndarray:
    heads = range(attention.num_heads) if focus.head is None else [focus.head]
    queries = focus.queries.to(attention.device)
    weights = torch.stack([attention.weights(queries, head) for head in heads]).mean(dim=0)
    times_uniform = weights * attention.seq_len
    return times_uniform.float().cpu().numpy().reshape(len(queries), *focus.grid)
