"""Speed and memory of the arms of a plan of docs/evidence.md, each alone on its GPU while timed.

    PYTHONPATH=benchmarks python experiments/evidence/evidence_speed.py OUT [--plan PLAN.yaml]

OUT gets speed-ARM-SETTING.json for each; existing results are not measured again, and refused if
they are of other settings. Any number of processes may share one OUT and one GPU: they compile in
parallel and take turns timing, while the others wait. Training is timed as whole steps of
`mhla-gen train` on random data, sampling as whole steps of a sampler in bfloat16. Layers are
compiled. experiments/evidence.sh runs all of this.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import FlowMatchEulerDiscreteScheduler
from evidence_clips import AsImages, ClipClasses, class_embeddings, clip_task, draw_clips
from evidence_data import claimed
from evidence_plan import PLAN, Plan, Run
from evidence_run import machine
from evidence_settings import require_speeds, stated
from moving_emoji import COLUMNS, SIDE
from sharing import Alone, turns
from steps import RandomSamples, attention_kernel, fresh, synchronize, timed

from mhla_gen.config import SampleConfig
from mhla_gen.files import write_json
from mhla_gen.pipelines.class_conditional import ClassConditionalPipeline
from mhla_gen.runtime.compiling import compile_blocks
from mhla_gen.runtime.devices import resolve_device
from mhla_gen.sampling.building import place
from mhla_gen.training.build import build_task
from mhla_gen.training.dit import build_model
from mhla_gen.training.training_run import build_run

_SHAPES = {"new": (3, 64, 64), "clips": (3, COLUMNS * SIDE, COLUMNS * SIDE)}
_CLASSES = 18
_WARM_UP_STEPS, _STEPS = 4, 20


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure everything without a result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--plan", type=Path, default=PLAN)
    parser.add_argument("--seconds", type=float, default=3.0, help="measured time of a training")
    options = parser.parse_intermixed_args(arguments)
    plan = Plan(options.plan)
    require_speeds(options.out, plan.speed, options.overrides)
    PartialState(cpu=not torch.cuda.is_available())
    locks = options.out / "work"
    locks.mkdir(parents=True, exist_ok=True)
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "").replace(",", "-")
    for run in plan.speed:
        name = run.speed_name
        path = options.out / f"{name}.json"
        with claimed(locks / f"{name}.lock") as ours:
            if ours and not path.is_file():
                with turns(locks / f"gpu-{gpu}.lock") as alone:
                    write_json(path, measure(run, options, alone))
                print(f"{name}: {path.read_text(encoding='utf-8')}", flush=True)


def measure(run: Run, options: argparse.Namespace, alone: Alone) -> dict[str, Any]:
    """Images (or clips) per second and GiB of one arm, in training and in sampling."""
    device = resolve_device("auto")
    with fresh(), attention_kernel(run.arm):
        found = {"train": training(run, options, alone)}
    with fresh(), attention_kernel(run.arm):
        found["sample"] = sampling(run, options, device, alone)
    facts = {"arm": run.arm, "setting": run.setting.name, "tokens": run.tokens}
    config = stated(run, run.config(*options.overrides))
    return {**facts, **found, "config": config, "machine": machine(device)}


def training(run: Run, options: argparse.Namespace, alone: Alone) -> dict[str, Any]:
    """Whole steps of the training loop."""
    precision = "bf16" if torch.cuda.is_available() else "fp32"
    config = run.config(f"mixed_precision={precision}", "report_to=none", *options.overrides)
    data = RandomSamples(_SHAPES[run.setting.kind], num_classes=_CLASSES)
    build = clip_task if run.setting.kind == "clips" else build_task
    found = timed(build_run(config, build, data), options, alone)
    return {"batch_size": config.batch_size, **found}


@torch.no_grad()
def sampling(
    run: Run, options: argparse.Namespace, device: torch.device, alone: Alone
) -> dict[str, Any]:
    """Whole steps of a sampler."""
    config = run.config(*options.overrides)
    labels = torch.arange(config.batch_size) % _CLASSES
    if run.setting.kind == "clips":
        data = RandomSamples(_SHAPES["clips"], num_classes=_CLASSES)
        model = clip_task(config, data).model.to(device).eval()
        if device.type == "cuda":
            model = model.to(torch.bfloat16)
        compile_blocks(model)
        called = AsImages(model, ClipClasses(class_embeddings(_CLASSES)))

        def draw(steps: int) -> Any:
            return draw_clips(called, labels.numpy(), _SHAPES["clips"], steps, device)
    else:
        pipeline = _pipeline(config.model, device)

        def draw(steps: int) -> Any:
            options = {"guidance_scale": 1.0, "output_type": "latent"}
            return pipeline(labels.tolist(), num_inference_steps=steps, **options)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    draw(_WARM_UP_STEPS)
    with alone():
        synchronize()
        began = time.perf_counter()
        draw(_STEPS)
        synchronize()
        seconds = time.perf_counter() - began
    found = {"images_per_second": round(len(labels) / seconds, 1), "steps": _STEPS}
    if device.type == "cuda":
        found["gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return found


def _pipeline(config: Any, device: torch.device) -> Any:
    """As `mhla-gen sample dtype=bfloat16 compile=true` loads it."""
    model = build_model(config, _SHAPES["new"], _CLASSES)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        ClassConditionalPipeline(model, FlowMatchEulerDiscreteScheduler()).save_pretrained(folder)
        pipeline: Any = ClassConditionalPipeline.from_pretrained(folder, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    place(SampleConfig(pipeline="", output_dir="", compile=True), pipeline, device)
    return pipeline


if __name__ == "__main__":
    main()
