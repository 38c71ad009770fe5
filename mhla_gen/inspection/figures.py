"""Pictures, each in a light and a dark version, and the curves of rank and entropy."""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from mhla_gen.inspection.examination import Examination

# Text and background of the page, then the model's and its teacher's colour.
THEMES = {
    "light": ("#1b1f24", "#ffffff", ("#0b61a4", "#b4460b")),
    "dark": ("#e6e9ee", "#15181d", ("#6cb6ff", "#ffa657")),
}
_MARKERS = ("o", "s")
_QUANTITIES = {"rank": "rank", "effective_rank": "effective rank", "entropy": "entropy (nats)"}
# More than what the page shows, for sharp screens.
_DPI, _SHOWN_DPI = 150, 90


@dataclass(frozen=True)
class Picture:
    """A drawing, ready for the page and for a file."""

    name: str
    """File name without its ending."""
    title: str
    alt: str
    """What a reader who cannot see it should know."""
    png: dict[str, bytes]
    """Theme → PNG."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height on the page, in CSS pixels: text is as large in all pictures."""
        with Image.open(io.BytesIO(self.png["light"])) as image:
            width, height = image.size
        return round(width * _SHOWN_DPI / _DPI), round(height * _SHOWN_DPI / _DPI)


def render(name: str, title: str, alt: str, make: Callable[[Sequence[str]], Figure]) -> Picture:
    """Draw in both themes; `make` gets the colours of model and teacher."""
    png = {}
    for theme, (ink, paper, colours) in THEMES.items():
        with _theme(ink, paper):
            buffer = io.BytesIO()
            make(colours).savefig(buffer, dpi=_DPI, bbox_inches="tight", pad_inches=0.06)
            png[theme] = buffer.getvalue()
    return Picture(name, title, alt, png)


@contextmanager
def _theme(ink: str, paper: str) -> Iterator[None]:
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    papered = ("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor")
    settings = dict.fromkeys(inked, ink) | dict.fromkeys(papered, paper)
    with mpl.rc_context({**settings, "font.size": 10, "axes.titlesize": 10}):
        yield


def draw_statistics(examinations: Sequence[Examination], num_rows: int, seq_len: int) -> Picture:
    """Rank, effective rank and entropy of every layer: the paper's Figure 3 for this model."""

    def make(colours: Sequence[str]) -> Figure:
        figure = Figure(figsize=(11.5, 3.6), layout="constrained")
        panels = dict(zip(_QUANTITIES, figure.subplots(1, 3), strict=True))
        for quantity, axes in panels.items():
            for seen, *style in zip(examinations, colours, _MARKERS, strict=False):
                _draw_curve(axes, seen, quantity, *style)
            axes.set(title=_QUANTITIES[quantity], xlabel="layer")
            mark_layers(axes, list(examinations[0].layers))
        _draw_limits(panels, examinations[0], num_rows, seq_len)
        entries = {
            label: handle
            for axes in panels.values()
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=5)
        return figure

    means = "; ".join(
        f"{seen.title}: "
        + ", ".join(
            f"{title} {mean(seen, quantity):.2f}" for quantity, title in _QUANTITIES.items()
        )
        for seen in examinations
    )
    alt = f"Three line charts over layers. Means over layers: {means}. The table has all numbers."
    return render("statistics", "Rank and entropy per layer", alt, make)


def _draw_curve(axes: Any, seen: Examination, quantity: str, colour: str, marker: str) -> None:
    """The mean over heads, and a band from the lowest head to the highest."""
    per_head = [layer.per_head(quantity) for layer in seen.layers.values()]
    x = list(seen.layers)
    lowest, highest = [h.min() for h in per_head], [h.max() for h in per_head]
    axes.fill_between(x, lowest, highest, color=colour, alpha=0.2, linewidth=0)
    if len(x) == 1:
        # A band of one layer has no width.
        axes.vlines(x, lowest, highest, color=colour, alpha=0.2, linewidth=8)
    means = [heads.mean() for heads in per_head]
    axes.plot(x, means, color=colour, marker=marker, markersize=4, label=seen.title)


def mark_layers(axes: Any, layers: Sequence[int]) -> None:
    """Whole numbers below the layers, room beside the first and the last, and a grid."""
    axes.set_xlim(min(layers) - 0.5, max(layers) + 0.5)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.grid(alpha=0.25)


def _draw_limits(panels: dict[str, Any], model: Examination, num_rows: int, seq_len: int) -> None:
    """What rank and entropy can reach."""
    style = {"color": mpl.rcParams["text.color"], "linewidth": 1.2}
    bounds = {i: layer.rank_bound for i, layer in model.layers.items()}
    if min(bounds.values()) < num_rows:
        label = "largest rank of the model's form"
        panels["rank"].plot(*zip(*bounds.items(), strict=True), "--", label=label, **style)
    for quantity in ("rank", "effective_rank"):
        panels[quantity].axhline(num_rows, ls=":", label=f"{num_rows} rows compared", **style)
        panels[quantity].set_ylim(0, 1.05 * num_rows)
    panels["entropy"].axhline(np.log(seq_len), ls="-.", label=f"uniform: log {seq_len}", **style)


def mean(seen: Examination, quantity: str) -> float:
    """The mean over layers and heads."""
    return float(np.mean([layer.per_head(quantity).mean() for layer in seen.layers.values()]))


def limits_of(values: np.ndarray, signed: bool | None = None) -> dict[str, Any]:
    """Colours from 0 up, or symmetric around 0 where values are negative or `signed`."""
    top = float(np.abs(values).max()) or 1.0
    if values.min() < 0 if signed is None else signed:
        return {"vmin": -top, "vmax": top, "cmap": "RdBu_r"}
    return {"vmin": 0.0, "vmax": top, "cmap": "viridis"}
