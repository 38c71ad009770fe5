"""Results as rows: seeds together, each compared with the control of the same seed."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from evidence_plan import Plan


@dataclass(frozen=True)
class Group:
    """All seeds of one arm in one setting."""

    arm: str
    title: str
    setting: str
    results: list[dict[str, Any]]
    speed: dict[str, Any] | None = None
    """Results of experiments/evidence/evidence_speed.py."""

    @property
    def tokens(self) -> int:
        """Of an image or a clip."""
        return self.results[0]["tokens"]

    def mean(self, *keys: str) -> float:
        """Mean over seeds of a number deep inside the results; NaN where it is missing."""
        return float(np.mean(self.values(*keys)))

    def values(self, *keys: str) -> list[float]:
        """One number for each seed."""
        found = []
        for result in self.results:
            value: Any = result
            for key in keys:
                value = value[key]
            found.append(float("nan") if value is None else float(value))
        return found

    def layers(self, quantity: str) -> np.ndarray:
        """rank, effective_rank or entropy of every layer, the mean over seeds."""
        rows = [[layer[quantity] for layer in result["layers"]] for result in self.results]
        return np.mean(rows, axis=0)


def load_groups(folder: Path, plan: Plan) -> list[Group]:
    """Results in a folder, by setting, then in the order of the plan's arms.

    Raises:
        FileNotFoundError: If the folder holds no result of the plan.
    """
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in (*plan.runs, *plan.past):
        path = folder / f"{run.name}.json"
        if path.is_file():
            found.setdefault((run.setting.name, run.arm), []).append(json.loads(path.read_bytes()))
    if not found:
        raise FileNotFoundError(f"{folder} holds no result of the plan; run evidence_launch.py")
    return [
        Group(arm, title, setting, found[setting, arm], _speed_of(folder, arm, setting))
        for setting in plan.settings
        for arm, title in plan.titles.items()
        if (setting, arm) in found
    ]


def _speed_of(folder: Path, arm: str, setting: str) -> dict[str, Any] | None:
    path = folder / f"speed-{arm}-{setting}.json"
    return json.loads(path.read_bytes()) if path.is_file() else None


@dataclass(frozen=True)
class Difference:
    """Held-out loss of an arm relative to the control's with the same seed."""

    relative: float
    error: float
    """Standard error over images, of both relative to the control's loss; not over seeds."""
    by_seed: list[float]


def difference(group: Group, groups: Sequence[Group], control: str) -> Difference | None:
    """An arm against the control, paired by seed and image; None if they share no seed."""
    others = {
        result["seed"]: result["held_out"]
        for other in groups
        if other.arm == control and other.setting == group.setting
        for result in other.results
    }
    pairs = [(r["held_out"], others[r["seed"]]) for r in group.results if r["seed"] in others]
    return paired_difference(pairs)


def paired_difference(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> Difference | None:
    """Losses of an arm against those of the control, paired by seed; None without losses."""
    gaps, means = [], []
    for found in pairs:
        ours, theirs = (np.array(losses["per_image"]) for losses in found)
        gaps.append((ours - theirs) / theirs.mean())
        means.append(float(gaps[-1].mean()))
    if not gaps:
        return None
    pooled = np.mean(gaps, axis=0)
    error = float(pooled.std(ddof=1) / len(pooled) ** 0.5)
    return Difference(float(pooled.mean()), error, means)


QUALITY = (
    "arm", "seeds", "held-out loss", "against control", "Fréchet", "KID × 1000",
    "precision / recall", "recognised", "copies",
)  # fmt: skip
COST = ("arm", "parameters", "effective rank", "entropy")
SPEED = ("training images/s", "sampling images/s", "training GiB")


def quality_table(groups: Sequence[Group], control: str) -> str:
    """Quality of the samples, as a Markdown table."""
    return markdown(QUALITY, [_quality_row(group, groups, control) for group in groups])


def cost_table(groups: Sequence[Group]) -> str:
    """Statistics and cost of the attention, as a Markdown table; speeds if measured."""
    timed = any(group.speed for group in groups)
    rows = [
        [
            group.title,
            f"{group.mean('parameters') / 1e6:.3f} M",
            f"{group.layers('effective_rank').mean():.1f}",
            f"{group.layers('entropy').mean():.2f}",
            *(_speeds(group) if timed else ()),
        ]
        for group in groups
    ]
    return markdown(COST + SPEED if timed else COST, rows)


def against_control(group: Group, groups: Sequence[Group], control: str) -> str:
    """The relative difference of the losses, with its standard error, and that of each seed."""
    if group.arm == control:
        return "the control"
    return relative(difference(group, groups, control), 2)


def relative(gap: Difference | None, digits: int) -> str:
    """A difference in percent with its standard error, and that of each of several seeds."""
    if gap is None:
        return "–"
    form = f"+.{digits}%"
    of_seeds = f" ({each(gap.by_seed, form)})" if len(gap.by_seed) > 1 else ""
    return f"{gap.relative:{form}} ± {gap.error:.{digits}%}{of_seeds}"


def frechet(group: Group) -> str:
    """The distance of every seed with samples; of a single one, with its interval."""
    scores = [result["scores"] for result in group.results if "scores" in result]
    if not scores:
        return "–"
    interval = ""
    if len(scores) == 1:
        ends = scores[0]["frechet_interval"]
        interval = f" ± {(ends['high'] - ends['low']) / 2:.1f}"
    return each([score["frechet"] for score in scores], ".1f") + interval


def _quality_row(group: Group, groups: Sequence[Group], control: str) -> list[str]:
    return [
        group.title,
        str(len(group.results)),
        f"{group.mean('held_out', 'mean'):.5f}",
        against_control(group, groups, control),
        frechet(group),
        each([1000 * x for x in group.values("scores", "kid")], ".1f"),
        f"{group.mean('scores', 'precision'):.3f} / {group.mean('scores', 'recall'):.3f}",
        f"{group.mean('scores', 'recognised'):.1%}",
        f"{group.mean('scores', 'copies'):.1%}",
    ]


def _speeds(group: Group) -> list[str]:
    if group.speed is None:
        return ["–"] * 3
    train, sample = group.speed["train"], group.speed["sample"]
    gib = f"{train['gib']:.1f}" if "gib" in train else "–"
    return [f"{train['images_per_second']:.0f}", f"{sample['images_per_second']:.0f}", gib]


def each(values: Sequence[float], form: str) -> str:
    """Numbers of seeds."""
    return ", ".join(f"{value:{form}}" for value in values)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, without columns in which nothing is measured."""
    columns = [n for n in range(len(header)) if not rows or any(row[n] != "–" for row in rows)]
    lines = [[line[n] for n in columns] for line in (header, *rows)]
    lines.insert(1, ["---"] * len(columns))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
