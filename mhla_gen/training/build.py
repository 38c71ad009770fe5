"""From settings and data to the task of a run, by the family of its model."""

from mhla_gen.config import TrainConfig
from mhla_gen.config.fields import in_group
from mhla_gen.data import TrainingData
from mhla_gen.data.caching.cached import CachedLatents
from mhla_gen.errors import UserError
from mhla_gen.training.dit import dit_task
from mhla_gen.training.pretrained import require_pipeline
from mhla_gen.training.task import Task
from mhla_gen.training.transformer import transformer_task
from mhla_gen.training.wan import wan_task


def build_task(config: TrainConfig, data: TrainingData) -> Task:
    """The model that a config describes, for data of this kind.

    Raises:
        ValueError: If model and data do not fit together.
    """
    if config.distill is not None:
        raise UserError("settings with distill are run by mhla_gen.distillation.distill")
    if config.model.pretrained is not None and isinstance(data, CachedLatents):
        require_pipeline(data, config.model.pretrained)
    with in_group(f"model.{'linformer' if config.model.attention == 'linformer' else 'mhla'}."):
        return _task_of(config, data)


def _task_of(config: TrainConfig, data: TrainingData) -> Task:
    if config.wan is not None:
        return wan_task(config, config.wan, data)
    if config.transformer is not None:
        return transformer_task(config, config.transformer, data)
    return dit_task(config, data)
