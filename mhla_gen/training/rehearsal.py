"""A dry run: everything is built, two steps are done, and nothing is written."""

import time
from dataclasses import replace
from datetime import timedelta
from typing import cast

import torch
from torch import Tensor

from mhla_gen.config import TrainConfig
from mhla_gen.data.caching.cached import CachedLatents
from mhla_gen.models.short import too_short_model
from mhla_gen.training.build import build_task
from mhla_gen.training.parallel import build_accelerator, check_tracker
from mhla_gen.training.readiness import open_what_is_needed
from mhla_gen.training.run_folder import check_output_dir
from mhla_gen.training.task import BuildTask
from mhla_gen.training.training_run import Run, build_run
from mhla_gen.training.undisturbed import undisturbed

# Seconds of a step on a CPU that a rehearsal takes the time for.
_AFFORDED = 5.0


def rehearse(config: TrainConfig, build: BuildTask = build_task) -> str:
    """Build everything and do two steps in memory; returns a short report.

    On a GPU the steps have the batch of the run, to show its memory. On a CPU they have at most 4
    samples per micro-batch, and time is taken to go with the batch; where a step of the run takes
    seconds, such steps follow, as a step is more than its samples.

    Args:
        config: Settings.
        build: As in `build_run`.

    Raises:
        ValueError: As `train`.
        OSError: As `train`.
    """
    check_output_dir(config)
    check_tracker(config)
    config = replace(config, report_to="none")
    accelerator = build_accelerator(config)
    parts = accelerator.num_processes * config.gradient_accumulation_steps
    on_gpu = accelerator.device.type == "cuda"
    size = config.batch_size if on_gpu else min(config.batch_size, 4 * parts)
    run = build_run(replace(config, batch_size=size), build)
    open_what_is_needed(run)
    with undisturbed():
        loss, seconds = _two_steps(run)
        if seconds * config.batch_size / size < _AFFORDED and size < config.batch_size:
            size = config.batch_size
            run = replace(run, config=replace(config, batch_size=size))
            _, seconds = _two_steps(run)
    total = timedelta(seconds=round(seconds * config.batch_size / size * config.max_steps))
    parameters = [p.numel() for p in run.model.parameters()]
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    epochs = config.max_steps * config.batch_size / len(run.data)
    left_out = run.data.index.warning if isinstance(run.data, CachedLatents) else None
    notes = [note for note in (left_out, too_short_model(run.task.model)) if note]
    flops = ""
    if run.sample_flops is not None:
        flops = f"; {run.sample_flops / 1e9:.4g} GFLOP per sample and step"
    memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if on_gpu else ""
    return (
        f"{run.task.summary}; {config.model.attention} model with "
        f"{sum(parameters) / 1e6:.2f} M parameters, {trained / 1e6:.2f} M trained{flops}; "
        f"first loss {loss:.4f}; "
        f"{seconds:.3g} s per step of {size}{memory}; {config.max_steps} steps of "
        f"{config.batch_size} are {epochs:.1f} epochs and take about {total}"
        f"{''.join(f'; {note}' for note in notes)}"
    )


def _two_steps(run: Run) -> tuple[float, float]:
    """The loss of the first step, and the seconds of the second: the first one warms up.

    The same in all processes: the seconds are those of the slowest.
    """
    results, began = [], 0.0
    for number, parts in enumerate(run.batches(0, 2)):
        began = time.perf_counter()
        # Every process has as many samples.
        losses = run.step(number, parts).losses["loss"]
        results.append(float(cast(Tensor, run.accelerator.gather(losses)).mean()))
    spent = torch.tensor([time.perf_counter() - began], device=run.accelerator.device)
    slowest = cast(Tensor, run.accelerator.gather(spent))
    return results[0], float(slowest.max())
