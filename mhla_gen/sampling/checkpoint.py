"""The pipeline of a training run that has not finished: averaged weights of a checkpoint."""

from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file

from mhla_gen.config import ConfigError, TrainConfig, load_config
from mhla_gen.data import load_data
from mhla_gen.errors import MissingError, UserError
from mhla_gen.output_folders import CONFIG_NAME
from mhla_gen.training.build import build_task
from mhla_gen.training.checkpoints import last_checkpoint

_WEIGHTS_NAME = "model.safetensors"
_AVERAGE = "shadow_params"


def checkpoint_in(folder: Path) -> Path | None:
    """A checkpoint: the newest one in a run's folder, or the folder itself; None without any."""
    newest = last_checkpoint(folder)
    if newest is not None:
        return newest
    is_checkpoint = (folder / CONFIG_NAME).is_file() and any(folder.glob("custom_checkpoint_*.pkl"))
    return folder if is_checkpoint else None


def pipeline_of(folder: Path) -> Any:
    """The pipeline that training would have saved at this checkpoint.

    Args:
        folder: `checkpoint-N` of a run of `mhla-gen train`. Its data have to be where they were:
            they say how many classes the model has.

    Raises:
        FileNotFoundError: If the weights are not in one file, or the data are gone.
        ValueError: If another command wrote it.
    """
    try:
        config = load_config(folder / CONFIG_NAME, schema=TrainConfig)
    except ConfigError as error:
        raise UserError(f"{folder} was not written by `mhla-gen train`: {error}") from error
    task = build_task(config.without_stages, load_data(config.data))
    averages = _averages(folder)
    if averages is not None:
        parameters = list(task.model.parameters())
        average = EMAModel(parameters)
        average.load_state_dict(averages)
        average.copy_to(parameters)
    elif (folder / _WEIGHTS_NAME).is_file():
        task.model.load_state_dict(load_file(folder / _WEIGHTS_NAME))
    else:
        raise MissingError(f"{folder} has neither averaged weights nor {_WEIGHTS_NAME}")
    return task.finished_pipeline(task.model.eval())


def _averages(folder: Path) -> dict[str, Any] | None:
    """The state of the moving average, which accelerate keeps under a number."""
    for path in sorted(folder.glob("custom_checkpoint_*.pkl")):
        state = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(state, dict) and _AVERAGE in state:
            return state
    return None
