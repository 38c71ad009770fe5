"""Tables and picture of the gains from exact pairs: the plan exact.yaml of docs/evidence.md."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from evidence_figures import save
from evidence_plan import Plan
from evidence_table import (
    Group,
    against_control,
    difference,
    each,
    frechet,
    markdown,
    paired_difference,
    relative,
)
from matplotlib.figure import Figure

_TEACHER = "teacher"
# Of the picture: arms with a linear half, the first without exact pairs, and arms without one.
# Lists of tiles are shared unless said; in clips there are also larger tiles.
_FAMILIES = {
    "with MHLA": ("mhla", "exact-2", "exact-5", "clips-5", "exact-12", "clips-12", "exact-25"),
    "with MHLA, a list for every tile": ("single-5", "single-12", "clips-single-5"),
    "with linear attention": (
        "linear", "exact-2-linear", "exact-5-linear", "exact-12-linear", "exact-25-linear",
    ),
    "alone": ("exact-2-alone", "exact-5-alone", "exact-12-alone", "clips-12-alone",
              "exact-25-alone"),
    "alone, a list for every tile": ("single-12-alone",),
    "with MHLA, larger tiles": ("large-5", "large-12"),
    "alone, larger tiles": ("large-5-alone", "large-12-alone"),
}  # fmt: skip


def exact_tables(plan: Plan, groups: Sequence[Group], folder: Path) -> str:
    """All tables of the results so far."""
    parts = []
    for setting in plan.settings.values():
        same = [group for group in groups if group.setting == setting.name]
        if setting.kind != "converted" and same and setting.name != _TEACHER:
            parts += [heading(setting.kind, same), new_table(same, plan.control)]
    converted = [g for g in groups if plan.settings[g.setting].kind == "converted"]
    if converted:
        teacher = next((g for g in groups if g.setting == _TEACHER), None)
        parts += [converted_heading(teacher, converted), converted_table(converted)]
    probes = [json.loads(path.read_bytes()) for path in sorted(folder.glob("probe-*.json"))]
    if probes:
        parts += ["**Retrieval**: share of queries answered.", probe_table(probes, plan.probe)]
    return "\n\n".join([*parts, *real_lines(folder)]) + "\n"


def heading(kind: str, groups: Sequence[Group]) -> str:
    """What the rows of a table share."""
    first = groups[0].results[0]
    what = "clips" if kind == "clips" else "images"
    scored = [r["scores"]["samples"] for g in groups for r in g.results if "scores" in r]
    samples = f", {scored[0]} samples" if scored else ""
    return (
        f"**New, {first['tokens']:,} tokens**: {first['steps']} steps of {first['batch_size']} "
        f"{what}{samples}, on {devices(groups)}."
    )


def devices(groups: Sequence[Group]) -> str:
    """Devices and dates of the results."""
    machines = [result["machine"] for group in groups for result in group.results]
    names = sorted({machine["device"] for machine in machines})
    dates = sorted({machine["date"] for machine in machines})
    return f"{' and '.join(names)}, {dates[0]}{f' to {dates[-1]}' if dates[1:] else ''}"


NEW = (
    "attention", "exact pairs", "seeds", "held-out loss", "against softmax", "Fréchet",
    "training /s", "sampling /s",
)  # fmt: skip


def new_table(groups: Sequence[Group], control: str) -> str:
    """Quality and speed of models trained from scratch."""
    rows = [
        [
            group.title,
            percent(group),
            str(len(group.results)),
            each(group.values("held_out", "mean"), ".5f"),
            against_control(group, groups, control),
            frechet(group),
            *speeds(group),
        ]
        for group in groups
    ]
    return markdown(NEW, rows)


def percent(group: Group) -> str:
    """The share of pairs that softmax computes."""
    return f"{100 * group.mean('pairs'):.3g} %"


def speeds(group: Group) -> tuple[str, str]:
    """Images or clips per second, of three digits, if they were measured."""
    if group.speed is None:
        return "–", "–"
    rates = (group.speed[part]["images_per_second"] for part in ("train", "sample"))
    train, sample = (f"{float(f'{rate:.3g}'):,g}" for rate in rates)
    return train, sample


def converted_heading(teacher: Group | None, groups: Sequence[Group]) -> str:
    """Heading for converted models."""
    first = groups[0].results[0]
    whose = ""
    if teacher is not None:
        loss = teacher.mean("held_out", "mean")
        steps = teacher.results[0]["steps"]
        whose = f" of a softmax model of {steps:,} steps (loss {loss:.5f})"
    return (
        f"**Converted, {first['tokens']:,} tokens**: held-out loss{whose} after further steps of "
        f"{first['batch_size']} images, on {devices(groups)}."
    )


def converted_table(groups: Sequence[Group]) -> str:
    """Loss after each number of steps, also relative to the teacher tuned for as many steps."""
    groups = sorted(longest_runs(groups), key=lambda group: group.arm != _TEACHER)
    points = sorted({point["steps"] for g in groups for r in g.results for point in r["points"]})
    controls = {
        (result["seed"], point["steps"]): point["held_out"]
        for group in groups
        if group.arm == _TEACHER
        for result in group.results
        for point in result["points"]
    }
    header = ["attention", "exact pairs", "layers taught first"]
    header += [f"{steps:,} steps" if steps else "at once" for steps in points]
    compared = [steps for steps in points if steps > 0]
    header += [f"against softmax, {steps:,}" for steps in compared] + ["Fréchet"]
    rows = []
    for group in groups:
        losses = [each([x["mean"] for _, x in losses_at(group, n)], ".4f") or "–" for n in points]
        gaps = [gap_at(group, steps, controls) for steps in compared]
        told = taught(group)
        rows.append([group.title, percent(group), told, *losses, *gaps, frechet(group)])
    return markdown(header, rows)


def longest_runs(groups: Sequence[Group]) -> list[Group]:
    """Groups of one arm and way of teaching together, with the longest run of each seed."""
    found: dict[tuple[str, str], Group] = {}
    for group in groups:
        same = found.setdefault((group.arm, taught(group)), replace(group, results=[]))
        runs = {result["seed"]: result for result in same.results}
        for result in group.results:
            seed = result["seed"]
            if seed not in runs or last_step(runs[seed]) < last_step(result):
                runs[seed] = result
        same.results[:] = (runs[seed] for seed in sorted(runs))
    return list(found.values())


def taught(group: Group) -> str:
    """The weights trained in the stage that distils layers."""
    stages = " ".join(group.results[0]["taught"] or ())
    if not stages or group.arm == _TEACHER:
        return "no"
    return "only what is new" if "train: mhla" in stages else "yes"


def last_step(result: dict[str, Any]) -> int:
    """The most steps after which the loss was measured."""
    return max(point["steps"] for point in result["points"])


def losses_at(group: Group, steps: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Seed and held-out losses of each result with a measurement after these steps."""
    for result in group.results:
        for point in result["points"]:
            if point["steps"] == steps:
                yield result["seed"], point["held_out"]


def gap_at(group: Group, steps: int, controls: dict[tuple[int, int], dict[str, Any]]) -> str:
    """The difference from the teacher tuned for as many steps."""
    if group.arm == _TEACHER:
        return "the control"
    pairs = [
        (losses, controls[seed, steps])
        for seed, losses in losses_at(group, steps)
        if (seed, steps) in controls
    ]
    return relative(paired_difference(pairs), 1)


def probe_table(probes: Sequence[dict[str, Any]], arms: Sequence[str]) -> str:
    """Accuracy with 32 and 64 pairs; the numbers of seeds side by side."""
    tasks = sorted({probe["task"] for probe in probes})
    numbers = ("32", "64")
    header = ["attention", *(f"{task}, {n} pairs" for task in tasks for n in numbers)]
    titles = {probe["arm"]: probe["title"] for probe in probes}
    rows = []
    for arm in (arm for arm in arms if arm in titles):
        row = [titles[arm]]
        for task in tasks:
            same = [p for p in probes if p["arm"] == arm and p["task"] == task]
            row += [each([p["accuracy"][n] for p in same], ".2f") or "–" for n in numbers]
        rows.append(row)
    return markdown(header, rows)


def real_lines(folder: Path) -> Iterator[str]:
    """The Fréchet distance between halves of the real data."""
    for name, what in (("real.json", "images"), ("real-clips.json", "clips")):
        if (folder / name).is_file():
            halves = json.loads((folder / name).read_bytes())["frechet_halves"]
            yield f"Two halves of the real {what} are {halves:.1f} apart in Fréchet distance."


def draw_shares(plan: Plan, groups: Sequence[Group], path: Path) -> None:
    """Loss against softmax over the share of exact pairs, with a linear half and alone."""
    kinds = [
        name for name, s in plan.settings.items() if s.kind != "converted" and name != _TEACHER
    ]
    # Without its control, a setting has nothing to draw.
    shown = [n for n in kinds if any((g.setting, g.arm) == (n, plan.control) for g in groups)]
    if not shown:
        return
    figure = Figure(figsize=(5.2 * len(shown), 4.2), layout="constrained")
    for axes, setting in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        same = {g.arm: g for g in groups if g.setting == setting}
        for number, (label, arms) in enumerate(_FAMILIES.items()):
            gaps = {arm: difference(same[arm], groups, plan.control) for arm in arms if arm in same}
            points = [
                (100 * same[arm].mean("pairs"), 100 * gap.relative, 100 * by_seed)
                for arm, gap in gaps.items()
                if gap is not None
                for by_seed in gap.by_seed
            ]
            if points:
                shares, means, seeds = zip(*points, strict=True)
                axes.plot(shares, means, color=f"C{number}", marker="o", label=label)
                # Seeds lie around their mean.
                axes.plot(shares, seeds, ".", color=f"C{number}", alpha=0.6)
        axes.axhline(0, color="black", lw=0.8, ls=":")
        axes.set_xscale("symlog", linthresh=1)
        ticks = [0, 2, 5, 12.5, 25]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        tokens = next(iter(same.values())).tokens
        axes.set(
            title=f"{tokens:,} tokens",
            xlabel="pairs computed exactly, %",
            ylabel="held-out loss against softmax, %",
        )
        axes.grid(alpha=0.3)
        axes.legend()
    save(figure, path)
