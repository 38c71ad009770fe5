"""Results of the comparison as rows: seeds together, each beside the control of the same seed."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from evidence_plan import PLAN, read_plan, read_titles

CONTROL = "linear-conv-gate"
"""Same convolution, same gate, one block: what MHLA has to beat."""


@dataclass(frozen=True)
class Group:
    """All seeds of one arm at one number of tokens."""

    arm: str
    title: str
    tokens: int
    results: list[dict[str, Any]]
    speed: dict[str, Any] | None = None
    """What experiments/evidence/evidence_speed.py measured."""

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


def load_groups(folder: Path, plan: Path = PLAN) -> list[Group]:
    """Results in a folder, by tokens, then in the order of the plan's arms.

    Raises:
        FileNotFoundError: If the folder holds no result of the plan.
    """
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for run in read_plan(plan):
        path = folder / f"{run.name}.json"
        if path.is_file():
            found.setdefault((run.tokens, run.arm), []).append(json.loads(path.read_text()))
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no result of the plan; run experiments/evidence/evidence_run.py"
        )
    titles = read_titles(plan)
    order = list(titles)
    keys = sorted(found, key=lambda key: (key[0], order.index(key[1])))
    return [
        Group(arm, titles[arm], tokens, found[tokens, arm], _speed_of(folder, arm, tokens))
        for tokens, arm in keys
    ]


def _speed_of(folder: Path, arm: str, tokens: int) -> dict[str, Any] | None:
    path = folder / f"speed-{arm}-{tokens}.json"
    return json.loads(path.read_text()) if path.is_file() else None


@dataclass(frozen=True)
class Difference:
    """Held-out loss of an arm relative to the control's with the same seed."""

    relative: float
    error: float
    """Standard error over images, of both relative to the control's loss; not over seeds."""
    by_seed: list[float]


def difference(group: Group, groups: Sequence[Group]) -> Difference | None:
    """An arm beside the control, seed by seed, image by image; None where they share no seed."""
    control = next((g for g in groups if g.arm == CONTROL and g.tokens == group.tokens), None)
    if control is None:
        return None
    others = {result["seed"]: result for result in control.results}
    gaps, means = [], []
    for result in group.results:
        if result["seed"] in others:
            ours, theirs = (
                np.array(r["held_out"]["per_image"]) for r in (result, others[result["seed"]])
            )
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


def quality_table(groups: Sequence[Group]) -> str:
    """What the samples are worth, as a Markdown table."""
    return markdown(QUALITY, [_quality_row(group, groups) for group in groups])


def cost_table(groups: Sequence[Group]) -> str:
    """What the attention is like and what it costs, as a Markdown table; speeds if measured."""
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


def _quality_row(group: Group, groups: Sequence[Group]) -> list[str]:
    gap = difference(group, groups)
    against = "the control" if group.arm == CONTROL else "–"
    if gap and group.arm != CONTROL:
        against = f"{gap.relative:+.2%} ± {gap.error:.2%}"
        if len(gap.by_seed) > 1:
            against += f" ({', '.join(f'{x:+.2%}' for x in gap.by_seed)})"
    return [
        group.title,
        ", ".join(f"{seed:.0f}" for seed in group.values("seed")),
        f"{group.mean('held_out', 'mean'):.5f}",
        against,
        _each(group.values("scores", "frechet"), ".1f") + _interval(group),
        _each([1000 * x for x in group.values("scores", "kid")], ".1f"),
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


def _each(values: list[float], form: str) -> str:
    return ", ".join(f"{value:{form}}" for value in values)


def _interval(group: Group) -> str:
    if len(group.results) > 1:
        return ""
    interval = group.results[0]["scores"]["frechet_interval"]
    return f" ± {(interval['high'] - interval['low']) / 2:.1f}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
