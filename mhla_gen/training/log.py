"""What a run reports: a progress bar, JSON lines in log.jsonl, and trackers."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mhla_gen.errors import UserError
from mhla_gen.files import append_line, write_lines
from mhla_gen.files.saved import read_lines
from mhla_gen.training.recent import Recorded
from mhla_gen.training.run_folder import last_checkpoint
from mhla_gen.training.step import StepResult
from mhla_gen.training.training_run import Run

LOG_NAME = "log.jsonl"
# Ranges of the timesteps that losses are noted for, each as wide.
_NUM_RANGES = 10


class RunLog:
    """Losses, learning rate, speed and memory, every `log_every` steps.

    Args:
        run: What is trained.
        path: The log.
        start: Steps done before; later lines of an existing log are dropped.
        title: Name of the progress bar.
        peak_flops: Operations a second of one device, for the share of them that is used; None
            leaves it out.
    """

    def __init__(self, run: Run, path: Path, start: int, title: str, peak_flops: float | None):
        self.run = run
        self.path = path
        self.peak_flops = peak_flops
        show = run.accelerator.is_main_process
        self.bar = tqdm(
            total=run.config.max_steps, initial=start, desc=title, unit="step", disable=not show
        )
        # Steps since then; those of a run before it was resumed do not count for the speed.
        self._steps, self._since = 0, time.perf_counter()
        if show:
            kept = [line for line in read_log(path) if line.get("step", start + 1) <= start]
            write_lines(path, kept)

    def step(self, step: int, result: StepResult, learning_rate: float) -> None:
        """Record a finished step.

        Args:
            step: Steps done, this one included.
            result: What it left.
            learning_rate: The rate that it was made with.

        Raises:
            ValueError: If a loss or a gradient since the last line is not finite.
        """
        self.run.recent.add(result)
        self._steps += 1
        self.bar.update()
        if step % self.run.config.log_every and step != self.run.config.max_steps:
            return
        recorded = self._finite(step)
        rate = self._steps * self.run.config.batch_size / (time.perf_counter() - self._since)
        line: dict[str, Any] = {
            "step": step,
            **{name: float(values.mean()) for name, values in recorded.losses.items()},
            "learning_rate": learning_rate,
            "grad_norm": float(recorded.grad_norms.mean()),
            f"{self.run.task.samples}_per_second": round(rate, 1),
            **self._use_of_device(rate),
        }
        ranges = mean_by_timestep(recorded.losses["loss"].flatten(), recorded.timesteps.flatten())
        self.run.accelerator.log(
            {name: value for name, value in line.items() if name != "step"}
            | {f"loss_by_timestep/{name}": loss for name, loss in ranges.items()},
            step=step,
        )
        self._write({**line, "loss_by_timestep": ranges})
        self.run.recent.clear()
        self._steps, self._since = 0, time.perf_counter()

    def require_finite(self, step: int) -> None:
        """Raise if a loss or gradient since the last line is not finite; before a checkpoint.

        Raises:
            ValueError: With the step, its samples, and the last checkpoint.
        """
        if self.run.recent.recorded() is not None:
            self._finite(step)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude what is done inside from the speed."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def close(self) -> None:
        """Finish the progress bar and the trackers."""
        self.bar.close()
        # Not accelerate's end_training, which ends the group of the processes too.
        for tracker in self.run.accelerator.trackers:
            tracker.finish()

    def _finite(self, step: int) -> Recorded:
        """The steps since the last line, up to this one, if they are all finite."""
        recorded = self.run.recent.recorded()
        assert recorded is not None
        finite = recorded.losses["loss"].isfinite()
        wrong = ~(finite.all(1) & recorded.grad_norms.isfinite())
        if wrong.any():
            first = int(wrong.nonzero()[0])
            positions = (~finite[first]).nonzero().flatten().tolist()
            raise UserError(not_finite(self.run, step - len(finite) + first, positions))
        return recorded

    def _use_of_device(self, samples_per_second: float) -> dict[str, float]:
        used = {}
        if self.peak_flops is not None and self.run.sample_flops is not None:
            flops = samples_per_second * self.run.sample_flops
            used["mfu"] = round(flops / self.peak_flops / self.run.accelerator.num_processes, 4)
        if self.run.accelerator.device.type == "cuda":
            used["memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        return used

    def _write(self, line: dict[str, Any]) -> None:
        shown = [f"loss {line['loss']:.4f}", f"lr {line['learning_rate']:.2g}"]
        samples = self.run.task.samples
        shown += [f"{line[f'{samples}_per_second']:.1f} {samples}/s"]
        shown += [f"MFU {line['mfu']:.1%}"] if "mfu" in line else []
        shown += [f"{line['memory_gib']} GiB"] if "memory_gib" in line else []
        self.bar.set_postfix_str(", ".join(shown), refresh=False)
        if self.run.accelerator.is_main_process:
            append_line(self.path, json.dumps(line))


def mean_by_timestep(losses: Tensor, timesteps: Tensor) -> dict[str, float]:
    """Mean loss of the samples in each non-empty range of timesteps.

    Args:
        losses: `[samples]`.
        timesteps: `[samples]` in [0, 1000].
    """
    width = 1000 // _NUM_RANGES
    numbers = (timesteps.double() / width).floor().long().clamp(max=_NUM_RANGES - 1)
    return {
        f"{number * width:03d}": float(losses[numbers == number].mean())
        for number in range(_NUM_RANGES)
        if (numbers == number).any()
    }


def not_finite(run: Run, number: int, positions: Sequence[int]) -> str:
    """The message about step `number`, counted from 0, whose loss or gradient is not finite.

    Args:
        run: What is trained.
        number: Steps done before.
        positions: Samples of the batch whose loss is not finite.
    """
    names = run.describe(number, positions[:8])
    more = f" and {len(positions) - 8} more" if len(positions) > 8 else ""
    what = f"the loss of step {number + 1} is not finite for {', '.join(names)}{more}"
    if not positions:
        what = f"the gradient of step {number + 1} is not finite"
    last = last_checkpoint(Path(run.config.output_dir))
    # Resuming exactly would end in the same step, and resume=latest refuses other settings.
    kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint"
    return (
        f"{what}; {kept}; start again in another output_dir with a lower learning_rate or "
        "max_grad_norm"
    )


def read_log(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a log, oldest first, each with its step; empty without a log.

    Damaged lines are left out, which is said; a run that is killed may leave half of a last one.
    """
    if not path.is_file():
        return []
    lines, damaged = read_lines(path)
    if damaged:
        some = "a damaged line" if damaged == 1 else f"{damaged} damaged lines"
        tqdm.write(f"{path} has {some}, left out", file=sys.stderr)
    return lines


def start_trackers(run: Run, start: int) -> None:
    """Open TensorBoard or W&B, if `report_to` says so.

    Args:
        run: What is trained.
        start: Steps done before; later curves of an interrupted run are dropped.
    """
    config = run.config
    options: dict[str, Any] = {
        "tensorboard": {"purge_step": start + 1 if start else None},
        "wandb": {"name": config.output_dir, "dir": config.output_dir},
    }
    name = "tensorboard" if config.report_to == "tensorboard" else "mhla_gen"
    run.accelerator.init_trackers(name, init_kwargs=options)
