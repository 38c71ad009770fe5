"""Speed and memory of the arms of docs/evidence.md, each with a GPU of its own.

    python experiments/evidence/evidence_speed.py OUT [--arms mhla-conv-gate] [--tokens 256 1024]

OUT gets speed-ARM-TOKENS.json for each; those that are there are not measured again. Training is
whole steps of `mhla-gen train` on random images; sampling is whole steps of the pipeline in
bfloat16. Layers are compiled, and a step has the same number of tokens in every row.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import FlowMatchEulerDiscreteScheduler
from evidence_plan import Run, read_plan
from evidence_run import machine, write_json
from train_speed import RandomSamples, attention_kernel, fresh, synchronize, timed

from mhla_gen.config import SampleConfig
from mhla_gen.runtime.devices import resolve_device
from mhla_gen.sampling import ClassConditionalPipeline
from mhla_gen.sampling.building import place
from mhla_gen.training.build import build_model
from mhla_gen.training.training_run import build_run

ARMS = ("softmax", "linear", "linear-conv-gate", "mhla", "mhla-conv-gate", "blocks-64")
_TOKENS_OF_A_STEP = 131_072
_SHAPE = (3, 64, 64)
_CLASSES = 18
_STEPS = 20


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[256, 1024, 4096])
    parser.add_argument("--seconds", type=float, default=4.0, help="measured time of a training")
    parser.add_argument("--step-tokens", type=int, default=_TOKENS_OF_A_STEP)
    options = parser.parse_args(arguments)
    PartialState(cpu=not torch.cuda.is_available())
    options.out.mkdir(parents=True, exist_ok=True)
    for run in read_plan():
        wanted = run.seed == 0 and run.arm in options.arms and run.tokens in options.tokens
        path = options.out / f"speed-{run.arm}-{run.tokens}.json"
        if wanted and not path.is_file():
            write_json(path, measure(run, options))
            print(path.read_text(), flush=True)


def measure(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    """Images per second and GiB of one arm, in training and in sampling."""
    batch_size = options.step_tokens // run.tokens
    device = resolve_device("auto")
    with fresh(), attention_kernel(run.arm):
        found = {
            "arm": run.arm,
            "tokens": run.tokens,
            "batch_size": batch_size,
            "train": training(run, batch_size, options),
        }
    with fresh(), attention_kernel(run.arm):
        found["sample"] = sampling(run, batch_size, device)
    return found | {"machine": machine(device)}


def training(run: Run, batch_size: int, options: argparse.Namespace) -> dict[str, Any]:
    """Whole steps of the training loop."""
    precision = "bf16" if torch.cuda.is_available() else "fp32"
    config = run.config(
        f"batch_size={batch_size}", f"mixed_precision={precision}", "report_to=none"
    )
    data = RandomSamples(_SHAPE, num_classes=_CLASSES)
    return timed(build_run(config, data=data), options)


@torch.no_grad()
def sampling(run: Run, batch_size: int, device: torch.device) -> dict[str, Any]:
    """Whole steps of a pipeline, loaded as `mhla-gen sample dtype=bfloat16` loads it."""
    model = build_model(run.config().model, _SHAPE, _CLASSES)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        ClassConditionalPipeline(model, FlowMatchEulerDiscreteScheduler()).save_pretrained(folder)
        pipeline: Any = ClassConditionalPipeline.from_pretrained(folder, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    place(SampleConfig(pipeline="", output_dir="", compile=True), pipeline, device)
    labels = [i % _CLASSES for i in range(batch_size)]

    def draw(steps: int) -> float:
        synchronize()
        began = time.perf_counter()
        pipeline(labels, num_inference_steps=steps, guidance_scale=1.0, output_type="latent")
        synchronize()
        return time.perf_counter() - began

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    draw(4)
    seconds = draw(_STEPS)
    found = {"images_per_second": round(batch_size / seconds, 1), "steps": _STEPS}
    if device.type == "cuda":
        found["gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return found


if __name__ == "__main__":
    main()
