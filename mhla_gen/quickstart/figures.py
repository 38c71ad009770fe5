"""The quickstart's pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from mhla_gen.config import MHLAConfig
from mhla_gen.files import write_picture
from mhla_gen.models import MHLA
from mhla_gen.models.attention import initial_mixing
from mhla_gen.training.previews import mean_mixing, mean_over_heads


def draw_losses(logs: Mapping[str, Sequence[dict[str, float]]], path: Path) -> None:
    """Training losses by step, one curve per model.

    Args:
        logs: Title → lines of a training log.
        path: Picture to write.
    """
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    for title, lines in logs.items():
        axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], label=title)
    axes.set(xlabel="optimizer step", ylabel="flow-matching loss", yscale="log")
    # The default labels nothing between 1 and 2.
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
    axes.legend()
    write_picture(path, figure)


def draw_mixing(model: torch.nn.Module, config: MHLAConfig, path: Path) -> None:
    """Mixing matrices before and after training: rows read, columns are read.

    Args:
        model: The trained model.
        config: Its settings, which say how the matrices started.
        path: Picture to write.
    """
    matrices = mean_mixing(model)
    heads = next(module.num_heads for module in model.modules() if isinstance(module, MHLA))
    before = mean_over_heads(initial_mixing(config, heads))
    pictures = {"before training": before}
    pictures |= {f"after, layer {i}": matrix for i, matrix in enumerate(matrices)}
    top = max(float(matrix.max()) for matrix in pictures.values())
    figure = Figure(figsize=(2.1 * len(pictures) + 0.8, 2.9), layout="constrained")
    panels = figure.subplots(1, len(pictures), squeeze=False)[0]
    image = None
    for axes, (title, matrix) in zip(panels, pictures.items(), strict=True):
        image = axes.imshow(matrix, vmin=0, vmax=top, cmap="viridis")
        axes.set_title(title, fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
        if len(matrix) <= 8:
            _write_values(axes, matrix, top)
    panels[0].set(xlabel="block read", ylabel="block of the query")
    assert image is not None
    figure.colorbar(image, ax=panels, shrink=0.8, label="weight")
    write_picture(path, figure)


def _write_values(axes: Any, matrix: np.ndarray, top: float) -> None:
    for (row, column), value in np.ndenumerate(matrix):
        # White on the dark half of the colour map, black on the light one.
        colour = "white" if value < 0.6 * top else "black"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
