"""Checkpoints: folders `checkpoint-N` with all that a run needs to go on exactly."""

import json
import os
import shutil
from pathlib import Path

from accelerate.utils.constants import FSDP_MODEL_NAME
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from mhla_gen.config import TrainConfig, load_config, save_config
from mhla_gen.errors import NotWritableError, OccupiedError, UserError
from mhla_gen.files import remove_leftovers
from mhla_gen.hub import PIPELINE_NAME
from mhla_gen.output_folders import CONFIG_NAME, check_writable, differences, is_free
from mhla_gen.training.run_pipeline import write_pipeline
from mhla_gen.training.training_run import Run

_PREFIX = "checkpoint-"
# Names of checkpoints that are being written or removed, and of one that another replaces.
_PARTIAL, _ASIDE = ".partial", ".old"
_FACTS_NAME = "run.json"
# Where accelerate writes a model that processes share.
_SHARED_NAME = f"{FSDP_MODEL_NAME}_0"
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


def last_pipeline(folder: Path) -> Path | None:
    """The pipeline in the newest complete checkpoint of a run's folder."""
    last = last_checkpoint(folder)
    return None if last is None else last / PIPELINE_NAME


def save_checkpoint(run: Run, step: int) -> Path:
    """Write `checkpoint-<step>`, then remove the oldest beyond `keep_checkpoints`.

    The folder gets its name when all processes have written their part, so a run that is killed
    meanwhile, or finds no room, keeps its previous checkpoints. Weights, optimizer, random states
    of every process, and what was registered with the accelerator (EMA, learning rate, losses that
    the log has no line of yet) are in it; the position in the data is the step. Beside them lies
    the pipeline with the averaged weights, for sampling, which needs nothing else.

    Returns:
        The folder.

    Raises:
        OSError: If it cannot be written.
    """
    accelerator, folder = run.accelerator, Path(run.config.output_dir)
    target = folder / f"{_PREFIX}{step}"
    partial = _hidden(target, _PARTIAL)
    if accelerator.is_main_process:
        tidy(folder)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(partial))
        write_pipeline(run, partial / PIPELINE_NAME, last_pipeline(folder))
        if accelerator.is_main_process:
            save_config(run.config, partial / CONFIG_NAME)
            write_facts(run, partial, step)
    # A full disk is one of these, by who was writing.
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        last = last_checkpoint(folder) or "none"
        free = shutil.disk_usage(folder).free / 1e6
        raise NotWritableError(
            f"{target} could not be written ({str(error).splitlines()[0]}); {free:.3g} MB are free "
            f"there; the last checkpoint is {last}; make room, and go on with resume=latest"
        ) from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _put(partial, target)
        for old in list(checkpoints(folder).values())[: -run.config.keep_checkpoints]:
            _remove(old)
    accelerator.wait_for_everyone()
    return target


def write_facts(run: Run, folder: Path, step: int) -> None:
    """Say in a checkpoint, or in a trained pipeline, how many steps it has."""
    facts = json.dumps({"step": step, "num_samples": len(run.data)})
    (folder / _FACTS_NAME).write_text(facts + "\n")


def pipeline_steps(folder: Path) -> int:
    """How many steps the pipeline in a run's folder has; 0 if there is none that says it."""
    path = folder / PIPELINE_NAME / _FACTS_NAME
    return json.loads(path.read_text())["step"] if path.is_file() else 0


def tidy(folder: Path) -> None:
    """Remove what a run that was killed left half-written; a checkpoint set aside comes back."""
    remove_leftovers(folder)
    for aside in list(folder.glob(f".{_PREFIX}*{_ASIDE}")):
        target = folder / aside.name.removeprefix(".").removesuffix(_ASIDE)
        if target.exists():
            _remove(aside)
        else:
            os.replace(aside, target)
    for partial in list(folder.glob(f".{_PREFIX}*{_PARTIAL}")):
        shutil.rmtree(partial)


def _put(partial: Path, target: Path) -> None:
    """Give a checkpoint its name; one that had it is there until then, and set aside meanwhile."""
    aside = _hidden(target, _ASIDE)
    if target.exists():
        os.replace(target, aside)
    os.replace(partial, target)
    if aside.exists():
        _remove(aside)


def _remove(path: Path) -> None:
    # Renamed first: half a checkpoint must not look like a whole one.
    partial = _hidden(path, _PARTIAL)
    os.replace(path, partial)
    shutil.rmtree(partial)


def _hidden(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name.removeprefix('.')}{ending}")


def load_latest(run: Run) -> int:
    """Restore the newest checkpoint of the run, if it has one; the number of steps it has done.

    Raises:
        ValueError: If it is of another model, or the data have changed.
    """
    if run.accelerator.is_main_process:
        tidy(Path(run.config.output_dir))
    run.accelerator.wait_for_everyone()
    found = checkpoints(Path(run.config.output_dir))
    if not found:
        return 0
    step, folder = max(found.items())
    facts = json.loads((folder / _FACTS_NAME).read_text())
    if facts["num_samples"] != len(run.data):
        raise UserError(
            f"{folder} was trained on {facts['num_samples']} samples, but the data are "
            f"{len(run.data)} now: the run cannot go on exactly; restore the data, or start a new "
            "run in another output_dir"
        )
    changes = different_weights(folder, run.accelerator.unwrap_model(run.model))
    if changes:
        raise UserError(
            f"{folder} is a checkpoint of another model ({'; '.join(changes[:3])}"
            f"{f'; and {len(changes) - 3} more' if len(changes) > 3 else ''}); choose another "
            "output_dir"
        )
    run.accelerator.load_state(str(folder))
    return step


def different_weights(folder: Path, model: nn.Module) -> list[str]:
    """In which weights a checkpoint differs from a model, by name and shape."""
    saved = _saved_shapes(folder)
    own = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    return [
        f"{name}: found {saved.get(name, 'nothing')}, the model has {own.get(name, 'nothing')}"
        for name in sorted({*saved, *own})
        if saved.get(name) != own.get(name)
    ]


def _saved_shapes(folder: Path) -> dict[str, list[int]]:
    """Shapes of the weights in a checkpoint, without reading them."""
    if (folder / _SHARED_NAME).is_dir():
        shared = FileSystemReader(folder / _SHARED_NAME).read_metadata().state_dict_metadata
        return {
            name.removeprefix("model."): list(entry.size)
            for name, entry in shared.items()
            if isinstance(entry, TensorStorageMetadata)
        }
    shapes: dict[str, list[int]] = {}
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return shapes


def check_output_dir(config: TrainConfig) -> None:
    """Raise unless the output folder is free, or holds a run that this config may go on with.

    Raises:
        FileExistsError: If it holds anything else.
        PermissionError: If it cannot be written.
    """
    folder = Path(config.output_dir)
    check_writable(folder)
    if is_free(folder):
        return
    if not (folder / CONFIG_NAME).is_file():
        raise OccupiedError(
            f"output_dir {folder} exists and is no training run; choose another one"
        )
    if config.resume == "never":
        raise OccupiedError(
            f"output_dir {folder} holds a run; add resume=latest to go on with it, "
            "or choose another one"
        )
    changes = [
        change
        for change in differences(load_config(folder / CONFIG_NAME, schema=TrainConfig), config)
        if not _may_change(change.split(":")[0], config)
    ]
    if changes:
        raise OccupiedError(
            f"the run in {folder} had other settings and cannot go on exactly "
            f"({'; '.join(changes)}); choose another output_dir, or give it the settings it had"
        )
    done = max([pipeline_steps(folder), *checkpoints(folder)])
    # The steps of a distillation are those of its stages, which have folders of their own.
    if config.distill is None and done > config.max_steps:
        raise OccupiedError(
            f"the run in {folder} has done {done} steps, more than max_steps={config.max_steps}; "
            f"choose another output_dir, or max_steps of at least {done}"
        )


def _may_change(key: str, config: TrainConfig) -> bool:
    # A constant learning rate does not know the length of the run; the others do.
    if key == "max_steps":
        return config.lr_scheduler == "constant_with_warmup"
    return any(key == free or key.startswith(f"{free}.") for free in _FREE)
