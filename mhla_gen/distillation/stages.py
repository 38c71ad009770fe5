"""The stages of a distillation, each a run of the training loop."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor

from mhla_gen.config import DistillConfig, StageConfig, TrainConfig, save_config
from mhla_gen.data import TrainingData
from mhla_gen.distillation.layers import LayerErrors
from mhla_gen.distillation.losses import LayerLosses, OutputLosses
from mhla_gen.distillation.teacher import softmax_twin, train_only, trained_names
from mhla_gen.errors import UserError
from mhla_gen.files import written_whole
from mhla_gen.hub import PIPELINE_NAME
from mhla_gen.models.saved_transformer import load_transformer, transformer_class
from mhla_gen.models.transformer import MHLATransformerMixin
from mhla_gen.outputs.folders import CONFIG_NAME, differing_values
from mhla_gen.outputs.locks import claimed
from mhla_gen.runtime.compiling import compile_model
from mhla_gen.runtime.processes import on_main, processes, tell
from mhla_gen.training.build import build_task
from mhla_gen.training.checkpoints import require_whole_pipeline
from mhla_gen.training.loop import run_to_end
from mhla_gen.training.parallel import build_accelerator
from mhla_gen.training.rehearsal import rehearse
from mhla_gen.training.run_folder import check_output_dir
from mhla_gen.training.task import Task
from mhla_gen.training.training_run import build_run


def distill(config: TrainConfig) -> Path:
    """Run the stages of a distillation, each the training loop in a folder of its own.

    A finished stage is not run again, and an interrupted one is resumed exactly by `resume=latest`.
    Each stage starts from the EMA weights that the previous one saved.

    Args:
        config: Settings with `distill`; `output_dir` gets config.yaml, a folder for each stage, and
            the pipeline of the last one.

    Returns:
        The folder of that pipeline.

    Raises:
        ValueError: If teacher, settings and data do not fit together, or a loss is not finite.
        OSError: If data are missing, or an output folder holds something else.
    """
    check_output_dir(config)
    processes = build_accelerator(config)
    folder = Path(config.output_dir)
    with claimed(folder):
        on_main(lambda: check_output_dir(config))
        # The folders of stages before a finished one are not needed.
        if _is_finished(folder):
            tell(f"{folder} is already finished: all stages are done; nothing was run")
            return folder / PIPELINE_NAME
        stages = list(stages_of(config))
        left = [*takewhile(lambda stage: not _is_finished(stage.folder), reversed(stages))]
        if len(left) < len(stages):
            tell(f"{stages[-1 - len(left)].title}: already finished")
        for stage in reversed(left):
            on_main(lambda stage=stage: check_output_dir(stage.config))
            run = build_run(stage.config, stage.task)
            # Settings that do not fit have failed by now and left nothing behind. From here on the
            # folder has files, and without its config it would not be that of a run.
            if processes.is_main_process:
                save_config(config, folder / CONFIG_NAME)
            with claimed(stage.folder):
                run_to_end(run, stage.title)

        def copy() -> None:
            with written_whole(folder / PIPELINE_NAME) as partial:
                shutil.copytree(stages[-1].folder / PIPELINE_NAME, partial)

        on_main(copy)
    return folder / PIPELINE_NAME


def _is_finished(folder: Path) -> bool:
    """Whether a folder has the pipeline of what was run in it.

    Raises:
        DamagedFileError: If files of that are missing.
    """

    def look() -> bool:
        if not (folder / PIPELINE_NAME).is_dir():
            return False
        require_whole_pipeline(folder)
        return True

    return on_main(look)


def rehearse_distillation(config: TrainConfig) -> str:
    """Do one small step of each stage in memory, each from the teacher; one line per stage.

    Raises:
        ValueError: As `distill`.
        OSError: As `distill`.
    """
    check_output_dir(config)
    start = distillation_of(config).start
    return "\n".join(
        f"{stage.title}: {rehearse(stage.config, replace(stage, start=start).task)}"
        for stage in stages_of(config)
    )


def distillation_of(config: TrainConfig) -> DistillConfig:
    """The distillation that these settings ask for.

    Raises:
        ValueError: If they have none.
    """
    if config.distill is None:
        raise UserError("distillation needs distill.teacher and distill.stages")
    return config.distill


@dataclass(frozen=True)
class Stage:
    """One stage: its run, what that starts from, and what it learns."""

    title: str
    settings: StageConfig
    config: TrainConfig
    """Of its run, in a folder of its own."""
    start: str | None
    """The pipeline of the student so far; None for the teacher's weights."""

    @property
    def folder(self) -> Path:
        """The folder of its run."""
        return Path(self.config.output_dir)

    def task(self, config: TrainConfig, data: TrainingData) -> Task:
        """A student and its teacher on this process's device, and what the student learns.

        Args:
            config: Of the run; that of a rehearsal may differ in its batch size.
            data: What it learns from.

        Raises:
            ValueError: If teacher, settings and data do not fit together.
        """
        check_teacher(config)
        layers_alone = self.settings.kind == "layers"
        if layers_alone and AcceleratorState().distributed_type == DistributedType.FSDP:
            raise UserError(
                "a stage of kind=layers cannot run under FSDP, which frees a layer's weights "
                "before its own backward pass; run it on one process or under DDP"
            )
        task = build_task(config.without_stages, data)
        student = task.model
        weights: dict[str, Tensor] = {}
        if self.start is not None:
            weights = trained_weights(self.start, student, subfolder(config))
        learning = trained_names(student, self.settings.train or "all")
        moved = {
            n for n, p in student.named_parameters() if n in weights and not p.equal(weights[n])
        }
        teacher = softmax_twin(student, learning | moved)
        student.load_state_dict(weights, strict=False)
        train_only(student, learning)
        device = processes().device
        student.to(device)
        teacher.to(device)
        if layers_alone:
            errors = LayerErrors(student, teacher, self.settings.layer_error)
            return replace(task, losses=LayerLosses(task.objective, task.conditioning, errors))
        bf16 = config.mixed_precision == "bf16"
        autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16)
        compile_model(teacher, config.compile, any_size=task.any_length)
        weight = self.settings.teacher_weight
        losses = OutputLosses(task.objective, task.conditioning, teacher, weight, autocast)
        return replace(task, losses=losses)


def stages_of(config: TrainConfig) -> Iterator[Stage]:
    """The stages of the settings, each starting from what the previous one saves."""
    distillation = distillation_of(config)
    start = distillation.start
    for number, settings in enumerate(distillation.stages, 1):
        folder = str(Path(config.output_dir) / f"stage-{number}-{settings.kind}")
        given = {
            name: getattr(settings, name)
            for name in ("learning_rate", "mhla_learning_rate", "warmup_steps", "ema_decay")
            if getattr(settings, name) is not None
        }
        if settings.ema_decay is not None:
            given["ema_width"] = None
        if settings.kind == "layers":
            # What compares the layers is not compiled.
            given["compile"] = "none"
        run = replace(
            config,
            output_dir=folder,
            max_steps=settings.steps,
            # Another order of the data than the stage before had.
            seed=config.seed + number - 1,
            **given,
        )
        title = f"stage {number} of {len(distillation.stages)}, {settings.kind}"
        yield Stage(title, settings, run, start)
        start = str(Path(folder) / PIPELINE_NAME)


def check_teacher(config: TrainConfig) -> None:
    """Raise unless the settings describe a student that differs from a softmax teacher.

    Raises:
        ValueError: If the student is softmax, or the teacher has MHLA layers.
    """
    if config.model.attention == "softmax":
        raise UserError("distill needs a model.attention that replaces softmax, found softmax")
    if config.model.trainable != "all":
        raise UserError("distill.stages set what is trained (train); leave model.trainable out")
    if config.model.pretrained is not None:
        raise UserError("the student starts from distill.teacher; leave model.pretrained out")
    teacher = str(distillation_of(config).teacher)
    if issubclass(transformer_class(teacher, subfolder(config)), MHLATransformerMixin):
        raise UserError(f"distill.teacher {teacher} has MHLA layers; it must be the softmax model")


def subfolder(config: TrainConfig) -> str:
    """Where the trained transformer lies in a pipeline."""
    return "transformer" if config.wan is None else config.wan.subfolder


def trained_weights(folder: str, student: Any, subfolder: str) -> dict[str, Tensor]:
    """The weights saved by an earlier stage, for an equal student.

    Raises:
        ValueError: If they belong to another model.
    """
    found = load_transformer(folder, subfolder)
    changes = differing_values(_settings(found), _settings(student))
    if changes:
        raise UserError(
            f"the student in {folder} is another model ({'; '.join(changes)}); give settings that "
            "build it, or choose another output_dir"
        )
    return found.state_dict()


def _settings(model: Any) -> dict[str, Any]:
    public = {key: value for key, value in model.config.items() if not key.startswith("_")}
    return {"class": type(model).__name__, **public}
