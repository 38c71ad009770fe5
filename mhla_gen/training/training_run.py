"""A run: data, model, optimizer and EMA, and a step of training."""

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from diffusers.optimization import get_scheduler

from mhla_gen.config import TrainConfig
from mhla_gen.data import Batch, BatchOrder, TrainingData, batches, load_data
from mhla_gen.errors import UserError
from mhla_gen.runtime.compiling import compile_model, repeated_blocks
from mhla_gen.runtime.devices import repeatable_convolutions, send
from mhla_gen.runtime.recomputing import draws, recompute_activations
from mhla_gen.runtime.recorded_training import RecordedTraining
from mhla_gen.runtime.softmax_kernels import AttentionLengths
from mhla_gen.training.build import build_task
from mhla_gen.training.ema import WeightAverage
from mhla_gen.training.float8 import require_float8, use_float8
from mhla_gen.training.one_pass import OnePass, build_one_pass
from mhla_gen.training.optim import build_optimizer, mixing_matrices, train_only_mhla
from mhla_gen.training.parallel import (
    autocast_shared,
    build_accelerator,
    free_whole,
    gather_ahead,
    keep_gathered,
    shard_by,
    whole_state,
    without_weights,
)
from mhla_gen.training.randomness import step_randomness
from mhla_gen.training.recent import RecentSteps
from mhla_gen.training.shards import (
    clipping_factor,
    gradient_norm,
    scale_gradients,
    step_on_shards,
)
from mhla_gen.training.softmax import avoid_faulty_softmax
from mhla_gen.training.step import StepResult
from mhla_gen.training.task import BuildTask, Task
from mhla_gen.training.throughput import step_flops


@dataclass
class Run:
    """Everything that one optimizer step needs."""

    config: TrainConfig
    accelerator: Accelerator
    data: TrainingData
    task: Task
    model: Any
    """The task's transformer, as processes share it."""
    outline: Any
    """What it was before, without weights; None where every process has the whole of it."""
    optimizer: Any
    learning_rate: Any
    ema: WeightAverage
    one_pass: OnePass | None
    """Clips, updates and averages what it can; None leaves all of it to three passes."""
    recent: RecentSteps
    """Steps that the log has no line of yet."""
    sample_flops: int | None
    """Operations of training on one sample; see `step_flops`."""

    @cached_property
    def order(self) -> BatchOrder:
        """The samples of each micro-batch, over all processes."""
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

    # A resumed run is bit for bit that of an uninterrupted one; cuDNN may add gradients of patch
    # embeddings in any order.
    @repeatable_convolutions()
    def step(self, number: int, parts: Sequence[Batch]) -> StepResult:
        """Do optimizer step `number`, counted from 0.

        Args:
            number: Steps done before.
            parts: This process's share of the step's micro-batches.
        """
        randomness = step_randomness(
            self.task.objective,
            seed=self.config.seed,
            step=number,
            batch_size=self.config.batch_size,
            dropout=self.config.label_dropout,
            flip=self.config.data.horizontal_flip,
        )
        device, size, losses = self.accelerator.device, self.order.size, []
        for index, part in enumerate(parts):
            # Gradients are averaged over processes once, with the last micro-batch.
            last = index == len(parts) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                found = self.task.step_losses(
                    self.model,
                    {name: send(tensor, device) for name, tensor in part.items()},
                    randomness.part(slice(index * size, (index + 1) * size))
                    .part(self.rows)
                    .to(device),
                )
                self.accelerator.backward(found["loss"].mean() / len(parts))
            losses.append({name: values.detach() for name, values in found.items()})
        # Looked for once: a model has many modules.
        parameters = list(self.model.parameters())
        norm = gradient_norm(parameters)
        factor = clipping_factor(norm, self.config.max_grad_norm)
        done = set() if self.one_pass is None else self.one_pass(parameters, factor)
        if self.config.max_grad_norm is not None:
            scale_gradients(parameters, factor)
        self.optimizer.step()
        self.learning_rate.step()
        self.optimizer.zero_grad()
        self.ema.step(parameters, done)
        timesteps = self.task.objective.timesteps(randomness.times)
        return StepResult(
            {name: torch.cat([part[name] for part in losses]) for name in losses[0]},
            timesteps.reshape(len(timesteps), -1)[:, -1],
            norm,
        )

    @contextmanager
    def averaged_model(self, gather: bool = True) -> Iterator[Any]:
        """The transformer with the EMA weights, in evaluation mode.

        Args:
            gather: Where processes share the model, give the main one a model of its own, and the
                others None. Otherwise all get the shared model, and all must call it.
        """
        model = self.accelerator.unwrap_model(self.model)
        with self.ema.applied(model):
            if gather and self.accelerator.is_fsdp2:
                yield self._own_copy(model)
            else:
                model.eval()
                try:
                    yield model
                finally:
                    # Training continues after a preview that failed.
                    model.train()
                    free_whole(model)

    def _own_copy(self, model: Any) -> Any:
        state = whole_state(model, self.accelerator.is_main_process)
        if not state:
            return None
        own = copy.deepcopy(self.outline)
        own.load_state_dict(state, assign=True)
        return own.eval()

    def describe(self, number: int, positions: Sequence[int]) -> list[str]:
        """The names of the samples at these positions of the batch of a step."""
        parts = self.config.gradient_accumulation_steps
        names = []
        for position in positions:
            part, row = divmod(position, self.order.size)
            sample = self.order.micro_batch(number * parts + part)[row]
            names.append(self.data.describe(sample))
        return names


def build_run(
    config: TrainConfig, build: BuildTask = build_task, data: TrainingData | None = None
) -> Run:
    """Open the data and build model, optimizer, learning-rate schedule and EMA.

    Args:
        config: Settings.
        build: Makes the task of the settings and the data.
        data: What to train on, in place of what the settings name.

    Raises:
        ValueError: If the settings, the data and the number of processes do not fit together.
    """
    accelerator = build_accelerator(config)
    parts = accelerator.num_processes * config.gradient_accumulation_steps
    if config.batch_size % parts:
        raise UserError(
            f"batch_size {config.batch_size} must be a multiple of {parts}, "
            "processes × gradient_accumulation_steps"
        )
    if config.float8:
        require_float8()
    data = data or load_data(config.data)
    set_seed(config.seed)
    task = build(config, data)
    model = task.model
    if config.model.trainable == "mhla":
        train_only_mhla(model)
    sample_flops = _examine(task, data, accelerator.device)
    outline = without_weights(model) if accelerator.is_fsdp2 else None
    if config.float8:
        use_float8(model)
    if config.gradient_checkpointing:
        recompute_activations(model, config.gradient_checkpointing)
    model.train()
    compile_model(model, config.compile, any_size=task.any_length)
    optimizer = build_optimizer(
        model,
        config.learning_rate,
        config.weight_decay,
        config.mixing_learning_rate,
        config.mhla_learning_rate,
        config.optimizer,
        config.optimizer_options,
    )
    learning_rate = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=config.max_steps,
    )
    model, prepared = _shared(accelerator, config, task, optimizer)
    ema = WeightAverage(model, config.ema_decay, config.ema_width)
    one_pass = build_one_pass(
        config.one_pass,
        optimizer,
        ema,
        # Clipped to [0, 1] after each step.
        mixing_matrices(model),
        accelerator.device,
        shared=accelerator.is_fsdp2,
    )
    return Run(
        config=config,
        accelerator=accelerator,
        data=data,
        task=task,
        model=model,
        outline=outline,
        optimizer=prepared,
        learning_rate=learning_rate,
        ema=ema,
        one_pass=one_pass,
        recent=RecentSteps(accelerator, config.gradient_accumulation_steps),
        sample_flops=sample_flops,
    )


def _examine(task: Task, data: TrainingData, device: torch.device) -> int | None:
    """Operations of training on one sample, by a forward pass on tensors without values.

    The pass also shows the lengths of softmax attention, some of which keep cuDNN out.
    """
    example = data.read([data.buckets[0][0]])
    with AttentionLengths() as lengths:
        flops = step_flops(task.model, task.conditioning, example, data.sample_shapes[0])
    # Where the pass ends early, nothing is counted, and some lengths are not found.
    alike = len(data.sample_shapes) == 1 and not task.any_length
    known = lengths.found if alike and flops is not None else None
    avoid_faulty_softmax(known, len(repeated_blocks(task.model)), device)
    return flops


def _shared(
    accelerator: Accelerator, config: TrainConfig, task: Task, optimizer: torch.optim.Optimizer
) -> tuple[Any, Any]:
    """A task's model as processes share it, recorded where it can be, and its optimizer."""
    model: Any = task.model
    shard_by(accelerator, model, (*repeated_blocks(model), *task.gathered))
    recorded = can_record(accelerator, task, config)
    # What is recorded must stay on the stream on which gradients arrive, which is that on which
    # DistributedDataParallel was made; the default one cannot be recorded.
    stream = torch.cuda.Stream() if recorded else None
    with torch.cuda.stream(stream), warnings.catch_warnings():
        # torch 2.14 renames a setting that accelerate 1.15 passes on.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
        model, prepared = accelerator.prepare(model, optimizer)
    if accelerator.is_fsdp2:
        step_on_shards(optimizer)
    keep_gathered(accelerator, model, task.reused)
    gather_ahead(accelerator, model)
    autocast_shared(accelerator, model)
    if stream is not None:
        torch.cuda.current_stream().wait_stream(stream)
        model.forward = RecordedTraining(model, model.forward, stream)
    return model, prepared


def can_record(accelerator: Accelerator, task: Task, config: TrainConfig) -> bool:
    """Whether a model's passes are recorded as CUDA graphs: those of a DiT, unless settings say no.

    A Wan has work enough for each launch, and clips of several shapes. FSDP2 moves the weights.

    Args:
        accelerator: Of the run.
        task: With a model that is not yet prepared.
        config: Settings.

    Raises:
        UserError: If the settings ask for it but it is not possible.
    """
    obstacle = _obstacle(accelerator, task, config)
    if config.cuda_graphs and obstacle is not None:
        raise UserError(f"cuda_graphs=true needs {obstacle}; leave cuda_graphs out")
    return config.cuda_graphs is not False and obstacle is None


def _obstacle(accelerator: Accelerator, task: Task, config: TrainConfig) -> str | None:
    """What keeps passes from being recorded, or None."""
    if config.compile != "regional":
        return f"compile=regional, found {config.compile}"
    if not config.takes_labels:
        return "a DiT that learns labels, found another transformer"
    if task.losses is not None:
        return "a model that learns from data, found a stage of a distillation"
    if config.gradient_checkpointing and draws(task.model):
        return "gradient_checkpointing=false where dropout draws"
    if accelerator.device.type != "cuda":
        return f"a GPU, found {accelerator.device}"
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_GPU):
        return "whole weights, which parallelism=fsdp does not have"
    return None
