"""What all runs of the comparison share: settings, data, judges and folders."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from evidence_clips import ClipJudge
from evidence_data import Real, load_clips, load_real, once
from evidence_plan import Run
from evidence_scores import Judge
from PIL import Image

from mhla_gen.config import TrainConfig
from mhla_gen.files import write_json, write_picture
from mhla_gen.runtime.devices import resolve_device


class Workshop:
    """Settings, data, judges and folders that all runs share; data are made when first needed.

    Args:
        options: Command-line options: `data`, `out`, `work`, `overrides`, and sizes.
        inspect: Whether the attention of trained models is inspected.
    """

    def __init__(self, options: Any, inspect: bool = False):
        self.options, self.inspect = options, inspect
        self.out: Path = options.out
        self.work: Path = options.work or options.out / "work"
        self.device = resolve_device("auto")
        self.stopped = False
        """Whether SIGTERM came while a result was measured."""

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Put SIGTERM off: what is left takes seconds, and a trained model would be lost."""

        def note(*_: object) -> None:
            self.stopped = True

        old = signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, old)

    def config(self, run: Run, *changes: str) -> TrainConfig:
        """All settings of one run: those of the plan, with overrides from the command line."""
        return run.config(
            f"data.path={self.training_file(run.setting.kind)}",
            f"output_dir={self.work / run.name}",
            "report_to=none",
            "sample_every=0",
            "resume=latest",
            *changes,
            *self.options.overrides,
        )

    @cached_property
    def images(self) -> Real:
        """The images; their training part is written where `training_file` says."""
        real = load_real(self.options.data)
        once(self.training_file("new"), lambda: real.save_training(self.training_file("new")))
        return real

    @cached_property
    def clips(self) -> Real:
        """The clips, likewise."""
        options, file = self.options, self.training_file("clips")
        real = load_clips(
            self.images, self.work / "clips.npz", options.clips, options.held_out_clips
        )
        once(file, lambda: real.save_training(file))
        return real

    @cached_property
    def judge(self) -> Judge:
        """Of images."""
        kept = self.work / "features.pt"
        return self._judge(Judge(self.images, self.device, kept), "real.json")

    @cached_property
    def clip_judge(self) -> ClipJudge:
        """Of clips."""
        kept = self.work / "clip-features.pt"
        return self._judge(ClipJudge(self.clips, self.device, kept), "real-clips.json")

    def _judge(self, judge: Any, name: str) -> Any:
        path = self.out / name
        once(path, lambda: write_json(path, judge.score_real()))
        path.with_name(f"{name}.lock").unlink(missing_ok=True)
        return judge

    def training_file(self, kind: str) -> Path:
        """Training data of a kind of runs."""
        return self.work / ("train-clips.npz" if kind == "clips" else "train.npz")

    def draw(self, name: str, samples: np.ndarray, labels: np.ndarray) -> None:
        """The first sample of every class in one row: the same noise in every arm."""
        firsts = [samples[labels == c][0] for c in np.unique(labels)]
        picture = Image.fromarray(np.concatenate(firsts, axis=1))
        write_picture(self.out / f"{name}.png", picture)
