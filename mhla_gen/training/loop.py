"""The training loop."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor

from mhla_gen.config import TrainConfig, save_config
from mhla_gen.data import BatchOrder, LabelledImages, batches, load_images
from mhla_gen.files import CONFIG_NAME, written_whole
from mhla_gen.sampling.pipeline import ClassConditionalPipeline
from mhla_gen.training.build import build_model, build_pipeline
from mhla_gen.training.checkpoints import check_output_dir, load_latest, save_checkpoint
from mhla_gen.training.log import LOG_NAME, RunLog
from mhla_gen.training.objectives import draw, training_loss
from mhla_gen.training.optim import build_optimizer


@dataclass
class Run:
    """Everything that one optimizer step needs."""

    config: TrainConfig
    accelerator: Accelerator
    images: LabelledImages
    model: Any
    optimizer: Any
    learning_rate: Any
    ema: EMAModel

    @property
    def share(self) -> slice:
        """The rows of each batch that this process works on."""
        rows = self.config.batch_size // self.accelerator.num_processes
        first = self.accelerator.process_index * rows
        return slice(first, first + rows)

    def step(self, number: int, images: Tensor, labels: Tensor) -> Tensor:
        """Do optimizer step `number`, counted from 0.

        Args:
            number: Steps done before.
            images: This process's share of the batch.
            labels: Their classes.

        Returns:
            The mean loss over this process's share.
        """
        device = self.accelerator.device
        images, labels = images.to(device), labels.to(device)
        draws = draw(self.config, images.shape[1:], number, device).part(self.share)
        num_parts = self.config.gradient_accumulation_steps
        rows = len(images) // num_parts
        total = torch.zeros((), device=device)
        for index in range(num_parts):
            part = slice(index * rows, (index + 1) * rows)
            self.model.require_backward_grad_sync = index == num_parts - 1
            losses = training_loss(
                self.model, images[part], labels[part], draws.part(part), len(self.class_names)
            )
            loss = losses.mean() / num_parts
            self.accelerator.backward(loss)
            total += loss.detach()
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.learning_rate.step()
        self.optimizer.zero_grad()
        self.ema.step(self.model.parameters())
        return total

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes; their number is that of the null class."""
        return self.images.class_names


def build_run(config: TrainConfig) -> Run:
    """Open the data and build model, optimizer, learning-rate schedule and EMA.

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
    images = load_images(config.data)
    set_seed(config.seed)
    model = build_model(config.model, images.image_shape, len(images.class_names))
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    model.train()
    optimizer = build_optimizer(model, config.learning_rate, config.weight_decay)
    learning_rate = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=config.max_steps,
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    ema = EMAModel(model.parameters(), decay=config.ema_decay, foreach=True)
    accelerator.register_for_checkpointing(learning_rate, ema)
    return Run(config, accelerator, images, model, optimizer, learning_rate, ema)


def train(config: TrainConfig, title: str = "training") -> ClassConditionalPipeline:
    """Train, writing a log, checkpoints, and at the end the pipeline with the averaged weights.

    Step k is a function of the config and of the weights before it, so a run that was interrupted
    goes on exactly with `resume=latest`.

    Args:
        config: Settings; `output_dir` gets config.yaml, log.jsonl, checkpoint-N and pipeline.
        title: Name of the progress bar.

    Returns:
        The trained pipeline, as it was saved.

    Raises:
        ValueError: If settings and data do not fit together, or the loss is not finite.
        OSError: If data are missing, or the output folder holds something else.
    """
    check_output_dir(config)
    run = build_run(config)
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
    order = BatchOrder(len(run.images), config.batch_size, config.seed)
    for number, (images, labels) in enumerate(
        batches(run.images, order, start, config.max_steps, run.share), start
    ):
        learning_rate = run.learning_rate.get_last_lr()[0]
        loss = run.step(number, images, labels)
        mean_loss: Any = accelerator.reduce(loss, "mean")
        log.step(number + 1, mean_loss, learning_rate)
        if config.checkpoint_every and (number + 1) % config.checkpoint_every == 0:
            save_checkpoint(accelerator, config, number + 1)
    log.close()

    model = accelerator.unwrap_model(run.model)
    run.ema.copy_to(model.parameters())
    pipeline = build_pipeline(model, run.class_names)
    if accelerator.is_main_process:
        with written_whole(folder / "pipeline") as partial:
            pipeline.save_pretrained(partial)
    accelerator.wait_for_everyone()
    return pipeline


def rehearse(config: TrainConfig) -> str:
    """Build everything, do one small step in memory, write nothing; what was found, in one line.

    Raises:
        ValueError: As `train`.
        OSError: As `train`.
    """
    check_output_dir(config)
    # Small: a rehearsal on a laptop must not need the memory of the real run.
    parts = PartialState().num_processes * config.gradient_accumulation_steps
    run = build_run(replace(config, batch_size=min(config.batch_size, 4 * parts)))
    order = BatchOrder(len(run.images), run.config.batch_size, config.seed)
    images, labels = next(batches(run.images, order, 0, 1, run.share))
    loss = run.step(0, images, labels)
    parameters = sum(p.numel() for p in run.model.parameters())
    epochs = config.max_steps * config.batch_size / len(run.images)
    return (
        f"{len(run.images)} images of {len(run.class_names)} classes, "
        f"{list(run.images.image_shape)}; {config.model.attention} model with "
        f"{parameters / 1e6:.2f} M parameters; first loss {float(loss):.4f}; "
        f"{config.max_steps} steps of {config.batch_size} are {epochs:.1f} epochs"
    )
