"""Training and sampling steps on random latents, and their timing."""

import gc
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from diffusers import DDIMScheduler
from rows import machine as machine
from sharing import Alone
from torch.nn.attention import SDPBackend, sdpa_kernel

from mhla_gen.bench.profiles import as_table, kernel_times
from mhla_gen.config import SampleConfig, TrainConfig
from mhla_gen.data import Batch
from mhla_gen.pipelines.class_conditional import ClassConditionalPipeline
from mhla_gen.runtime.recorded_training import RecordedTraining
from mhla_gen.runtime.softmax_kernels import compile_settings
from mhla_gen.sampling.building import place
from mhla_gen.training.build import build_task
from mhla_gen.training.throughput import peak_flops
from mhla_gen.training.training_run import Run

_WARM_UP = 3
_SAMPLING_STEPS = 20


@dataclass(frozen=True)
class RandomSamples:
    """Latents or images in memory, so that only the step is measured, not reading.

    On the CPU, as those that are read, also where a model is built on another device.
    """

    shape: tuple[int, ...]
    num_classes: int
    count: int = 512

    @cached_property
    def samples(self) -> torch.Tensor:
        """All samples."""
        return torch.randn(self.count, *self.shape, device="cpu")

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class numbers as names."""
        return tuple(map(str, range(self.num_classes)))

    @property
    def buckets(self) -> tuple[range]:
        """A single bucket."""
        return (range(self.count),)

    @property
    def sample_shapes(self) -> tuple[tuple[int, ...]]:
        """The shape of all samples."""
        return (self.shape,)

    def __len__(self) -> int:
        return self.count

    def read(self, indices: Sequence[int]) -> Batch:
        """A batch, with classes in turn."""
        chosen = torch.tensor(indices, device="cpu")
        return {"samples": self.samples[chosen], "labels": chosen % self.num_classes}

    def describe(self, index: int) -> str:
        """An empty description."""
        return f"random sample {index}"


def timed(
    run: Run,
    options: Namespace,
    alone: Alone = nullcontext,
) -> dict[str, Any]:
    """Speed and memory of a run's steps.

    Args:
        run: The run to time.
        options: `seconds`, the approximate duration; optionally `profile`, to list kernels.
        alone: Context entered while steps are timed, after compilation; waits for the device.
    """
    steps = enumerate(run.batches(0, 100_000))
    if torch.cuda.is_available():
        # Before the first step, since a CUDA graph allocates its memory once, when it is recorded.
        torch.cuda.reset_peak_memory_stats()

    def step() -> None:
        run.step(*next(steps))

    began = time.perf_counter()
    median_seconds(step, 1)
    warm_up = time.perf_counter() - began
    with alone():
        pace = median_seconds(step, _WARM_UP)
        # The main process decides, since all must do the same number of steps.
        count = max(3, agreed(run, options.seconds / pace))
        seconds = median_seconds(step, count)
        kernels = None
        if getattr(options, "profile", False):
            kernels = kernel_times(step, run.accelerator.device)
            print(as_table(kernels), flush=True)
    rate = run.config.batch_size / seconds
    peak = peak_flops(run.accelerator.device, run.config.mixed_precision)
    found: dict[str, Any] = {
        "images_per_second": round(rate, 3),
        "milliseconds_per_step": round(1000 * seconds, 2),
        "steps": count,
        "warm_up_seconds": round(warm_up, 1),
        "recorded": isinstance(run.model.forward, RecordedTraining),
        "parameters": sum(p.numel() for p in run.model.parameters()),
    }
    if torch.cuda.is_available():
        found["gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        # Also what MHLA's rows take for attention to captions.
        found["softmax"] = "cudnn" if torch.backends.cuda.cudnn_sdp_enabled() else "flash"
    if run.sample_flops is not None:
        found["gflop_per_image"] = round(run.sample_flops / 1e9, 2)
        if peak is not None:
            share = rate * run.sample_flops / peak / run.accelerator.num_processes
            found["mfu"] = round(share, 4)
    if kernels is not None:
        found["kernels"] = kernels
    run.accelerator.free_memory()
    return found


@torch.no_grad()
def sampling(
    config: TrainConfig,
    data: RandomSamples,
    options: Namespace,
    alone: Alone,
) -> dict[str, Any]:
    """Time of one pass of the model in bfloat16, as `mhla-gen sample` compiles and records it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = config.batch_size
    with device:
        model: Any = build_task(config, data).model.eval()
        if device.type == "cuda":
            model.to(torch.bfloat16)
        for name, parameter in model.named_parameters():
            if name.endswith("mixing"):
                # The state in which from_pretrained leaves a model.
                parameter.data = parameter.data.float()
        pipeline = ClassConditionalPipeline(model, DDIMScheduler())
        place(
            SampleConfig(pipeline="", output_dir="", compile=config.compile != "none"),
            pipeline,
            device,
        )
        latents = torch.randn(batch, *data.shape, dtype=model.dtype)
        labels, times = torch.arange(batch) % data.num_classes, torch.full((batch,), 500)

    def step() -> None:
        model(latents, timestep=times, class_labels=labels, return_dict=False)

    median_seconds(step, 1)
    with alone():
        # Recorded at the third call.
        median_seconds(step, _WARM_UP)
        seconds = median_seconds(step, _SAMPLING_STEPS)
        found: dict[str, Any] = {"sampling_milliseconds": round(1000 * seconds, 2)}
        found["sampling_batch_size"] = batch
        if options.profile:
            found["sampling_kernels"] = kernel_times(step, device)
            print(as_table(found["sampling_kernels"]), flush=True)
    return found


def median_seconds(step: Callable[[], Any], count: int) -> float:
    """Median time of several steps, launched one after the other without waiting in between."""
    if not torch.cuda.is_available():
        times = [time.perf_counter()]
        for _ in range(count):
            step()
            times.append(time.perf_counter())
        return statistics.median(after - before for before, after in pairwise(times))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    synchronize()
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairwise(events)) / 1e3


def agreed(run: Run, number: float) -> int:
    """The main process's number, on all processes."""
    value = torch.tensor([float(number)], device=run.accelerator.device)
    if run.accelerator.num_processes > 1:
        torch.distributed.broadcast(value, 0)
    return int(value)


@contextmanager
def fresh() -> Iterator[None]:
    """Clear compiled code, the state of accelerate and memory between rows."""
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    with compile_settings.patch(cache_key_tag=compile_settings.cache_key_tag):
        yield
    # The row's lengths or kinds of blocks may have kept it out.
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    AcceleratorState._reset_state()
    if PartialState().num_processes > 1:
        # A row with FSDP2 says so in both states, of which accelerate reads this one.
        on_gpus = torch.cuda.is_available()
        PartialState().distributed_type = (
            DistributedType.MULTI_GPU if on_gpus else DistributedType.MULTI_CPU
        )
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def attention_kernel(attention: str) -> AbstractContextManager[Any]:
    """Softmax attention of cuDNN on a GPU, or flash where training keeps cuDNN out.

    MHLA chooses its own kernels.
    """
    if attention == "softmax" and torch.cuda.is_available():
        fastest_first = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
        return sdpa_kernel(fastest_first, set_priority=True)
    return nullcontext()


def synchronize() -> None:
    """Wait for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
