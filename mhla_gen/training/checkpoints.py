"""Checkpoints: folders `checkpoint-N` with all that a run needs to go on exactly."""

import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from mhla_gen.config import TrainConfig, load_config, save_config
from mhla_gen.files import CONFIG_NAME, differences
from mhla_gen.training.run import Run

_PREFIX = "checkpoint-"
_FACTS_NAME = "run.json"
# A resumed run may differ in these, and in all below them: they do not change what a step computes.
_FREE = (
    "output_dir",
    "resume",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "report_to",
    "sample_every",
    "samples",
    "evaluate_every",
    "evaluation",
)


def checkpoints(folder: Path) -> dict[int, Path]:
    """Complete checkpoints in a run's folder, by step, oldest first."""
    found = {
        int(path.name.removeprefix(_PREFIX)): path
        for path in folder.glob(f"{_PREFIX}*")
        if path.name.removeprefix(_PREFIX).isdecimal()
    }
    return dict(sorted(found.items()))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in a run's folder."""
    return next(reversed(checkpoints(folder).values()), None)


def save_checkpoint(run: Run, step: int) -> Path:
    """Write `checkpoint-<step>`, then remove the oldest beyond `keep_checkpoints`.

    The folder gets its name when all processes have written their part, so a run that is killed
    meanwhile, or finds no room, keeps its previous checkpoints. Weights, optimizer, random states
    of every process, and what was registered with the accelerator (EMA, learning rate) are in it;
    the position in the data is the step.

    Returns:
        The folder.

    Raises:
        OSError: If it cannot be written.
    """
    accelerator, folder = run.accelerator, Path(run.config.output_dir)
    partial, target = folder / f".{_PREFIX}{step}.partial", folder / f"{_PREFIX}{step}"
    if accelerator.is_main_process:
        for left in folder.glob(f".{_PREFIX}*.partial"):
            shutil.rmtree(left, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(partial))
        if accelerator.is_main_process:
            save_config(run.config, partial / CONFIG_NAME)
            facts = json.dumps({"step": step, "num_samples": len(run.data)})
            (partial / _FACTS_NAME).write_text(facts + "\n")
    # A full disk is one of these, by who was writing.
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        last = last_checkpoint(folder) or "none"
        raise OSError(
            f"{target} could not be written ({str(error).splitlines()[0]}); the last checkpoint is "
            f"{last}; make room, and go on with resume=latest"
        ) from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
        for old in list(checkpoints(folder).values())[: -run.config.keep_checkpoints]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return target


def load_latest(run: Run) -> int:
    """Restore the newest checkpoint of the run, if it has one; the number of steps it has done.

    Raises:
        ValueError: If it is of another model, or the data have changed.
    """
    found = checkpoints(Path(run.config.output_dir))
    if not found:
        return 0
    step, folder = max(found.items())
    facts = json.loads((folder / _FACTS_NAME).read_text())
    if facts["num_samples"] != len(run.data):
        raise ValueError(
            f"{folder} was trained on {facts['num_samples']} samples, but the data are "
            f"{len(run.data)} now: the run cannot go on exactly; restore the data, or start a new "
            "run in another output_dir"
        )
    if not run.accelerator.is_fsdp2:
        changes = different_weights(folder, run.accelerator.unwrap_model(run.model))
        if changes:
            raise ValueError(
                f"{folder} is a checkpoint of another model ({'; '.join(changes[:3])}"
                f"{f'; and {len(changes) - 3} more' if len(changes) > 3 else ''})"
            )
    run.accelerator.load_state(str(folder))
    return step


def different_weights(folder: Path, model: nn.Module) -> list[str]:
    """In which weights a checkpoint differs from a model, by name and shape."""
    saved: dict[str, list[int]] = {}
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            saved |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    own = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    return [
        f"{name}: found {saved.get(name, 'nothing')}, the model has {own.get(name, 'nothing')}"
        for name in sorted({*saved, *own})
        if saved.get(name) != own.get(name)
    ]


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
    changes = [
        change
        for change in differences(load_config(folder / CONFIG_NAME, schema=TrainConfig), config)
        if not _may_change(change.split(":")[0], config)
    ]
    if changes:
        raise FileExistsError(
            f"the run in {folder} had other settings and cannot go on exactly "
            f"({'; '.join(changes)})"
        )


def _may_change(key: str, config: TrainConfig) -> bool:
    # A constant learning rate does not know the length of the run; the others do.
    if key == "max_steps":
        return config.lr_scheduler == "constant_with_warmup"
    return any(key == free or key.startswith(f"{free}.") for free in _FREE)
