"""The training loop."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.training_utils import EMAModel
from torch import Tensor

from mhla_gen.config import TrainConfig, save_config
from mhla_gen.data import Batch, BatchOrder, TrainingData, batches, load_data
from mhla_gen.files import CONFIG_NAME, written_whole
from mhla_gen.training.build import Task, build_task
from mhla_gen.training.checkpoints import check_output_dir, load_latest, save_checkpoint
from mhla_gen.training.draws import draw
from mhla_gen.training.log import LOG_NAME, RunLog
from mhla_gen.training.optim import build_optimizer

BuildTask = Callable[[TrainConfig, TrainingData], Task]


@dataclass
class Run:
    """Everything that one optimizer step needs."""

    config: TrainConfig
    accelerator: Accelerator
    data: TrainingData
    task: Task
    model: Any
    optimizer: Any
    learning_rate: Any
    ema: EMAModel

    @cached_property
    def order(self) -> BatchOrder:
        """Which samples each micro-batch has, over all processes."""
        size = self.config.batch_size // self.config.gradient_accumulation_steps
        return BatchOrder(self.data.buckets, size, self.config.seed)

    @property
    def rows(self) -> slice:
        """The rows of each micro-batch that this process works on."""
        rows = self.order.size // self.accelerator.num_processes
        first = self.accelerator.process_index * rows
        return slice(first, first + rows)

    def batches(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """This process's share of the micro-batches of each of these steps."""
        parts = self.config.gradient_accumulation_steps
        return batches(self.data, self.order, start, stop, parts=parts, rows=self.rows)

    def step(self, number: int, parts: Sequence[Batch]) -> dict[str, Tensor]:
        """Do optimizer step `number`, counted from 0.

        Args:
            number: Steps done before.
            parts: This process's share of the step's micro-batches.

        Returns:
            The means of the losses over this process's share, by name.
        """
        device = self.accelerator.device
        draws = draw(
            self.task.objective,
            seed=self.config.seed,
            step=number,
            batch_size=self.config.batch_size,
            dropout=self.config.label_dropout,
            flip=self.config.data.horizontal_flip,
        )
        size, totals = self.order.size, {}
        for index, part in enumerate(parts):
            self.model.require_backward_grad_sync = index == len(parts) - 1
            losses = self.task.step_losses(
                self.model,
                {name: tensor.to(device) for name, tensor in part.items()},
                draws.part(slice(index * size, (index + 1) * size)).part(self.rows).to(device),
            )
            means = {name: values.mean() / len(parts) for name, values in losses.items()}
            self.accelerator.backward(means["loss"])
            for name, mean in means.items():
                totals[name] = totals.get(name, 0) + mean.detach()
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.learning_rate.step()
        self.optimizer.zero_grad()
        self.ema.step(self.model.parameters())
        return totals


def build_run(config: TrainConfig, build: BuildTask = build_task) -> Run:
    """Open the data and build model, optimizer, learning-rate schedule and EMA.

    Args:
        config: Settings.
        build: Makes the task of the settings and the data.

    Raises:
        ValueError: If the settings, the data and the number of processes do not fit together.
    """
    # accelerate's own name for float32 is "no", which YAML reads as false.
    precision = "no" if config.mixed_precision == "fp32" else config.mixed_precision
    accelerator = Accelerator(mixed_precision=precision)
    parts = accelerator.num_processes * config.gradient_accumulation_steps
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size {config.batch_size} must be a multiple of {parts}, "
            "processes × gradient_accumulation_steps"
        )
    data = load_data(config.data)
    set_seed(config.seed)
    task = build(config, data)
    model = task.model
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    model.train()
    optimizer = build_optimizer(
        model, config.learning_rate, config.weight_decay, config.mixing_learning_rate
    )
    learning_rate = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=config.max_steps,
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    ema = EMAModel(model.parameters(), decay=config.ema_decay, foreach=True)
    accelerator.register_for_checkpointing(learning_rate, ema)
    return Run(config, accelerator, data, task, model, optimizer, learning_rate, ema)


def train(
    config: TrainConfig, title: str = "training", build: BuildTask = build_task
) -> DiffusionPipeline:
    """Train, writing a log, checkpoints, and at the end the pipeline with the averaged weights.

    Step k is a function of the config and of the weights before it, so a run that was interrupted
    goes on exactly with `resume=latest`.

    Args:
        config: Settings; `output_dir` gets config.yaml, log.jsonl, checkpoint-N and pipeline.
        title: Name of the progress bar.
        build: As in `build_run`.

    Returns:
        The trained pipeline, as it was saved.

    Raises:
        ValueError: If settings and data do not fit together, or the loss is not finite.
        OSError: If data are missing, or the output folder holds something else.
    """
    check_output_dir(config)
    run = build_run(config, build)
    accelerator, folder = run.accelerator, Path(config.output_dir)
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        save_config(config, folder / CONFIG_NAME)
    start = load_latest(accelerator, config)
    log = RunLog(
        folder / LOG_NAME if accelerator.is_main_process else None,
        start=start,
        stop=config.max_steps,
        every=config.log_every,
        title=title,
        images_per_step=config.batch_size,
        show=accelerator.is_main_process,
    )
    for number, parts in enumerate(run.batches(start, config.max_steps), start):
        learning_rate = run.learning_rate.get_last_lr()[0]
        losses: Any = accelerator.reduce(run.step(number, parts), "mean")
        log.step(number + 1, losses, learning_rate)
        if config.checkpoint_every and (number + 1) % config.checkpoint_every == 0:
            save_checkpoint(accelerator, config, number + 1)
    log.close()

    model = accelerator.unwrap_model(run.model)
    run.ema.copy_to(model.parameters())
    pipeline = run.task.pipeline(model.eval())
    if accelerator.is_main_process:
        with written_whole(folder / "pipeline") as partial:
            pipeline.save_pretrained(partial)
    accelerator.wait_for_everyone()
    return pipeline


def rehearse(config: TrainConfig, build: BuildTask = build_task) -> str:
    """Build everything, do one small step in memory, write nothing; what was found, in one line.

    Args:
        config: Settings.
        build: As in `build_run`.

    Raises:
        ValueError: As `train`.
        OSError: As `train`.
    """
    check_output_dir(config)
    # Small: a rehearsal on a laptop must not need the memory of the real run.
    parts = PartialState().num_processes * config.gradient_accumulation_steps
    run = build_run(replace(config, batch_size=min(config.batch_size, 4 * parts)), build)
    loss = run.step(0, next(run.batches(0, 1)))["loss"]
    parameters = sum(p.numel() for p in run.model.parameters())
    epochs = config.max_steps * config.batch_size / len(run.data)
    return (
        f"{run.task.summary}; {config.model.attention} model with "
        f"{parameters / 1e6:.2f} M parameters; first loss {float(loss):.4f}; "
        f"{config.max_steps} steps of {config.batch_size} are {epochs:.1f} epochs"
    )
