"""Heat maps of mixing matrices."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mhla_gen.inspection.examination import Layer
from mhla_gen.inspection.figures import Picture, limits_of, render

# With more blocks than this, dots would hide the cells that they mark.
_MAX_DOTS = 64


def draw_mixing(index: int, layer: Layer) -> Picture:
    """A layer's mixing matrix, plain and laid out on the block grid."""
    assert layer.mixing is not None and layer.layout is not None
    layout, matrix = layer.layout, _mean_over_heads(layer.mixing)

    def make(colours: Sequence[str]) -> Figure:
        slices = on_block_grid(matrix, layout)
        depth, height, width = slices.shape
        figure = Figure(layout="constrained")
        if depth == 1:
            figure.set_size_inches(6.9, 3.2)
            whole, *panels = figure.subplots(1, 2)
        else:
            heights = 3.3, 0.5 + 6 * height / (width * depth)
            figure.set_size_inches(6.9, sum(heights))
            parts: Any = figure.subfigures(2, 1, height_ratios=heights)
            whole, panels = parts[0].subplots(), parts[1].subplots(1, depth)
        image = whole.imshow(matrix, **limits_of(matrix), interpolation="nearest")
        whole.set(title="matrix", xlabel="block read", ylabel="block of the query")
        for axis in (whole.xaxis, whole.yaxis):
            axis.set_major_locator(MaxNLocator(6, integer=True))
        for number, (axes, tiles) in enumerate(zip(panels, slices, strict=True)):
            _draw_on_block_grid(axes, tiles, layout, limits_of(matrix))
            title = "row of every block, at its place"
            axes.set_title(title if depth == 1 else f"slice {number}")
        if len(matrix) <= _MAX_DOTS:
            _mark_own(panels, layout)
        figure.colorbar(image, ax=[whole, *panels] if depth == 1 else whole, label="weight")
        return figure

    diagonal = float(np.diagonal(matrix).mean())
    others = (matrix.sum() - np.trace(matrix)) / max(matrix.size - len(matrix), 1)
    alt = (
        f"Mixing matrix of layer {index}, {len(matrix)} × {len(matrix)}: a block's own weight is "
        f"{diagonal:.3f} on average, another block's {others:.3f}, the largest {matrix.max():.3f}."
    )
    blocks = " × ".join(map(str, layout))
    return render(f"mixing_{index:02d}", f"Layer {index}, {blocks} blocks", alt, make)


def _draw_on_block_grid(
    axes: Any, tiles: np.ndarray, layout: tuple[int, ...], limits: dict[str, Any]
) -> None:
    depth, height, width = _three(layout)
    axes.imshow(tiles, **limits, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    # Lines must not hide the cells of fine layouts.
    line = {"color": "white", "linewidth": 24 / (8 + height * width)}
    for top in range(0, len(tiles) + 1, depth * height):
        axes.axhline(top - 0.5, **line)
    for left in range(0, tiles.shape[1] + 1, width):
        axes.axvline(left - 0.5, **line)


def _mark_own(panels: Sequence[Any], layout: tuple[int, ...]) -> None:
    own = on_block_grid(np.eye(math.prod(layout)), layout)
    for axes, marks in zip(panels, own, strict=True):
        rows, columns = np.nonzero(marks)
        axes.plot(columns, rows, ".", color="#e5006d", markersize=4)


def draw_mixing_heads(index: int, layer: Layer) -> Picture:
    """The mixing matrices of a layer whose heads have their own."""
    assert layer.mixing is not None
    matrices = layer.mixing
    columns = min(len(matrices), 6)
    rows = -(-len(matrices) // columns)

    def make(colours: Sequence[str]) -> Figure:
        figure = Figure(figsize=(1.1 * columns + 0.9, 1.3 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False)
        limits = limits_of(matrices)
        for axes in panels.flat:
            axes.set_axis_off()
        images = []
        for head, (axes, matrix) in enumerate(zip(panels.flat, matrices, strict=False)):
            images.append(axes.imshow(matrix, **limits, interpolation="nearest"))
            axes.set_title(f"head {head}", fontsize=9)
        figure.colorbar(images[0], ax=panels, shrink=0.85, label="weight")
        return figure

    alt = f"Mixing matrices of the {len(matrices)} heads of layer {index}, one heat map each."
    return render(f"mixing_{index:02d}_heads", f"Layer {index}, head by head", alt, make)


def on_block_grid(matrix: np.ndarray, layout: tuple[int, ...]) -> np.ndarray:
    """Rows of a mixing matrix as small pictures, each at the place of its query block.

    In a small picture the slices of a 3-D layout lie below each other.

    Args:
        matrix: `[num_blocks, num_blocks]`.
        layout: Blocks along each axis.

    Returns:
        One picture per slice of query blocks, `[slices, height * slices * height, width * width]`.
    """
    depth, height, width = _three(layout)
    tiles = matrix.reshape(depth, height, width, depth, height, width)
    return tiles.transpose(0, 1, 3, 4, 2, 5).reshape(depth, height * depth * height, width * width)


def _three(layout: tuple[int, ...]) -> tuple[int, int, int]:
    depth, height, width = (1,) * (3 - len(layout)) + tuple(layout)
    return depth, height, width


def _mean_over_heads(mixing: np.ndarray) -> np.ndarray:
    return mixing.mean(axis=0) if mixing.ndim == 3 else mixing
