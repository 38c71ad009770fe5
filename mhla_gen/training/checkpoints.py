"""Checkpoints: folders `checkpoint-N` with all that a run needs to go on exactly."""

import os
import shutil
from pathlib import Path

from accelerate import Accelerator

from mhla_gen.config import TrainConfig, load_config, save_config
from mhla_gen.files import CONFIG_NAME, differences

_PREFIX = "checkpoint-"
# A resumed run may differ in these: they do not change what a step computes.
_FREE = ("output_dir", "resume", "checkpoint_every", "keep_checkpoints", "log_every")


def checkpoints(folder: Path) -> dict[int, Path]:
    """Complete checkpoints in a run's folder, by step, oldest first."""
    found = {
        int(path.name.removeprefix(_PREFIX)): path
        for path in folder.glob(f"{_PREFIX}*")
        if path.name.removeprefix(_PREFIX).isdecimal()
    }
    return dict(sorted(found.items()))


def save_checkpoint(accelerator: Accelerator, config: TrainConfig, step: int) -> None:
    """Write `checkpoint-<step>`, then remove the oldest beyond `keep_checkpoints`.

    The folder gets its name when all processes have written their part, so a run that is killed
    meanwhile keeps its previous checkpoints. Weights, optimizer, random states, and what was
    registered with the accelerator (EMA, learning rate) are in it; the position in the data is the
    step.
    """
    folder = Path(config.output_dir)
    partial = folder / f".{_PREFIX}{step}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    save_config(config, partial / CONFIG_NAME)
    target = folder / f"{_PREFIX}{step}"
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    for old in list(checkpoints(folder).values())[: -config.keep_checkpoints]:
        shutil.rmtree(old)


def load_latest(accelerator: Accelerator, config: TrainConfig) -> int:
    """Restore the newest checkpoint of the run, if it has one; the number of steps it has done."""
    found = checkpoints(Path(config.output_dir))
    if not found:
        return 0
    step = max(found)
    accelerator.load_state(str(found[step]))
    return step


def check_output_dir(config: TrainConfig) -> None:
    """Raise unless the output folder is free, or holds a run that this config may go on with.

    Raises:
        FileExistsError: If it holds anything else.
    """
    folder = Path(config.output_dir)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / CONFIG_NAME).is_file():
        raise FileExistsError(
            f"output_dir {folder} exists and is no training run; choose another one"
        )
    if config.resume == "never":
        raise FileExistsError(
            f"output_dir {folder} holds a run; add resume=latest to go on with it, "
            "or choose another one"
        )
    # A constant learning rate does not know the length of the run; the others do.
    constant = config.lr_scheduler == "constant_with_warmup"
    free = (*_FREE, "max_steps") if constant else _FREE
    changes = differences(load_config(folder / CONFIG_NAME, schema=TrainConfig), config, free)
    if changes:
        raise FileExistsError(
            f"the run in {folder} had other settings and cannot go on exactly "
            f"({'; '.join(changes)})"
        )
