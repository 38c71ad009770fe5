"""The folder of a run: what is in it, and whether it can be resumed with these settings."""

from pathlib import Path

from mhla_gen.config import TrainConfig, load_config
from mhla_gen.errors import OccupiedError
from mhla_gen.files.saved import read_json, require_utf8
from mhla_gen.hub import PIPELINE_NAME
from mhla_gen.outputs.folders import CONFIG_NAME, check_writable, differences, is_free

PREFIX = "checkpoint-"
FACTS_NAME = "run.json"
# A resumed run may differ in these, and in all below them: they do not change what a step computes.
_FREE = (
    "output_dir",
    "resume",
    "unpickle_checkpoint",
    "data.failed_reads",
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
    """Checkpoints in a run's folder, by step, oldest first, without empty ones."""
    found = {
        int(path.name.removeprefix(PREFIX)): path
        for path in folder.glob(f"{PREFIX}*")
        if path.name.removeprefix(PREFIX).isdecimal() and path.is_dir() and any(path.iterdir())
    }
    return dict(sorted(found.items()))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in a run's folder."""
    return next(reversed(checkpoints(folder).values()), None)


def pipeline_steps(folder: Path) -> int:
    """The number of steps of the pipeline in a run's folder; 0 if unknown.

    Raises:
        DamagedFileError: If it says it no more.
    """
    path = folder / PIPELINE_NAME / FACTS_NAME
    if not path.is_file():
        return 0
    return read_json(path, f"remove {path.parent} and run again with resume=latest")["step"]


def check_output_dir(config: TrainConfig) -> None:
    """Raise unless the output folder is free, or has a run that this config can resume.

    Raises:
        FileExistsError: If it holds anything else.
        PermissionError: If it cannot be written.
    """
    folder = Path(config.output_dir)
    require_utf8("output_dir", folder)
    check_writable(folder)
    if is_free(folder):
        return
    if not (folder / CONFIG_NAME).is_file():
        raise OccupiedError(
            f"output_dir {folder} exists and is not a training run; choose another one"
        )
    if config.resume == "never":
        raise OccupiedError(
            f"output_dir {folder} contains a run; add resume=latest to resume it, "
            "or choose another one"
        )
    changes = [
        change
        for change in differences(load_config(folder / CONFIG_NAME, schema=TrainConfig), config)
        if not _may_change(change.split(":")[0], config)
    ]
    if changes:
        raise OccupiedError(
            f"the run in {folder} had other settings and cannot be resumed exactly "
            f"({'; '.join(changes)}); choose another output_dir, or use its settings"
        )
    done = max([pipeline_steps(folder), *checkpoints(folder)])
    # The steps of a distillation are those of its stages, which have folders of their own.
    if config.distill is None and done > config.max_steps:
        raise OccupiedError(
            f"the run in {folder} has already done {done} steps, more than max_steps="
            f"{config.max_steps}; choose another output_dir, or max_steps of at least {done}"
        )


def _may_change(key: str, config: TrainConfig) -> bool:
    # A constant learning rate does not know the length of the run; the others do.
    if key == "max_steps":
        return config.lr_scheduler == "constant_with_warmup"
    return any(key == free or key.startswith(f"{free}.") for free in _FREE)
