"""Results of a sensitivity scan: numbers, a picture, and the plan as settings."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from mhla_gen.config import SensitivityConfig
from mhla_gen.files import write_json, write_text, written_whole
from mhla_gen.inspection.figures import mark_layers, render
from mhla_gen.inspection.sensitivity_plan import Plan
from mhla_gen.version import __version__

RESULTS_NAME, PICTURE_NAME, PLAN_NAME = "sensitivity.json", "sensitivity.png", "plan.yaml"


@dataclass(frozen=True)
class LayerSensitivity:
    """The effect of replacing one layer: squared errors relative to the softmax output."""

    layer: int
    """Index in the model."""
    name: str
    """Path in the model."""
    output_error: float
    """Of the model's output, the mean over inputs."""
    by_timestep: dict[str, float]
    """The same for each timestep."""
    layer_error: float
    """Of the layer's own output, which is what layer-wise distillation makes small."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `LayerSensitivity(**d)` reads them back."""
        return asdict(self)


def write_report(
    folder: Path,
    config: SensitivityConfig,
    facts: dict[str, Any],
    rows: Sequence[LayerSensitivity],
    plan: Plan | None,
    joint_error: float | None,
) -> None:
    """Write sensitivity.json, sensitivity.png and, if there is a plan, plan.yaml.

    Args:
        folder: Where to.
        config: The settings.
        facts: What was measured.
        rows: One a layer.
        plan: Which layers stay softmax.
        joint_error: The error measured with all layers of the plan replaced together.
    """
    content: dict[str, Any] = {
        "facts": {**facts, "mhla_gen": __version__},
        "layers": [row.to_dict() for row in rows],
        "plan": None,
    }
    if plan is not None:
        content["plan"] = {
            **asdict(plan),
            "joint_error": joint_error,
            "override": plan.override,
            "exact_override": plan.exact_override,
        }
        write_text(folder / PLAN_NAME, _snippet(config, plan))
    write_json(folder / RESULTS_NAME, content)
    picture = draw_sensitivity(rows, plan)
    with written_whole(folder / PICTURE_NAME) as partial:
        partial.write_bytes(picture)


def draw_sensitivity(rows: Sequence[LayerSensitivity], plan: Plan | None) -> bytes:
    """Errors over layers, at each timestep and their mean, with the plan's layers marked; PNG."""

    def make(colours: Sequence[str]) -> Figure:
        figure = Figure(figsize=(max(6.5, 0.28 * len(rows)), 3.8), layout="constrained")
        axes: Any = figure.subplots()
        layers, times = [row.layer for row in rows], list(rows[0].by_timestep)
        for number, layer in enumerate(plan.softmax_layers if plan is not None else ()):
            label = "stays softmax" if number == 0 else None
            axes.axvspan(layer - 0.4, layer + 0.4, color=colours[1], alpha=0.25, lw=0, label=label)
        for time, shade in zip(times, np.linspace(0.1, 0.85, len(times)), strict=True):
            values = [row.by_timestep[time] for row in rows]
            colour = mpl.colormaps["viridis"](shade)
            axes.plot(layers, values, "o-", ms=3, lw=0.8, color=colour, label=f"timestep {time}")
        means = [row.output_error for row in rows]
        axes.plot(layers, means, "s-", ms=5, lw=2.2, color=colours[0], label="mean")
        axes.set(
            yscale="log",
            xlabel="the one layer that is replaced",
            ylabel="error of the output,\nshare of its squares",
        )
        mark_layers(axes, layers)
        figure.legend(loc="outside lower center", ncols=4, fontsize=8)
        return figure

    return render("sensitivity", "Sensitivity", "", make).png["light"]


def _snippet(config: SensitivityConfig, plan: Plan) -> str:
    replaced = ", ".join(map(str, plan.mhla_layers))
    return (
        f"# mhla-gen inspect sensitivity {config.model}: "
        f"layers {list(plan.softmax_layers)} stay softmax.\n"
        "# Goes into the config of `mhla-gen train`.\n"
        f"model:\n  mhla:\n    layers: [{replaced}]\n"
    )
