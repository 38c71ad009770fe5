"""Training speed of DiTs with softmax and with MHLA: whole steps of the loop, on random latents.

    python benchmarks/train_speed.py speed.json --models DiT-S/2 DiT-XL/2 --pixels 256 512
    torchrun --nproc-per-node 2 benchmarks/train_speed.py two.json --parallelism fsdp

A step is that of `mhla-gen train`: forward and backward pass in bfloat16, clipping, AdamW, the
average of the weights. Images of P pixels are latents of P / 8. Softmax is torch's attention with
cuDNN's kernel forced, where there is a GPU; mhla is MHLA with convolution and gate, mhla-plain
without.
"""

import argparse
import gc
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from torch.nn.attention import SDPBackend, sdpa_kernel

from mhla_gen.config import MHLAConfig, ModelConfig, ObjectiveConfig, TrainConfig
from mhla_gen.data import Batch
from mhla_gen.files import written_whole
from mhla_gen.runtime.recorded_training import RecordedTraining
from mhla_gen.training.throughput import peak_flops
from mhla_gen.training.training_run import Run, build_run

_NUM_CLASSES = 1000
_WARM_UP = 3
# Samples of a step on one device: tokens per device are the same at both sizes.
_BATCH_SIZES = {("S", 256): 256, ("S", 512): 64, ("XL", 256): 64, ("XL", 512): 16}


@dataclass(frozen=True)
class RandomSamples:
    """Latents or images in memory: what is measured is the step, not reading."""

    shape: tuple[int, ...]
    num_classes: int
    count: int = 512

    @cached_property
    def samples(self) -> torch.Tensor:
        """All of them."""
        return torch.randn(self.count, *self.shape)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Their numbers."""
        return tuple(map(str, range(self.num_classes)))

    @property
    def buckets(self) -> tuple[range]:
        """One."""
        return (range(self.count),)

    @property
    def sample_shapes(self) -> tuple[tuple[int, ...]]:
        """One."""
        return (self.shape,)

    def __len__(self) -> int:
        return self.count

    def read(self, indices: Sequence[int]) -> Batch:
        """Some of them, with classes in turn."""
        chosen = torch.tensor(indices)
        return {"samples": self.samples[chosen], "labels": chosen % self.num_classes}

    def describe(self, index: int) -> str:
        """Nothing to name."""
        return f"random sample {index}"


@dataclass(frozen=True)
class Row:
    """One measurement."""

    model: str
    pixels: int
    attention: str
    compile: str

    def config(self, options: argparse.Namespace, num_processes: int) -> TrainConfig:
        """The settings of its run."""
        plain = self.attention.endswith("-plain")
        size = options.batch_size or _BATCH_SIZES.get((self.model[4:-2], self.pixels), 64)
        return TrainConfig(
            output_dir="unused",
            model=ModelConfig(
                preset=self.model,
                attention=self.attention.removesuffix("-plain"),
                mhla=MHLAConfig(conv=not plain, gate=not plain),
                num_layers=options.num_layers,
            ),
            objective=ObjectiveConfig(name="ddpm"),
            batch_size=size * num_processes,
            learning_rate=1e-4,
            mixed_precision=options.precision,
            parallelism=options.parallelism,
            compile=self.compile,
            cuda_graphs=not options.no_cuda_graphs,
            gradient_checkpointing=options.gradient_checkpointing,
            report_to="none",
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the rows asked for, and write them after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", nargs="+", default=["DiT-S/2", "DiT-XL/2"])
    parser.add_argument("--pixels", nargs="+", type=int, default=[256, 512])
    parser.add_argument("--attention", nargs="+", default=["softmax", "mhla"])
    parser.add_argument("--compile", nargs="+", default=["regional"])
    parser.add_argument("--parallelism", default="ddp", choices=["ddp", "fsdp"])
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--no-cuda-graphs", action="store_true", help="launch every kernel")
    parser.add_argument("--batch-size", type=int, help="samples of a step on one device")
    parser.add_argument("--num-layers", type=int, help="blocks, in place of the model's own")
    parser.add_argument("--seconds", type=float, default=6.0, help="measured time of a row")
    options = parser.parse_args(arguments)
    rows = [
        Row(model, pixels, attention, compiled)
        for model in options.models
        for pixels in options.pixels
        for attention in options.attention
        for compiled in options.compile
    ]
    # Without a GPU accelerate starts no group of processes unless it is told so.
    PartialState(cpu=not torch.cuda.is_available())
    found: list[dict[str, Any]] = []
    for row in rows:
        result = measure(row, options)
        if PartialState().is_main_process:
            found.append(result)
            with written_whole(options.out) as partial:
                partial.write_text(json.dumps({**machine(), "rows": found}, indent=1) + "\n")
            print(json.dumps(result), flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def measure(row: Row, options: argparse.Namespace) -> dict[str, Any]:
    """Build the run, warm it up, and time its steps."""
    state = PartialState()
    config = row.config(options, state.num_processes)
    named = {
        "model": row.model,
        "pixels": row.pixels,
        "attention": row.attention,
        "compile": row.compile,
        "parallelism": config.parallelism,
        "devices": state.num_processes,
        "batch_size_per_device": config.batch_size // state.num_processes,
        "gradient_checkpointing": config.gradient_checkpointing,
    }
    with fresh(), attention_kernel(row.attention):
        data = RandomSamples((4, row.pixels // 8, row.pixels // 8), _NUM_CLASSES)
        try:
            return named | timed(build_run(config, data=data), options)
        except torch.OutOfMemoryError:
            return named | {"error": "out of memory"}


def timed(
    run: Run,
    options: argparse.Namespace,
    alone: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, Any]:
    """Speed and memory of a run's steps.

    Args:
        run: What is timed.
        options: `seconds`: about how long.
        alone: Entered while steps are timed, after those that compile: waits for the device.
    """
    steps = enumerate(run.batches(0, 100_000))
    if torch.cuda.is_available():
        # Before the first step: what a recorded pass takes is allocated once, when it is recorded.
        torch.cuda.reset_peak_memory_stats()

    def seconds_of(count: int) -> float:
        synchronize()
        began = time.perf_counter()
        for number, parts in islice(steps, count):
            run.step(number, parts)
        synchronize()
        return time.perf_counter() - began

    warm_up = seconds_of(_WARM_UP)
    with alone():
        pace = seconds_of(_WARM_UP) / _WARM_UP
        # The main process decides: all must do as many.
        count = max(3, agreed(run, options.seconds / pace))
        seconds = seconds_of(count) / count
    rate = run.config.batch_size / seconds
    peak = peak_flops(run.accelerator.device, run.config.mixed_precision)
    found: dict[str, Any] = {
        "images_per_second": round(rate, 1),
        "milliseconds_per_step": round(1000 * seconds, 2),
        "steps": count,
        "warm_up_seconds": round(warm_up, 1),
        "recorded": isinstance(run.model.forward, RecordedTraining),
        "gflop_per_image": round(run.sample_flops / 1e9, 2),
        "parameters": sum(p.numel() for p in run.model.parameters()),
    }
    if torch.cuda.is_available():
        found["gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    if peak is not None:
        found["mfu"] = round(rate * run.sample_flops / peak / run.accelerator.num_processes, 4)
    run.accelerator.free_memory()
    return found


def agreed(run: Run, number: float) -> int:
    """The main process's number, in all."""
    value = torch.tensor([float(number)], device=run.accelerator.device)
    if run.accelerator.num_processes > 1:
        torch.distributed.broadcast(value, 0)
    return int(value)


@contextmanager
def fresh() -> Iterator[None]:
    """Leave nothing of a row to the next: no compiled code, no state of accelerate, no memory."""
    yield
    AcceleratorState._reset_state()
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def attention_kernel(attention: str) -> AbstractContextManager[Any]:
    """Softmax attention of cuDNN on a GPU; MHLA chooses its own kernels."""
    if attention == "softmax" and torch.cuda.is_available():
        return sdpa_kernel(SDPBackend.CUDNN_ATTENTION)
    return nullcontext()


def synchronize() -> None:
    """Wait for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine() -> dict[str, Any]:
    """What was measured on, and when."""
    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else platform.processor() or "CPU",
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "date": datetime.now(UTC).date().isoformat(),
    }


if __name__ == "__main__":
    main()
