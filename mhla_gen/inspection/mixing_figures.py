"""Heat maps of mixing matrices."""

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mhla_gen.inspection.examination import Layer
from mhla_gen.inspection.figures import Picture, draw, limits_of

# With more blocks than this, dots would hide the cells that they mark.
_MAX_DOTS = 64


def draw_mixing(index: int, layer: Layer) -> Picture:
    """A layer's mixing matrix, plain and laid out on the block grid."""
    assert layer.mixing is not None and layer.layout is not None
    layout, matrix = layer.layout, _mean_over_heads(layer.mixing)

    def make(colours: Sequence[str]) -> Figure:
        height, width = on_block_grid(matrix, layout).shape
        # Videos have far more columns than rows: too wide for a place beside the matrix.
        wide = width > 1.5 * height
        shape = (6.5, 3 + 6 * height / width) if wide else (6.9, 3.2)
        figure = Figure(figsize=shape, layout="constrained")
        panels = figure.subplots(2, 1) if wide else figure.subplots(1, 2)
        image = panels[0].imshow(matrix, **limits_of(matrix), interpolation="nearest")
        panels[0].set(title="matrix", xlabel="block read", ylabel="block of the query")
        for axis in (panels[0].xaxis, panels[0].yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        _draw_on_block_grid(panels[1], matrix, layout)
        figure.colorbar(image, ax=panels, shrink=0.85, label="weight")
        return figure

    diagonal = float(np.diagonal(matrix).mean())
    others = (matrix.sum() - np.trace(matrix)) / max(matrix.size - len(matrix), 1)
    alt = (
        f"Mixing matrix of layer {index}, {len(matrix)} × {len(matrix)}: a block's own weight is "
        f"{diagonal:.3f} on average, another block's {others:.3f}, the largest {matrix.max():.3f}."
    )
    blocks = " × ".join(map(str, layout))
    return draw(f"mixing_{index:02d}", f"Layer {index}, {blocks} blocks", alt, make)


def _draw_on_block_grid(axes: Any, matrix: np.ndarray, layout: tuple[int, ...]) -> None:
    depth, height, width = _three(layout)
    tiles = on_block_grid(matrix, layout)
    axes.imshow(tiles, **limits_of(matrix), interpolation="nearest")
    axes.set(title="row of every block, at its place", xticks=[], yticks=[])
    line = {"color": mpl.rcParams["axes.facecolor"], "linewidth": 2.5}
    for top in range(0, len(tiles) + 1, height):
        axes.axhline(top - 0.5, **line)
    for left in range(0, tiles.shape[1] + 1, depth * width):
        axes.axvline(left - 0.5, **line)
    axes.spines[:].set_visible(False)
    if len(matrix) <= _MAX_DOTS:
        rows, columns = np.nonzero(on_block_grid(np.eye(len(matrix)), layout))
        axes.plot(columns, rows, ".", color="#e5006d", markersize=4)


def draw_mixing_heads(index: int, layer: Layer) -> Picture:
    """The mixing matrices of a layer whose heads have their own."""
    assert layer.mixing is not None
    matrices = layer.mixing
    columns = min(len(matrices), 6)
    rows = -(-len(matrices) // columns)

    def make(colours: Sequence[str]) -> Figure:
        figure = Figure(figsize=(1.2 * columns + 0.9, 1.4 * rows), layout="constrained")
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
    return draw(f"mixing_{index:02d}_heads", f"Layer {index}, head by head", alt, make)


def on_block_grid(matrix: np.ndarray, layout: tuple[int, ...]) -> np.ndarray:
    """Rows of a mixing matrix as small pictures, each at the place of its query block.

    Slices of a 3-D layout lie below each other for query blocks and beside each other inside a
    small picture.

    Args:
        matrix: `[num_blocks, num_blocks]`.
        layout: Blocks along each axis.

    Returns:
        `[slices * height * height, width * slices * width]`.
    """
    depth, height, width = _three(layout)
    tiles = matrix.reshape(depth * height, width, depth, height, width)
    return tiles.transpose(0, 3, 1, 2, 4).reshape(depth * height * height, width * depth * width)


def _three(layout: tuple[int, ...]) -> tuple[int, int, int]:
    depth, height, width = (1,) * (3 - len(layout)) + tuple(layout)
    return depth, height, width


def _mean_over_heads(mixing: np.ndarray) -> np.ndarray:
    return mixing.mean(axis=0) if mixing.ndim == 3 else mixing
