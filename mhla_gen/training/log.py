"""What a run reports: a progress bar, and one JSON object a line in log.jsonl."""

import json
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from mhla_gen.files import written_whole

LOG_NAME = "log.jsonl"


class RunLog:
    """Mean loss, learning rate and speed, every `every` steps.

    Losses stay on their device until a line is written: reading one waits for the device.

    Args:
        path: The log; None to keep nothing on disk.
        start: Steps done before; later lines of an existing log are dropped.
        stop: Steps of the whole run.
        every: Steps per line.
        title: Name of the progress bar.
        images_per_step: For the speed.
        show: Draw the bar.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        start: int,
        stop: int,
        every: int,
        title: str,
        images_per_step: int,
        show: bool = True,
    ):
        self.path = path
        self.every = every
        self.stop = stop
        self.images_per_step = images_per_step
        self.bar = tqdm(total=stop, initial=start, desc=title, unit="step", disable=not show)
        self._losses: list[dict[str, Tensor]] = []
        self._since = time.perf_counter()
        if path is not None:
            kept = [line for line in read_log(path) if line["step"] <= start]
            with written_whole(path) as partial:
                partial.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def step(self, step: int, losses: Mapping[str, Tensor], learning_rate: float) -> None:
        """Note one finished step.

        Args:
            step: Steps done, this one included.
            losses: Its `loss`, and others to be logged; scalars.
            learning_rate: The rate that it was made with.

        Raises:
            ValueError: If a loss since the last line is not finite.
        """
        self._losses.append({name: loss.detach() for name, loss in losses.items()})
        self.bar.update()
        if step % self.every and step != self.stop:
            return
        noted = {name: torch.stack([loss[name] for loss in self._losses]) for name in losses}
        finite = noted["loss"].isfinite()
        if not bool(finite.all()):
            first = step - len(finite) + 1 + int((~finite).nonzero()[0])
            raise ValueError(
                f"the loss of step {first} is not finite; lower learning_rate or max_grad_norm, "
                "and go on from the last checkpoint with resume=latest"
            )
        seconds = time.perf_counter() - self._since
        line = {
            "step": step,
            **{name: float(values.mean()) for name, values in noted.items()},
            "learning_rate": learning_rate,
            "images_per_second": round(len(finite) * self.images_per_step / seconds, 1),
        }
        self.bar.set_postfix_str(f"loss {line['loss']:.4f}", refresh=False)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        self._losses, self._since = [], time.perf_counter()

    def close(self) -> None:
        """Finish the progress bar."""
        self.bar.close()


def read_log(path: Path) -> list[dict[str, float]]:
    """The whole lines of a log, oldest first; none if there is no log."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            # A run that was killed may have left half of its last line.
            break
    return lines
