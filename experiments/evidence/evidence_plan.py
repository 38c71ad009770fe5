"""The plan of a comparison: which runs there are, and in which order they run."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml
from moving_emoji import FRAMES, SIDE

from mhla_gen.config import TrainConfig, load_config

PLAN = Path(__file__).with_name("arms.yaml")
BASE = PLAN.with_name("base.yaml")

Kind = Literal["new", "converted", "clips"]


@dataclass(frozen=True)
class Setting:
    """Settings shared by runs that are compared with each other."""

    name: str
    tokens: int
    """Of an image or a clip."""
    set: tuple[str, ...] = ()
    """Changes to base.yaml."""
    kind: Kind = "new"
    """new: trained from scratch on images; converted: from the weights of another run; clips: from
    scratch on clips."""
    start: str | None = None
    """converted: name of the run whose weights are converted."""
    points: tuple[int, ...] = ()
    """converted: the numbers of steps after which it is measured."""
    taught: tuple[str, ...] | None = None
    """converted: what a stage that distils layer by layer, before step 0, changes in `set`; None
    for no such stage."""


@dataclass(frozen=True)
class Run:
    """One model to train: an arm in a setting, with a seed."""

    arm: str
    title: str
    setting: Setting
    seed: int
    set: tuple[str, ...]
    """Changes of the arm to the setting."""
    samples: bool = True
    """Whether samples are drawn and scored."""

    @property
    def name(self) -> str:
        """Name of its result."""
        return f"{self.arm}-{self.setting.name}-s{self.seed}"

    @property
    def speed_name(self) -> str:
        """Name of its measured speed."""
        return f"speed-{self.arm}-{self.setting.name}"

    @property
    def tokens(self) -> int:
        """Of an image or a clip."""
        return self.setting.tokens

    @property
    def grid(self) -> tuple[int, ...]:
        """Tokens along each axis."""
        if self.setting.kind == "clips":
            return FRAMES, SIDE, SIDE
        side = math.isqrt(self.tokens)
        return side, side

    def config(self, *overrides: str) -> TrainConfig:
        """The settings of its training, with more overrides at the end."""
        own = (*self.setting.set, *self.set, f"seed={self.seed}")
        return load_config(BASE, [*own, *overrides])


class Plan:
    """The contents of a plan's file.

    Args:
        path: A file with `settings`, `arms` and `order`. One with `extends` takes what it lacks
            from the plan of that name beside it; its `set` changes all arms.

    Raises:
        ValueError: If a line of `order` names an unknown arm or setting or occurs twice, or a
            setting starts from a run that does not come before it.
    """

    def __init__(self, path: str | Path = PLAN):
        self.path = Path(path)
        self._values = _read(self.path)
        self.control: str = self._values["control"]
        """The arm that the others are compared with."""
        self.tables: Literal["mixing", "exact", "losses"] = self._values["tables"]
        """Subject of the report: mixing matrices, for which the attention of trained models is
        inspected, exact pairs, or losses alone."""
        self.speed = [self._run(f"{line} 0") for line in self._values.get("speed", ())]
        """What the speed is measured of."""
        self.past = [self._run(line) for line in self._values.get("past", ())]
        """Runs whose results are shown, although their settings are gone."""
        self.probe: tuple[str, ...] = tuple(self._values.get("probe", ()))
        """Arms of the probe."""

    @cached_property
    def settings(self) -> dict[str, Setting]:
        """By name."""
        found = {}
        for name, values in self._values["settings"].items():
            lists = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
            found[str(name)] = Setting(str(name), **lists)
        return found

    @property
    def titles(self) -> dict[str, str]:
        """Name and title of every arm, in the order of the tables."""
        return {name: arm["title"] for name, arm in self._values["arms"].items()}

    @cached_property
    def runs(self) -> list[Run]:
        """All runs, the most informative first."""
        runs = [self._run(line) for line in self._values["order"]]
        names = [run.name for run in runs]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{self.path} orders {', '.join(twice)} more than once")
        for number, run in enumerate(runs):
            if run.setting.start not in (None, *names[:number]):
                raise ValueError(
                    f"{run.name} starts from {run.setting.start}, which {self.path} must order "
                    "before it"
                )
        return runs

    def _run(self, line: str) -> Run:
        parts, arms = line.split(), self._values["arms"]
        known = len(parts) > 2 and parts[0] in arms and parts[1] in self.settings
        if not known or parts[3:] not in ([], ["loss"]):
            raise ValueError(
                "a line of order is ARM SETTING SEED, with an arm and a setting of the plan, and "
                f"perhaps the word loss; found {line!r}"
            )
        arm = arms[parts[0]]
        changes = (*self._values.get("set", ()), *arm["set"])
        setting = self.settings[parts[1]]
        return Run(parts[0], arm["title"], setting, int(parts[2]), changes, parts[3:] == [])


def _read(path: Path) -> dict[str, Any]:
    plan = yaml.safe_load(path.read_bytes())
    return _read(path.with_name(plan["extends"])) | plan if "extends" in plan else plan
