"""Attention maps over the token grid."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mhla_gen.inspection.examination import Layer
from mhla_gen.inspection.figures import Picture, limits_of, render
from mhla_gen.ops import block_starts

# Frames of a video that one row of maps shows.
_MAX_FRAMES = 5


def draw_maps(
    index: int,
    layers: dict[str, Layer],
    queries: Sequence[tuple[int, ...]],
    grid: tuple[int, ...],
) -> Picture:
    """Attention maps of one layer, of the model and of its teacher, and of their halves.

    Images have a column per query and a row per model; videos a column per frame and a row per
    model and query.
    """
    height, width = (1, *grid)[-2:]
    panels = _video_panels if len(grid) == 3 else _image_panels
    table = panels(layers, queries, (height, width))

    def make(colours: Sequence[str]) -> Figure:
        side = 1.55
        shape = (side * len(table[0]) + 0.5, (side * min(height / width, 2) + 0.35) * len(table))
        figure = Figure(figsize=shape, layout="constrained")
        for line, axes_line in zip(
            table, figure.subplots(len(table), len(table[0]), squeeze=False), strict=True
        ):
            for panel, axes in zip(line, axes_line, strict=True):
                _draw_map(axes, panel)
        return figure

    own = "; ".join(
        f"{title}, query {query}: at most {weights.max():.1f} times uniform"
        for title, layer in layers.items()
        for query, weights in zip(queries, layer.maps, strict=True)
    )
    alt = f"Attention maps of layer {index} over the token grid. {own}."
    kinds = ", ".join(f"{title}: {layer.said}" for title, layer in layers.items() if layer.whole)
    return render(f"attention_{index:02d}", f"Layer {index} ({kinds})", alt, make)


@dataclass(frozen=True)
class _Panel:
    """One map."""

    weights: np.ndarray
    """`[height, width]`, times uniform."""
    title: str
    side: str
    mark: tuple[int, int] | None
    """Row and column of the query, if it is in this picture."""
    borders: tuple[tuple[int, ...], ...]
    """First tokens of blocks, along height and width."""
    limits: dict[str, Any]
    """Colour scale."""


def _image_panels(
    layers: dict[str, Layer], queries: Sequence[tuple[int, ...]], shape: tuple[int, int]
) -> list[list[_Panel]]:
    return [
        [
            _Panel(
                picture := weights.reshape(shape),
                f"{_place(query)}, max {picture.max():.1f}",
                title if column == 0 else "",
                (query[0], query[1]) if len(query) == 2 else (0, query[0]),
                _borders(layer, shape),
                limits_of(picture, _signed(layer)),
            )
            for column, (query, weights) in enumerate(zip(queries, layer.maps, strict=True))
        ]
        for title, layer in layers.items()
    ]


def _video_panels(
    layers: dict[str, Layer], queries: Sequence[tuple[int, ...]], shape: tuple[int, int]
) -> list[list[_Panel]]:
    table = []
    for query_number, query in enumerate(queries):
        for title, layer in layers.items():
            video = layer.maps[query_number]
            limits = limits_of(video, _signed(layer))
            table.append(
                [
                    _Panel(
                        video[frame],
                        f"frame {frame}, max {video[frame].max():.1f}",
                        f"{title}\n{_place(query)}" if column == 0 else "",
                        (query[1], query[2]) if frame == query[0] else None,
                        _borders(layer, shape),
                        limits,
                    )
                    for column, frame in enumerate(_frames(len(video), query[0]))
                ]
            )
    return table


def _draw_map(axes: Any, panel: _Panel) -> None:
    axes.imshow(panel.weights, **panel.limits, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.set_title(panel.title, fontsize=9.5)
    axes.set_ylabel(panel.side, fontsize=9.5)
    ink = "black" if panel.limits["vmin"] < 0 else "white"
    for draw_line, starts in zip((axes.axhline, axes.axvline), panel.borders, strict=True):
        for start in starts[1:]:
            draw_line(start - 0.5, color=ink, linewidth=0.7, alpha=0.55)
    if panel.mark is not None:
        row, column = panel.mark
        for colour, line in (("white", 3.2), ("#e5006d", 1.6)):
            axes.plot(
                column, row, "o", markersize=9, mfc="none", mec=colour, mew=line, clip_on=False
            )


def _frames(length: int, own: int) -> list[int]:
    """Up to five frames, evenly spread, the query's among them."""
    spread = np.linspace(0, length - 1, min(length, _MAX_FRAMES)).round().astype(int)
    nearest = np.abs(spread - own).argmin()
    spread[nearest] = own
    return sorted(set(spread.tolist()))


def _borders(layer: Layer, shape: tuple[int, int]) -> tuple[tuple[int, ...], ...]:
    if layer.layout is None:
        return (), ()
    layout = (1,) * (2 - len(layer.layout)) + layer.layout[-2:]
    return tuple(block_starts(length, count) for length, count in zip(shape, layout, strict=True))


def _signed(layer: Layer) -> bool:
    # One colour map for all queries of a layer.
    return bool(layer.maps.min() < 0)


def _place(query: tuple[int, ...]) -> str:
    return f"query {', '.join(map(str, query))}"
