"""Training speed of DiTs with softmax and with MHLA: whole steps of the loop, on random latents.

    python benchmarks/train_speed.py speed.json --models DiT-S/2 DiT-XL/2 --pixels 256 512
    python benchmarks/train_speed.py arms.json --arms --sampling --processes 3 --models DiT-XL/2
    torchrun --nproc-per-node 2 benchmarks/train_speed.py two.json --parallelism fsdp

A step is that of `mhla-gen train`: forward and backward pass in bfloat16, clipping, AdamW and the
average of the weights. Images of P pixels are latents of P / 8. softmax is torch's attention, on a
GPU with cuDNN's kernel; mhla is MHLA with convolution and gate, mhla-plain without. Settings of
MHLA may follow, as in "mhla gate=head"; --arms runs all arms of the comparison. --sampling also
times a pass of the model as in `mhla-gen sample`; --profile lists kernels.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from sharing import Alone, FailedElsewhereError, spread, turns
from steps import RandomSamples, attention_kernel, fresh, machine, sampling, timed

from mhla_gen.config import MHLAConfig, ModelConfig, ObjectiveConfig, TrainConfig, load_config
from mhla_gen.data import TrainingData
from mhla_gen.files import write_json
from mhla_gen.runtime.processes import part_processes
from mhla_gen.training.build import build_task
from mhla_gen.training.task import Task
from mhla_gen.training.training_run import build_run

_NUM_CLASSES = 1000
ARMS = (
    "softmax",
    "mhla-plain",
    "mhla gate=false",
    "mhla gate=true",
    "mhla gate=head",
    "mhla gate=64",
    "mhla gate=head exact=0.05",
    "mhla gate=head exact=0.125",
)
"""Softmax; MHLA plain, with convolution, and with each gate; both halves."""
# Samples per step and device, chosen so that both sizes have the same number of tokens.
_BATCH_SIZES = {("S", 256): 256, ("S", 512): 64, ("XL", 256): 64, ("XL", 512): 16}


@dataclass(frozen=True)
class Row:
    """One measurement."""

    model: str
    pixels: int
    attention: str
    compile: Any

    def config(self, options: argparse.Namespace, num_processes: int) -> TrainConfig:
        """The settings of its run."""
        name, *settings = self.attention.split()
        if name.endswith("-plain"):
            settings = ["conv=false", "gate=false", *settings]
        size = options.batch_size or _BATCH_SIZES.get((self.model[4:-2], self.pixels), 64)
        return TrainConfig(
            output_dir="unused",
            model=ModelConfig(
                preset=self.model,
                attention=name.removesuffix("-plain"),  # type: ignore[arg-type]
                mhla=load_config(None, settings, MHLAConfig),
                num_layers=options.num_layers,
            ),
            objective=ObjectiveConfig(name="ddpm"),
            batch_size=size * num_processes,
            learning_rate=1e-4,
            mixed_precision=options.precision,
            float8=options.float8,
            parallelism=options.parallelism,
            compile=self.compile,
            cuda_graphs=False if options.no_cuda_graphs else None,
            one_pass=options.one_pass,
            gradient_checkpointing=options.gradient_checkpointing,
            report_to="none",
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the requested rows, and write the results after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", nargs="+", default=["DiT-S/2", "DiT-XL/2"])
    parser.add_argument("--pixels", nargs="+", type=int, default=[256, 512])
    parser.add_argument("--attention", nargs="+", default=["softmax", "mhla"])
    parser.add_argument("--compile", nargs="+", default=["regional"])
    parser.add_argument("--parallelism", default="ddp", choices=["ddp", "fsdp"])
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--gradient-checkpointing", type=float, default=0, help="share of blocks")
    parser.add_argument("--float8", action="store_true", help="feed-forward layers in 8 bits")
    parser.add_argument("--no-cuda-graphs", action="store_true", help="launch every kernel")
    parser.add_argument(
        "--one-pass", action=argparse.BooleanOptionalAction, help="as the setting one_pass"
    )
    parser.add_argument("--batch-size", type=int, help="samples of a step on one device")
    parser.add_argument("--num-layers", type=int, help="blocks, in place of the model's own")
    parser.add_argument("--seconds", type=float, default=6.0, help="measured time of a row")
    parser.add_argument("--arms", action="store_true", help="all kinds of attention in ARMS")
    parser.add_argument("--sampling", action="store_true", help="time a pass without gradients too")
    parser.add_argument("--profile", action="store_true", help="list the longest kernels")
    parser.add_argument("--processes", type=int, default=1, help="that compile side by side")
    parser.add_argument("--part", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--locks", nargs="*", default=[], help="see sharing.turns")
    options = parser.parse_args(arguments)
    if options.processes > 1:
        spread(__file__, list(arguments or sys.argv[1:]), options.out, options.processes)
        return
    rows = [
        Row(model, pixels, attention, compiled)
        for model in options.models
        for pixels in options.pixels
        for attention in (ARMS if options.arms else options.attention)
        for compiled in options.compile
    ]
    # Without a GPU, accelerate starts a process group only if told to.
    PartialState(cpu=not torch.cuda.is_available())
    found: list[dict[str, Any]] = []
    first, step, out, *locks = options.part or (0, 1, options.out, *options.locks)
    for number in range(int(first), len(rows), int(step)):
        # Other processes need not wait between rows.
        with turns(*locks) as alone:
            result = {"number": number, **measure(rows[number], options, alone)}
        if PartialState().is_main_process:
            found.append(result)
            write_json(out, {**machine(), "rows": found}, indent=1)
            short = {k: v for k, v in result.items() if not k.endswith("kernels")}
            print(json.dumps(short), flush=True)
    part_processes()


def measure(row: Row, options: argparse.Namespace, alone: Alone) -> dict[str, Any]:
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
        "float8": config.float8,
    }
    data = RandomSamples((4, row.pixels // 8, row.pixels // 8), _NUM_CLASSES)
    for time_steps in (train, sampling) if options.sampling else (train,):
        with fresh(), attention_kernel(row.attention):
            try:
                named |= time_steps(config, data, options, alone)
            except (torch.OutOfMemoryError, FailedElsewhereError) as error:
                full = isinstance(error, torch.OutOfMemoryError)
                named["error"] = "out of memory" if full else str(error)
        if "error" in named:
            break
    return named


def train(
    config: TrainConfig,
    data: RandomSamples,
    options: argparse.Namespace,
    alone: Alone,
) -> dict[str, Any]:
    """Build a run and time its steps."""
    return timed(build_run(config, build_on_device, data), options, alone)


def build_on_device(config: TrainConfig, data: TrainingData) -> Task:
    """As in training, but weights are initialized on the device, which is faster."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return build_task(config, data)


if __name__ == "__main__":
    main()
