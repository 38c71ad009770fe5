"""Time sampling at scale: many small images with the command, and DiT-XL/2 with two samplers.

python benchmarks/sample_speed.py OUT.json [--count 50000] [--limit 60] [--parts small,xl]

Weights are random, since speed does not depend on them. `small` runs `mhla-gen sample` itself, on a
DiT-S of 32 × 32 pixels in patches of 4. `xl` samples one batch of 256 px images, including decoding
by an AutoencoderKL of Stable Diffusion's size, with softmax (cuDNN) and with MHLA, compiled as in
`mhla-gen sample compile=true`.
"""

import argparse
import json
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from rows import machine
from torch.nn.attention import SDPBackend, sdpa_kernel

from mhla_gen import ClassConditionalPipeline, MHLAConfig, inject
from mhla_gen.config import SampleConfig
from mhla_gen.files import write_json
from mhla_gen.sampling.batched_sampler import BatchedSampler
from mhla_gen.sampling.building import build_sampler, place
from mhla_gen.sampling.samplers import ClassSampler
from mhla_gen.sampling.sampling import Job
from mhla_gen.sampling.units import Units

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
SMALL = {"num_attention_heads": 6, "attention_head_dim": 64, "num_layers": 12, "patch_size": 4}
SMALL |= {"in_channels": 3, "sample_size": 32, "num_embeds_ada_norm": 1000}
XL = {"num_layers": 28, "sample_size": 32, "out_channels": 8}
_KERNELS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
TINY = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}


class ModelTime:
    """Seconds that the device spends in a model; the rest of the wall time is outside of it."""

    def __init__(self, model: Any):
        self._marks: list[Any] = []
        model.register_forward_pre_hook(lambda *_: self._marks.append(self._now()))
        model.register_forward_hook(lambda *_: self._marks.append(self._now()))

    def seconds(self) -> float:
        """The sum so far; waits for the device."""
        pairs = list(zip(self._marks[::2], self._marks[1::2], strict=True))
        if not ON_GPU:
            return sum(end - start for start, end in pairs)
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in pairs) / 1e3

    def _now(self) -> Any:
        if not ON_GPU:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def busy_share(draw: Any) -> float | None:
    """Share of sampling's wall time in which a kernel or copy was running, from torch.profiler."""
    if not ON_GPU:
        return None
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        torch.cuda.synchronize()
        began = time.perf_counter()
        draw()
        torch.cuda.synchronize()
        wall = time.perf_counter() - began
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    busy, end = 0.0, float("-inf")
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy / 1e6 / wall


def measure_small(count: int, limit: float, attention: str, tiny: bool) -> dict[str, Any]:
    """`mhla-gen sample` of `count` images, or of fewer if they would take longer than `limit`."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(**(SMALL | TINY if tiny else SMALL)).eval()
    if attention == "mhla":
        inject(model, MHLAConfig(layout=(2, 2)))
    pipe = ClassConditionalPipeline(model, FlowMatchEulerDiscreteScheduler())
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(Path(folder, "pipe"))
        batch = 8 if tiny else 4096
        settings: dict[str, Any] = {
            "pipeline": f"{folder}/pipe",
            "output_dir": f"{folder}/set",
            "num_inference_steps": 25,
            "dtype": "bfloat16" if ON_GPU else "float32",
            "compile": ON_GPU,
            "model_batch_size": batch,
        }
        rate = _rate(SampleConfig(**settings, num_samples=2 * batch), Path(folder, "trial"))
        chosen = max(batch, min(count, int(rate * limit)))
        config = SampleConfig(**settings, num_samples=chosen)
        config, sampler = build_sampler(config)
        job = Job(config, Path(folder, "set"), sampler, PartialState())
        model_time = ModelTime(sampler.pipeline.transformer)
        began = time.perf_counter()
        job.run()
        wall, inside = time.perf_counter() - began, model_time.seconds()
        # After the set: the model is on its device and compiled, and no more files are written.
        units = Units.split(2 * batch, batch)
        with BatchedSampler(sampler, units, 25, batch, config.reproducible) as batched:
            busy = busy_share(lambda: [unit for unit, _ in batched.draw([0, 1])])
    return {
        "attention": attention,
        "images": chosen,
        "asked_for": count,
        "seconds": round(wall, 2),
        "images_per_second": round(chosen / wall, 1),
        "images_per_second_after_start": round(rate, 1),
        "share_outside_the_model": round(1 - inside / wall, 4),
        "gpu_busy_share": None if busy is None else round(busy, 4),
        "model_batch_size": batch,
        "steps": 25,
        "guidance_scale": config.guidance_scale,
        "wall": "placing, compiling (counted as model), drawing, writing units, joining the npz",
    }


def _rate(config: SampleConfig, folder: Path) -> float:
    """Images per second of the second of two units; the first one compiles."""
    config, sampler = build_sampler(config)
    place(config, sampler.pipeline, DEVICE)
    units = Units.split(len(sampler), config.model_batch_size or 1)
    steps = config.num_inference_steps
    with BatchedSampler(sampler, units, steps, units.rows, config.reproducible) as batched:
        list(batched.draw([0]))
        began = time.perf_counter()
        for _, samples in batched.draw([1]):
            samples.cpu()
    return units.rows / (time.perf_counter() - began)


def measure_xl(attention: str, batch: int, tiny: bool) -> list[dict[str, Any]]:
    """One whole batch of DiT-XL/2, by 250 DDPM steps and by 50 steps of DPM-Solver++."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    with DEVICE:
        model = DiTTransformer2DModel(**(XL | TINY if tiny else XL)).eval()
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 8, 8) if tiny else (128, 256, 512, 512),
            norm_num_groups=4 if tiny else 32,
            layers_per_block=1 if tiny else 2,
        ).eval()
    if attention == "mhla":
        inject(model, MHLAConfig(layout=(4, 4)))
    ddpm = DDPMScheduler(variance_type="learned_range", clip_sample=False)
    pipe = ClassConditionalPipeline(model, ddpm, vae=vae, prediction_type="epsilon")
    pipe.set_progress_bar_config(disable=True)
    pipe.to(DEVICE, dtype)
    # The state in which from_pretrained leaves models.
    for name, parameter in model.named_parameters():
        if name.endswith("mixing"):
            parameter.data = parameter.data.float()
    place(SampleConfig(pipeline="", output_dir="", compile=ON_GPU), pipe, DEVICE)
    rows = []
    for scheduler, steps in ((ddpm, 250), (DPMSolverMultistepScheduler(), 50)):
        pipe.scheduler = scheduler
        labels = np.arange(batch) % 1000
        sampler = ClassSampler(pipe, labels, seed=0, guidance_scale=1.5, guidance_channels=3)
        # cuDNN first; the decoder's one wide head is not for it.
        kernel = sdpa_kernel(_KERNELS, set_priority=True) if ON_GPU else nullcontext()
        with kernel:
            rows.append(_timed(sampler, 4 if tiny else steps) | {"attention": attention})
    return rows


def _timed(sampler: ClassSampler, steps: int) -> dict[str, Any]:
    batch = len(sampler)
    units = Units(batch, batch)
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    # Enough steps to record one as a CUDA graph, which allocates its memory.
    with BatchedSampler(sampler, units, 4, batch, True) as batched:
        list(batched.draw([0]))
    model_time = ModelTime(sampler.pipeline.transformer)
    with BatchedSampler(sampler, units, steps, batch, True) as batched:
        began = time.perf_counter()
        for _, samples in batched.draw([0]):
            samples.cpu()
        wall = time.perf_counter() - began
    return {
        "scheduler": type(sampler.pipeline.scheduler).__name__,
        "steps": steps,
        "batch": batch,
        "seconds": round(wall, 3),
        "images_per_second": round(batch / wall, 3),
        "model_ms_per_step": round(model_time.seconds() / steps * 1e3, 2),
        "share_outside_the_model": round(1 - model_time.seconds() / wall, 4),
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if ON_GPU else None,
        "guidance": "1.5 on 3 of 4 channels, so every step runs twice the batch",
    }


def main() -> None:
    """Measure, print and write the requested parts, one at a time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--limit", type=float, default=600, help="seconds for the small images")
    parser.add_argument("--batch", type=int, default=32, help="images of DiT-XL/2")
    parser.add_argument("--parts", default="small,xl")
    parser.add_argument("--tiny", action="store_true", help="toy models, to try the script")
    args = parser.parse_args()
    report: dict[str, Any] = {**machine()}

    def keep(part: str, row: dict[str, Any]) -> None:
        print(part, json.dumps(row), flush=True)
        report.setdefault(part, []).append(row)
        # Written after every row, so that a time limit loses no results.
        write_json(args.out, report)

    if "small" in args.parts.split(","):
        keep("small", measure_small(args.count, args.limit, "mhla", args.tiny))
    if "xl" in args.parts.split(","):
        for attention in ("softmax", "mhla"):
            for row in measure_xl(attention, args.batch, args.tiny):
                keep("xl", row)


if __name__ == "__main__":
    main()
