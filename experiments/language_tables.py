"""Tables and curves of the language models that language.py trained."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mhla_gen.files import written_whole

TITLES = {"mhla": "MHLA", "mhla + window": "MHLA + window", "window": "window alone"}


def tables(report: dict[str, Any]) -> str:
    """Markdown: loss by position, loss by context, conversion."""
    lines = []
    for converted in (False, True):
        arms = [arm for arm in report["arms"] if arm["converted"] == converted]
        if not arms:
            continue
        edges, given = arms[0]["edges"], arms[0]["given"]
        columns = [f"{a:,}–{b:,}" for a, b in pairwise(edges)]
        columns += [f"given {n:,}" for n in given]
        first = ["attention", "seed"] + ["at once"] * converted
        lines += [" | ".join(["", *first, *columns, ""]).strip()]
        lines += ["|---" * (len(first) + len(columns)) + "|"]
        for arm in arms:
            means = [*np.mean(arm["by_position"], axis=0), *np.mean(arm["by_given"], axis=0)]
            cells = [TITLES.get(arm["arm"], arm["arm"]), str(arm["seed"])]
            if converted:
                cells.append(f"{_within(arm['at_once'], report):.3f}")
            lines.append(" | ".join(["", *cells, *(f"{x:.3f}" for x in means), ""]).strip())
        lines.append("")
    return "\n".join(lines)


def _within(arm: dict[str, Any], report: dict[str, Any]) -> float:
    """Bits per byte at positions within the training length."""
    edges, trained = np.array(arm["edges"]), report["sizes"]["seq_len"]
    inside = edges[1:] <= trained
    return float(
        np.average(np.mean(arm["by_position"], axis=0)[inside], weights=np.diff(edges)[inside])
    )


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw loss by position, and loss of the same bytes by context, as means over seeds."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    names = dict.fromkeys(arm["arm"] for arm in report["arms"])
    for name in names:
        arms = [a for a in report["arms"] if a["arm"] == name and not a["converted"]]
        if not arms:
            continue
        # Bins of half a training length: single texts would make shorter bins noisy.
        curve = np.mean([arm["curve"] for arm in arms], axis=0).reshape(-1, 8).mean(axis=1)
        step = report["sizes"]["longest"] // len(curve)
        title = TITLES.get(name, name)
        axes[0].plot(np.arange(len(curve)) * step + step / 2, curve, label=title)
        by_given = np.mean([np.mean(arm["by_given"], axis=0) for arm in arms], axis=0)
        axes[1].plot(arms[0]["given"], by_given, marker="o", label=title)
    axes[0].axvline(report["sizes"]["seq_len"], color="grey", linewidth=0.8)
    axes[0].set(xlabel="position (bytes); trained up to the line", ylabel="bits a byte")
    axes[1].set(xlabel="bytes given", ylabel="bits a byte of the same last bytes", xscale="log")
    axes[1].minorticks_off()
    axes[1].set_xticks(arms[0]["given"], [f"{n:,}" for n in arms[0]["given"]])
    for axis in axes:
        # A model that fails beyond its training length would flatten all other curves.
        low = min(min(line.get_ydata()) for line in axis.lines if len(line.get_ydata()) > 2)
        axis.set_ylim(low - 0.05, low + 1.5)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    with written_whole(path) as partial:
        figure.savefig(partial, dpi=150, format="png")
