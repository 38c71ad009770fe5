"""Checkpoints: folders `checkpoint-N` with all that is needed to resume a run exactly."""

import os
import shutil
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import nn

from mhla_gen.config import save_config
from mhla_gen.errors import UserError
from mhla_gen.files import (
    WriteError,
    errors_naming,
    make_folder,
    partial_of,
    put,
    remove,
    remove_leftovers,
    write_json,
)
from mhla_gen.files.saved import (
    DamagedFileError,
    read_json,
    require_whole,
)
from mhla_gen.hub import PIPELINE_NAME
from mhla_gen.outputs.folders import CONFIG_NAME
from mhla_gen.runtime.processes import on_main
from mhla_gen.training.checkpoint_state import (
    damage_of,
    facts_of,
    read_state,
    write_state,
)
from mhla_gen.training.run_folder import FACTS_NAME, PREFIX, checkpoints, last_checkpoint
from mhla_gen.training.run_pipeline import write_pipeline
from mhla_gen.training.saved_tensors import SavedTensors
from mhla_gen.training.training_run import Run

_FORMAT = 2
# What only checkpoints of the first format have.
_PICKLES = ("optimizer.bin", "custom_checkpoint_0.pkl")


def last_pipeline(folder: Path) -> Path | None:
    """The pipeline in the newest complete checkpoint of a run's folder."""
    last = last_checkpoint(folder)
    return None if last is None else last / PIPELINE_NAME


def save_checkpoint(run: Run, step: int) -> Path:
    """Write `checkpoint-<step>`, then remove the oldest beyond `keep_checkpoints`.

    The folder gets its name when all processes have written their part and all of it is on the
    disk: a run that is killed meanwhile, a power loss or a full disk leave the previous ones.
    Weights, optimizer, average, learning rate, random states of every process, and losses that the
    log has no line of yet are in it; the position in the data is the step. Beside them lies the
    pipeline with the averaged weights, for sampling, which needs nothing else.

    Returns:
        The folder.

    Raises:
        WriteError: If it cannot be written.
    """
    target = Path(run.config.output_dir) / f"{PREFIX}{step}"
    partial = on_main(lambda: _begun(target))
    try:
        own = write_state(run, partial)
        with errors_naming(target, partial):
            write_pipeline(run, partial / PIPELINE_NAME, last_pipeline(target.parent))
    except (OSError, RuntimeError, SafetensorError) as error:
        own = error
    # All learn of it if one of them could not write.
    every = gather_object([own])
    on_main(lambda: _end(run, partial, target, step, every))
    return target


def _begun(target: Path) -> Path:
    partial = partial_of(target)
    with errors_naming(target, partial):
        make_folder(target.parent)
        partial.mkdir()
    return partial


def _end(run: Run, partial: Path, target: Path, step: int, every: list[Any]) -> None:
    """Give a checkpoint its name and remove old ones, or report why it could not be written."""
    try:
        for found in every:
            if isinstance(found, Exception):
                raise found
        with errors_naming(target, partial):
            save_config(run.config, partial / CONFIG_NAME)
            facts = {name: fact for part in every for name, fact in part.items()}
            write_facts(run, partial, step, facts | facts_of(partial, [CONFIG_NAME]))
            put(partial, target)
    except WriteError as error:
        remove(partial)
        last = last_checkpoint(target.parent) or "none"
        free = shutil.disk_usage(target.parent).free / 1e6
        reason = (
            f"{error.strerror}; {free:.3g} MB are free there; resume=latest will resume from the "
            f"last checkpoint, {last}"
        )
        raise WriteError(error.errno, reason, str(target)) from error
    except BaseException:
        remove(partial)
        raise
    for old in list(checkpoints(target.parent).values())[: -run.config.keep_checkpoints]:
        remove(old)


def write_facts(run: Run, folder: Path, step: int, files: dict[str, dict[str, Any]]) -> None:
    """Record in a checkpoint or pipeline its number of steps and its files."""
    facts = {"format": _FORMAT, "step": step, "num_samples": len(run.data), "files": files}
    write_json(folder / FACTS_NAME, facts)


def require_whole_pipeline(folder: Path) -> None:
    """Raise unless the pipeline of a finished run still has its files.

    Raises:
        DamagedFileError: Naming one that is missing, or whose weights have another size.
    """
    pipeline = folder / PIPELINE_NAME
    remedy = f"remove {pipeline} and run again with resume=latest, which saves it again"
    require_whole(pipeline, read_json(pipeline / FACTS_NAME, remedy).get("files", {}), remedy)


def tidy(folder: Path) -> None:
    """Clean up after a killed run; names of earlier versions contain no process."""
    remove_leftovers(folder)
    for aside in list(folder.glob(f".{PREFIX}*.old")):
        target = folder / aside.name.removeprefix(".").removesuffix(".old")
        if not target.exists():
            os.replace(aside, target)
    for path in [*folder.glob(f".{PREFIX}*.old"), *folder.glob(f".{PREFIX}*.partial")]:
        remove(path)


def load_latest(run: Run) -> int:
    """Restore the newest checkpoint of the run, if it has one; the number of steps it has done.

    With `resume=whole`, the newest that is whole; damaged ones after it are renamed.

    Raises:
        UserError: If it is damaged, naming the file and the newest one that is whole; if it is of
            another model or holds pickles, or the data have changed.
    """
    folder = on_main(lambda: _chosen(run))
    if folder is None:
        return 0
    facts = facts_in(folder)
    if facts["num_samples"] != len(run.data):
        raise UserError(
            f"{folder} was trained on {facts['num_samples']} samples, but the data are "
            f"{len(run.data)} now: the run cannot be resumed exactly; restore the data, or start "
            "a new run in another output_dir"
        )
    if not holds_pickles(folder):
        changes = different_weights(folder, run.accelerator.unwrap_model(run.model))
        if changes:
            raise UserError(
                f"{folder} is a checkpoint of another model ({'; '.join(changes[:3])}"
                f"{f'; and {len(changes) - 3} more' if len(changes) > 3 else ''}); choose another "
                "output_dir"
            )
        read_state(run, folder)
    else:
        run.accelerator.register_for_checkpointing(run.learning_rate, run.ema, run.recent)
        run.accelerator.load_state(str(folder))
    return int(folder.name.removeprefix(PREFIX))


def _chosen(run: Run) -> Path | None:
    """The checkpoint to resume from."""
    root = Path(run.config.output_dir)
    tidy(root)
    damaged: list[Path] = []
    for folder in reversed(checkpoints(root).values()):
        problem = problem_of(folder)
        if problem is None:
            if holds_pickles(folder) and not run.config.unpickle_checkpoint:
                raise UserError(
                    f"{folder} was written by an earlier version and contains pickles, which can "
                    "execute code when they are read; if you trust it, resume once with "
                    "unpickle_checkpoint=true: the next checkpoint has none"
                )
            for path in damaged:
                os.replace(path, path.with_name(f"damaged-{path.name}"))
            return folder
        if run.config.resume != "whole":
            raise UserError(f"{problem}; {_remedy(root, folder)}")
        damaged.append(folder)
    if damaged:
        raise UserError(f"{problem_of(damaged[0])}; {_remedy(root, damaged[0])}")
    return None


def _remedy(root: Path, damaged: Path) -> str:
    others = [path for path in reversed(checkpoints(root).values()) if path != damaged]
    whole = next((path for path in others if problem_of(path) is None), None)
    if whole is None:
        return "no other checkpoint is intact; restore it, or start again in another output_dir"
    return f"resume=whole resumes from the newest intact checkpoint, {whole}"


def problem_of(folder: Path) -> str | None:
    """Which file of `checkpoint-N` is damaged, and how; None if it is intact."""
    try:
        facts = facts_in(folder)
    except DamagedFileError as error:
        return str(error).rsplit(";", 1)[0]
    return damage_of(folder, facts["files"])


def facts_in(folder: Path) -> dict[str, Any]:
    """The facts in a checkpoint: `step`, `num_samples`, `files`.

    Raises:
        DamagedFileError: If they are missing.
    """
    path, remedy = folder / FACTS_NAME, "use another checkpoint"
    facts = read_json(path, remedy)
    if not {"step", "num_samples"} <= facts.keys():
        raise DamagedFileError(path, "the step is missing", remedy)
    return {"files": {}, **facts}


def holds_pickles(folder: Path) -> bool:
    """Whether a checkpoint is of the first format."""
    return any((folder / name).exists() for name in _PICKLES) or ("format" not in facts_in(folder))


def different_weights(folder: Path, model: nn.Module) -> list[str]:
    """The weights in which a checkpoint differs from a model, by name and shape."""
    saved = SavedTensors(folder, "model").shapes
    own = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    return [
        f"{name}: found {saved.get(name, 'nothing')}, the model has {own.get(name, 'nothing')}"
        for name in sorted({*saved, *own})
        if saved.get(name) != own.get(name)
    ]
