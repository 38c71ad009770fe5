"""The kinds of runs of the comparison: trained from scratch, converted, trained on clips."""

import gc
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evidence_clips import AsImages, ClipClasses, class_embeddings, draw_clips, train_clips
from evidence_measure import held_out_loss, layer_statistics, mixing_statistics
from evidence_plan import Run
from evidence_shop import Workshop

from mhla_gen.config import TrainConfig
from mhla_gen.data import load_data
from mhla_gen.distillation import distill
from mhla_gen.files import write_json
from mhla_gen.hub import PIPELINE_NAME
from mhla_gen.models.overview import exact_pairs
from mhla_gen.models.saved_transformer import load_transformer
from mhla_gen.pipelines.class_conditional import ClassConditionalPipeline
from mhla_gen.sampling import generate
from mhla_gen.training import train
from mhla_gen.training.build import build_task
from mhla_gen.training.log import LOG_NAME, read_log
from mhla_gen.training.stopping import Stopped

_INSPECTED = 2
# Held-out images and clips whose loss is computed at a time.
_LOSS_BATCH, _CLIP_LOSS_BATCH = 128, 32
_SAMPLE_BATCH = 256


def run_new(run: Run, config: TrainConfig, shop: Workshop) -> dict[str, Any]:
    """Train on images from scratch, and measure the result."""
    timed = Stopwatch()
    with timed("train"):
        saved = train_new(run, config, shop)
    tidy()
    with shop.measuring():
        measured = measure_images(run, saved, shop, timed, shop.inspect)
    return {**trained_facts(config), **measured, "seconds": timed.seconds}


def train_new(run: Run, config: TrainConfig, shop: Workshop) -> Path:
    """Train on images from scratch; returns the pipeline."""
    assert shop.images
    return train(config, title=run.name)


def measure_images(
    run: Run,
    saved: Path,
    shop: Workshop,
    timed: "Stopwatch",
    inspect: bool = False,
    held_out: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Loss, unless it is given, and scores of samples, of a trained pipeline."""
    pipeline: Any = ClassConditionalPipeline.from_pretrained(saved).to(shop.device)
    model, (images, labels) = pipeline.transformer, shop.images.held_out()
    found = model_facts(model, run)
    if held_out is None:
        with timed("loss"):
            held_out = held_out_loss(model, images, labels, shop.device, _LOSS_BATCH)
    found["held_out"] = held_out
    if run.samples:
        with timed("sample"), autocast(shop.device):
            # One label of a real image each, so that classes are as frequent as they are there.
            wanted = np.resize(shop.images.labels, shop.options.samples)
            samples = generate(
                pipeline,
                wanted,
                seed=0,
                batch_size=2 * _SAMPLE_BATCH if run.tokens == 256 else _SAMPLE_BATCH,
                num_inference_steps=shop.options.sampling_steps,
                guidance_scale=1.0,
                title=f"{run.name} samples",
            )
        shop.draw(run.name, samples, wanted)
        with timed("score"):
            found["scores"] = shop.judge.score(samples, wanted)
    if inspect:
        some = images[:_INSPECTED], labels[:_INSPECTED]
        found["layers"] = layer_statistics(model, *some, shop.device)
        found["mixing"] = mixing_statistics(model)
    return found


def run_converted(run: Run, config: TrainConfig, shop: Workshop) -> dict[str, Any]:
    """Replace the attention of another run's model, and measure it while it is tuned.

    Interrupted runs resume after their last measurement.
    """
    assert run.setting.start is not None
    timed, folder = Stopwatch(), Path(config.output_dir)
    notes = folder.with_name(f"{run.name}.points.json")
    noted = json.loads(notes.read_bytes()) if notes.is_file() else {"points": [], "seconds": {}}
    timed.seconds = noted["seconds"]
    assert shop.images
    start = shop.work / run.setting.start / PIPELINE_NAME
    if run.setting.taught is not None and config.model.attention != "softmax":
        with timed("layers"):
            start = teach_layers(run, run.setting.taught, start, shop)
        tidy()
    saved = start
    for steps in run.setting.points[len(noted["points"]) :]:
        settings = replace(
            config,
            model=replace(config.model, pretrained=str(start)),
            max_steps=max(steps, 1),
            # The last step has a checkpoint, from which the next point continues.
            checkpoint_every=1_000_000,
        )
        if steps > 0:
            with timed("train"):
                saved = train(settings, title=f"{run.name}, {steps} steps")
            tidy()
            pipeline: Any = ClassConditionalPipeline.from_pretrained(saved)
            model = pipeline.transformer.to(shop.device)
        else:
            model = build_task(settings, load_data(settings.data)).model.to(shop.device).eval()
        with shop.measuring(), timed("loss"):
            loss = held_out_loss(model, *shop.images.held_out(), shop.device, _LOSS_BATCH)
        noted["points"].append({"steps": steps, "held_out": loss})
        write_json(notes, noted | {"seconds": timed.seconds})
        if shop.stopped and steps < run.setting.points[-1]:
            raise Stopped(f"stopped by SIGTERM, measured after {steps} steps")
    last = noted["points"][-1]["held_out"]
    with shop.measuring():
        measured = measure_images(run, folder / PIPELINE_NAME, shop, timed, held_out=last)
    return {
        **trained_facts(config),
        "steps": run.setting.points[-1],
        "points": noted["points"],
        "taught": run.setting.taught,
        **measured,
        "seconds": timed.seconds,
    }


def teach_layers(run: Run, taught: Sequence[str], teacher: Path, shop: Workshop) -> Path:
    """Run a stage that distils every layer; returns its pipeline."""
    folder = shop.work / f"{run.name}-layers"
    changes = (f"distill.teacher={teacher}", f"output_dir={folder}")
    return distill(shop.config(run, *taught, *changes))


def run_clips(run: Run, config: TrainConfig, shop: Workshop) -> dict[str, Any]:
    """Train on clips from scratch, and measure the result."""
    timed = Stopwatch()
    assert shop.clips
    with timed("train"):
        saved = train_clips(config, run.name)
    tidy()
    with shop.measuring():
        measured = measure_clips(run, saved, shop, timed)
    return {**trained_facts(config), **measured, "seconds": timed.seconds}


def measure_clips(run: Run, saved: Path, shop: Workshop, timed: "Stopwatch") -> dict[str, Any]:
    """Loss, and scores of samples, of a trained transformer."""
    clips, transformer = shop.clips, load_transformer(str(saved)).to(shop.device).eval()
    model = AsImages(transformer, ClipClasses(class_embeddings(len(clips.class_names))))
    found = model_facts(transformer, run)
    with timed("loss"):
        found["held_out"] = held_out_loss(model, *clips.held_out(), shop.device, _CLIP_LOSS_BATCH)
    if run.samples:
        with timed("sample"):
            wanted = np.resize(clips.labels, shop.options.clip_samples)
            steps = shop.options.sampling_steps
            shape = (3, *clips.images.shape[1:3])
            samples = draw_clips(model, wanted, shape, steps, shop.device)
        shop.draw(run.name, samples, wanted)
        with timed("score"):
            found["scores"] = shop.clip_judge.score(samples, wanted)
    return found


KINDS: dict[str, Callable[[Run, TrainConfig, Workshop], dict[str, Any]]] = {
    "new": run_new,
    "converted": run_converted,
    "clips": run_clips,
}


def model_facts(model: Any, run: Run) -> dict[str, Any]:
    """Size of a model, and the share of pairs that softmax computes, the mean over layers."""
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "pairs": exact_pairs(model, run.grid)}


def trained_facts(config: TrainConfig) -> dict[str, Any]:
    """Facts about a run from its log."""
    log = read_log(Path(config.output_dir) / LOG_NAME)
    return {
        "steps": config.max_steps,
        "batch_size": config.batch_size,
        "curve": [[line["step"], round(line["loss"], 6)] for line in log],
    }


class Stopwatch:
    """Seconds of the parts of a run, not counting the time of interrupted processes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._part, self._began = "", 0.0

    def __call__(self, part: str) -> "Stopwatch":
        """Name the part that is timed next."""
        self._part = part
        return self

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        spent = self.seconds.get(self._part, 0.0) + time.perf_counter() - self._began
        self.seconds[self._part] = round(spent, 1)


def tidy() -> None:
    """Free memory, mainly of CUDA graphs, that a run leaves in reference cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU, as in training."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
