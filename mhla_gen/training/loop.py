"""The training loop."""

import sys
from contextlib import closing, nullcontext
from pathlib import Path

from tqdm import tqdm

from mhla_gen.config import TrainConfig, save_config
from mhla_gen.data import EncodedImages
from mhla_gen.data.caching.cached import CachedLatents
from mhla_gen.data.caching.index import QUARANTINE_NAME
from mhla_gen.files import written_whole
from mhla_gen.files.saved import sizes_below
from mhla_gen.hub import PIPELINE_NAME
from mhla_gen.models.short import too_short_model
from mhla_gen.outputs.folders import CONFIG_NAME
from mhla_gen.outputs.locks import claimed
from mhla_gen.runtime.processes import on_main, tell
from mhla_gen.training.checkpoints import (
    last_pipeline,
    load_latest,
    require_whole_pipeline,
    save_checkpoint,
    write_facts,
)
from mhla_gen.training.log import LOG_NAME, RunLog, start_trackers
from mhla_gen.training.parallel import build_accelerator
from mhla_gen.training.previews import (
    evaluate_samples,
    has_previews,
    has_scores,
    write_previews,
)
from mhla_gen.training.readiness import open_what_is_needed
from mhla_gen.training.run_folder import check_output_dir, last_checkpoint, pipeline_steps
from mhla_gen.training.run_pipeline import write_pipeline
from mhla_gen.training.stopping import Stopped, StopRequest
from mhla_gen.training.throughput import peak_flops
from mhla_gen.training.training_run import Run, build_run
from mhla_gen.training.undisturbed import undisturbed


def train(config: TrainConfig, title: str = "training") -> Path:
    """Train, writing a log, checkpoints, and at the end the pipeline with the EMA weights.

    Step k is a function of the config and of the weights before it, so `resume=latest` resumes an
    interrupted run exactly (docs/training.md names what is only the same up to rounding). SIGTERM
    and a first SIGINT stop it with a checkpoint.

    Args:
        config: Settings; `output_dir` gets config.yaml, log.jsonl, checkpoint-N, previews and
            pipeline.
        title: Name of the progress bar.

    Returns:
        The folder of the trained pipeline.

    Raises:
        ValueError: If settings and data do not fit together, or the loss is not finite.
        OSError: If data are missing, the output folder holds something else, or is full.
        Stopped: If a signal stopped it.
    """
    check_output_dir(config)
    # Joins the processes of a launch, which have the folder together.
    build_accelerator(config)
    with claimed(config.output_dir):
        # Again: another command may have had the folder in between.
        on_main(lambda: check_output_dir(config))
        folder = Path(config.output_dir)
        if pipeline_steps(folder) == config.max_steps:
            on_main(lambda: require_whole_pipeline(folder))
            if build_accelerator(config).is_main_process:
                done = f"{folder} is already finished: all {config.max_steps} steps are done"
                tqdm.write(f"{done}; nothing was run", file=sys.stderr)
            return folder / PIPELINE_NAME
        return run_to_end(build_run(config), title)


def run_to_end(run: Run, title: str) -> Path:
    """Train a built run, from its newest checkpoint, in a folder locked for it.

    Arguments, result and errors as those of `train`.
    """
    config, folder = run.config, Path(run.config.output_dir)
    open_what_is_needed(run)
    if run.accelerator.is_main_process:
        save_config(config, folder / CONFIG_NAME)
    _list_left_out(run, folder)
    start = load_latest(run)
    start_trackers(run, start)
    peak = peak_flops(run.accelerator.device, config.mixed_precision)
    processes, device = run.accelerator.num_processes, run.accelerator.device.type
    tell(f"{title}: {processes} process{'es' if processes > 1 else ''} on {device}")
    if note := too_short_model(run.task.model):
        tell(note)
    log = RunLog(run, folder / LOG_NAME, start, title, peak)
    with closing(log), undisturbed(), StopRequest(run.accelerator) as stop:
        with log.paused():
            _catch_up(run, start)
        for number, parts in enumerate(run.batches(start, config.max_steps), start):
            learning_rate = run.learning_rate.get_last_lr()[0]
            result = run.step(number, parts)
            done = number + 1
            log.step(done, result, learning_rate)
            stopping = stop.made() and done < config.max_steps
            with log.paused():
                if stopping or _checkpoint_due(done, config):
                    log.require_finite(done)
                    save_checkpoint(run, done)
                if stopping:
                    again = "" if config.resume == "latest" else " with resume=latest"
                    raise Stopped(
                        f"{stop.name} after step {done}; wrote {last_checkpoint(folder)}, from "
                        f"which the same command{again} resumes"
                    )
                if _due(done, config.sample_every):
                    write_previews(run, done)
                if _due(done, config.evaluate_every):
                    evaluate_samples(run, done)
    return save_pipeline(run, folder / PIPELINE_NAME)


def save_pipeline(run: Run, folder: Path) -> Path:
    """Save the pipeline with the EMA weights; every process must call it."""
    main = run.accelerator.is_main_process
    with written_whole(folder) if main else nullcontext(folder) as partial:
        write_pipeline(run, partial, last_pipeline(folder.parent))
        if main:
            write_facts(run, partial, run.config.max_steps, sizes_below(partial))
    run.accelerator.wait_for_everyone()
    return folder


def _list_left_out(run: Run, folder: Path) -> None:
    """Report, and list, which data the model does not see."""
    if isinstance(run.data, EncodedImages):
        run.data.leave_out(folder / QUARANTINE_NAME)
    warning = run.data.index.warning if isinstance(run.data, CachedLatents) else None
    if warning and run.accelerator.is_main_process:
        tqdm.write(warning, file=sys.stderr)


def _catch_up(run: Run, start: int) -> None:
    """Make up for what a run, stopped after a checkpoint, had not done yet."""
    config, folder = run.config, Path(run.config.output_dir)
    if _due(start, config.sample_every) and not on_main(lambda: has_previews(folder, start)):
        write_previews(run, start)
    if _due(start, config.evaluate_every) and not on_main(lambda: has_scores(folder, start)):
        evaluate_samples(run, start)


def _checkpoint_due(step: int, config: TrainConfig) -> bool:
    # The last step, too: a run may be continued with more steps.
    last = config.checkpoint_every > 0 and step == config.max_steps
    return last or _due(step, config.checkpoint_every)


def _due(step: int, every: int) -> bool:
    return step > 0 and every > 0 and step % every == 0
