"""The plan of the comparison: which arms there are, and in which order they run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mhla_gen.config import TrainConfig, load_config

PLAN = Path(__file__).with_name("arms.yaml")
BASE = PLAN.with_name("base.yaml")


@dataclass(frozen=True)
class Run:
    """One model to train: an arm, a number of tokens and a seed."""

    arm: str
    title: str
    tokens: int
    seed: int
    overrides: tuple[str, ...]
    """What it changes in base.yaml."""

    @property
    def name(self) -> str:
        """Name of its result."""
        return f"{self.arm}-{self.tokens}-s{self.seed}"

    def config(self, *overrides: str) -> TrainConfig:
        """The settings of its training, with more overrides at the end."""
        return load_config(BASE, [*self.overrides, f"seed={self.seed}", *overrides])


def read_titles(path: str | Path = PLAN) -> dict[str, str]:
    """Name and title of every arm, in the order of the tables."""
    return {name: arm["title"] for name, arm in _read(Path(path))["arms"].items()}


def read_plan(path: str | Path = PLAN) -> list[Run]:
    """All runs of a plan, the most informative first.

    Args:
        path: A file with `tokens`, `arms` and `order`. One with `extends` takes what it lacks from
            the plan of that name beside it; its `set` changes all arms.

    Raises:
        ValueError: If a line of `order` names no arm or number of tokens, or comes twice.
    """
    plan = _read(Path(path))
    runs = [_run(plan, line) for line in plan["order"]]
    names = [run.name for run in runs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{path} orders {', '.join(twice)} more than once")
    return runs


def _read(path: Path) -> dict[str, Any]:
    plan = yaml.safe_load(path.read_text())
    return _read(path.with_name(plan["extends"])) | plan if "extends" in plan else plan


def _run(plan: dict[str, Any], line: str) -> Run:
    parts: Sequence[str] = line.split()
    known = len(parts) == 3 and parts[0] in plan["arms"] and int(parts[1]) in plan["tokens"]
    if not known:
        raise ValueError(
            f"a line of order is ARM TOKENS SEED with an arm and tokens of the plan, found {line!r}"
        )
    arm, tokens = plan["arms"][parts[0]], int(parts[1])
    overrides = (*plan["tokens"][tokens], *plan.get("set", ()), *arm["set"])
    return Run(parts[0], arm["title"], tokens, int(parts[2]), overrides)
