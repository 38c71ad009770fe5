"""Pictures of the comparison."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from evidence_table import Group
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from mhla_gen.files import written_whole

CONTROL = "linear-conv-gate"
MAIN = ("softmax", "linear", CONTROL, "mhla", "mhla-conv-gate")
"""Arms that every picture names; the others are drawn thin."""
_COLOURS: dict[str, str] = dict(
    zip(MAIN, ("#444444", "#999999", "#1f77b4", "#ff9d4d", "#d62728"), strict=True)
)
_OTHERS = ("#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22")
_FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
_FONT_SIZE = 16


def save(figure: Figure, path: Path) -> None:
    """Write a picture, whole or not at all."""
    with written_whole(path) as partial:
        figure.savefig(partial, dpi=130, format="png")


def _name(group: Group) -> str:
    return group.title.replace("… ", "MHLA + conv + gate, ")


def _tokens(groups: Sequence[Group]) -> list[int]:
    return sorted({group.tokens for group in groups})


def draw_curves(groups: Sequence[Group], path: Path) -> None:
    """Training loss relative to the control's, over steps: all arms see the same noise."""
    sizes = _tokens(groups)
    figure = Figure(figsize=(5.2 * len(sizes), 5.6), layout="constrained")
    panels = figure.subplots(1, len(sizes), squeeze=False)[0]
    others = list(dict.fromkeys(group.arm for group in groups if group.arm not in MAIN))
    lines: dict[str, Any] = {}
    for axes, tokens in zip(panels, sizes, strict=True):
        same = [group for group in groups if group.tokens == tokens]
        control = next((group for group in same if group.arm == CONTROL), None)
        for group in same:
            steps, losses = _curve(group, _seeds(control) if control else None)
            if control is not None:
                losses = losses / _curve(control, _seeds(group))[1] - 1
            if group.arm in MAIN:
                style: dict[str, Any] = {"lw": 2.0, "color": _COLOURS[group.arm]}
            else:
                number = others.index(group.arm)
                style = {"lw": 1.0, "ls": ("--", ":", "-.")[number // len(_OTHERS) % 3]}
                style["color"] = _OTHERS[number % len(_OTHERS)]
            (lines[_name(group)],) = axes.plot(steps, 100 * losses, **style)
        axes.set(title=f"{tokens} tokens", xlabel="step")
    panels[0].set_ylabel("training loss against control, %")
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4, fontsize=8)
    save(figure, path)


def _seeds(group: Group) -> set[int]:
    return {result["seed"] for result in group.results}


def _curve(group: Group, seeds: set[int] | None) -> tuple[np.ndarray, np.ndarray]:
    """Steps and losses: the mean over the given seeds, or over all if there are none of these."""
    chosen = [r for r in group.results if seeds is None or r["seed"] in seeds] or group.results
    curves = np.array([result["curve"] for result in chosen]).mean(axis=0)
    return curves[:, 0], curves[:, 1]


def draw_layers(groups: Sequence[Group], path: Path) -> None:
    """Effective rank and entropy of the attention of every layer."""
    sizes = _tokens(groups)
    figure = Figure(figsize=(5.2 * len(sizes), 6.4), layout="constrained")
    panels = figure.subplots(2, len(sizes), squeeze=False)
    for column, tokens in enumerate(sizes):
        for group in (g for g in groups if g.tokens == tokens and g.arm in MAIN):
            for row, quantity in enumerate(("effective_rank", "entropy")):
                values = group.layers(quantity)
                panels[row, column].plot(
                    range(len(values)),
                    values,
                    marker="o",
                    color=_COLOURS[group.arm],
                    label=_name(group),
                )
        panels[0, column].set(title=f"{tokens} tokens", ylabel="effective rank")
        panels[1, column].set(xlabel="layer", ylabel="entropy of a row, nats")
    panels[0, 0].legend(fontsize=8)
    save(figure, path)


def draw_quality_and_speed(groups: Sequence[Group], path: Path) -> None:
    """Fréchet distance over images per second in sampling: down and to the right is better.

    Arms whose speed was not measured are left out.
    """
    groups = [group for group in groups if group.speed is not None]
    if not groups:
        return
    sizes = _tokens(groups)
    figure = Figure(figsize=(4.4 * len(sizes), 4.4), layout="constrained")
    panels = figure.subplots(1, len(sizes), squeeze=False)[0]
    others = list(dict.fromkeys(group.arm for group in groups if group.arm not in MAIN))
    marks: dict[str, Any] = {}
    for axes, tokens in zip(panels, sizes, strict=True):
        for group in (g for g in groups if g.tokens == tokens):
            assert group.speed is not None
            main = group.arm in MAIN
            marks[_name(group)] = axes.scatter(
                group.speed["sample"]["images_per_second"],
                group.mean("scores", "frechet"),
                s=70,
                marker="o" if main else "D",
                color=_COLOURS[group.arm] if main else _OTHERS[others.index(group.arm)],
                zorder=3,
            )
        axes.set(
            title=f"{tokens:,} tokens",
            xlabel="sampled images per second and GPU → better",
            ylabel="better ← Fréchet distance to real images",
        )
        axes.margins(0.12, 0.12)
        axes.grid(alpha=0.3)
    figure.legend(marks.values(), marks.keys(), loc="outside lower center", ncols=4)
    save(figure, path)


def draw_samples(
    groups: Sequence[Group], folder: Path, path: Path, side: int = 48, most: int | None = None
) -> None:
    """One row of samples for each arm, the same noise and classes in every row.

    A row shows the first `most` samples, or all, of the first seed that has any.
    """
    rows = []
    for group in groups:
        pictures = (folder / f"{result['name']}.png" for result in group.results)
        row = next((picture for picture in pictures if picture.is_file()), None)
        if row is not None:
            with Image.open(row) as image:
                count = image.width // image.height
                shown = image.crop((0, 0, min(count, most or count) * image.height, image.height))
                width = shown.width * side // shown.height
                rows.append((_name(group), shown.convert("RGB").resize((width, side))))
    if not rows:
        return
    font = ImageFont.truetype(_FONT, _FONT_SIZE)
    margin = int(max(font.getlength(name) for name, _ in rows)) + 12
    sheet = Image.new("RGB", (margin + rows[0][1].width, len(rows) * (side + 2)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (name, image) in enumerate(rows):
        top = number * (side + 2)
        draw.text((4, top + side // 2), name, fill="black", font=font, anchor="lm")
        sheet.paste(image, (margin, top))
    with written_whole(path) as partial:
        sheet.quantize(256).save(partial, format="png", optimize=True)


def draw_probe(probes: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy over the number of pairs, one panel a task."""
    tasks = sorted({probe["task"] for probe in probes})
    figure = Figure(figsize=(5.4 * len(tasks), 4.2), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
    for axes, task in zip(panels, tasks, strict=True):
        arms = {probe["arm"] for probe in probes}
        others = sorted(arms - set(MAIN))
        for arm in [*(arm for arm in MAIN if arm in arms), *others]:
            same = [p for p in probes if p["task"] == task and p["arm"] == arm]
            if not same:
                continue
            numbers = [int(n) for n in same[0]["accuracy"]]
            means = np.mean([list(p["accuracy"].values()) for p in same], axis=0)
            if arm in MAIN:
                style: dict[str, Any] = {"color": _COLOURS[arm], "lw": 2}
            else:
                style = {"color": _OTHERS[others.index(arm) % len(_OTHERS)], "ls": "--"}
            title = same[0]["title"].replace("… ", "MHLA + conv + gate, ")
            axes.plot(numbers, means, marker="o", label=title, **style)
        axes.axhline(probes[0]["chance"], color="black", lw=0.8, ls=":", label="chance")
        axes.set_xscale("log", base=2)
        numbers = sorted({int(n) for probe in probes for n in probe["accuracy"]})
        axes.set_xticks(numbers, [str(n) for n in numbers])
        axes.set(title=f"pair {task}", xlabel="pairs on the grid", ylim=(0, 1.03))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("share of queries answered")
    panels[0].legend(fontsize=8)
    save(figure, path)
