"""Sample sets: many images from a pipeline, on disk with what made them."""

import json
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from tqdm import tqdm

from mhla_gen.config import SampleConfig, save_config
from mhla_gen.devices import resolve_device
from mhla_gen.files import CONFIG_NAME, made_with, written_whole
from mhla_gen.sampling.contact_sheet import contact_sheet, rows_by_class
from mhla_gen.sampling.pipeline import ClassConditionalPipeline, check_scheduler


def sample(config: SampleConfig, dry_run: bool = False) -> Path:
    """Sample as a config says and write the sample set.

    Args:
        config: Settings.
        dry_run: Load and check everything, say what would be made, and write nothing.

    Returns:
        The folder of the sample set.

    Raises:
        ValueError: If the classes or the scheduler do not fit the pipeline.
        OSError: If the pipeline is missing, or the output folder holds something else.
    """
    folder = Path(config.output_dir)
    finished = made_with(folder, config)
    pipeline = load_pipeline(config)
    labels = class_labels(config.classes, config.samples_per_class, pipeline.num_classes)
    summary = f"{len(labels)} images of {len(np.unique(labels))} classes"
    if finished:
        print(f"{folder} already holds these {summary}; nothing to do")
    elif dry_run:
        print(f"would write {summary} to {folder}, {config.num_inference_steps} steps each")
    else:
        images = generate(
            pipeline,
            labels,
            seed=config.seed,
            batch_size=config.batch_size,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
        )
        write_sample_set(folder, images, labels, pipeline, config)
        print(f"wrote {summary} to {folder}")
    return folder


def load_pipeline(config: SampleConfig) -> ClassConditionalPipeline:
    """The saved pipeline on its device, with the scheduler that the config asks for.

    Raises:
        FileNotFoundError: If the folder is no saved pipeline.
        ValueError: If diffusers has no such scheduler, it does not fit the model, or the device is
            not there.
    """
    folder = Path(config.pipeline)
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"pipeline={folder} is not a folder written by save_pretrained "
            "(it has no model_index.json)"
        )
    device, dtype = resolve_device(config.device), getattr(torch, config.dtype)
    pipeline = ClassConditionalPipeline.from_pretrained(folder, dtype=dtype)
    if config.scheduler is not None:
        pipeline.scheduler = replaced_scheduler(pipeline, config.scheduler)
    return pipeline.to(device)


def replaced_scheduler(pipeline: ClassConditionalPipeline, name: str) -> Any:
    """A diffusers scheduler for the same prediction as the pipeline's own.

    Raises:
        ValueError: If diffusers has no scheduler of that name, or it does not fit.
    """
    scheduler_class = getattr(diffusers, name, None)
    if not (isinstance(scheduler_class, type) and hasattr(scheduler_class, "set_timesteps")):
        raise ValueError(f"diffusers has no scheduler {name!r}")
    options: dict[str, Any] = {}
    prediction_type = pipeline.prediction_type
    if prediction_type == "flow_prediction" and not name.startswith("FlowMatch"):
        # These schedulers serve several predictions and have to be told.
        options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    scheduler = scheduler_class.from_config(pipeline.scheduler.config, **options)
    check_scheduler(scheduler, prediction_type)
    return scheduler


def class_labels(classes: Any, samples_per_class: int, num_classes: int) -> np.ndarray:
    """One label per sample, class after class; int64.

    Args:
        classes: "all" or class numbers.
        samples_per_class: Samples of each.
        num_classes: Classes that the model has.

    Raises:
        ValueError: If the model has no such class.
    """
    chosen = range(num_classes) if classes == "all" else classes
    wrong = [c for c in chosen if c >= num_classes]
    if wrong:
        raise ValueError(f"the model has classes 0…{num_classes - 1}, found {wrong[0]} in classes")
    return np.repeat(np.asarray(chosen, dtype=np.int64), samples_per_class)


def generate(
    pipeline: ClassConditionalPipeline,
    labels: np.ndarray,
    *,
    seed: int,
    batch_size: int,
    num_inference_steps: int,
    guidance_scale: float,
    title: str = "sampling",
) -> np.ndarray:
    """One image per label; image i starts from noise of `seed + i`, whatever the batch size.

    Args:
        pipeline: Where the images come from.
        labels: Class numbers `[images]`.
        seed: Seed of the first image.
        batch_size: Images denoised together.
        num_inference_steps: Denoising steps.
        guidance_scale: Classifier-free guidance; 1 is none.
        title: Name of the progress bar.

    Returns:
        uint8 `[images, height, width, channels]`.
    """
    pipeline.set_progress_bar_config(disable=True)
    images = []
    with tqdm(total=len(labels), desc=title, unit="image") as bar:
        for start in range(0, len(labels), batch_size):
            batch = labels[start : start + batch_size]
            # Noise from CPU generators is the same on every device.
            generators = [
                torch.Generator().manual_seed(seed + start + i) for i in range(len(batch))
            ]
            result: Any = pipeline(
                batch.tolist(),
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                generator=generators,
                output_type="np",
            )
            images.append(np.round(result.images * 255).astype(np.uint8))
            bar.update(len(batch))
    return np.concatenate(images)


def write_sample_set(
    folder: Path,
    images: np.ndarray,
    labels: np.ndarray,
    pipeline: ClassConditionalPipeline,
    config: SampleConfig,
) -> None:
    """Write samples.npz, samples.png, manifest.json and config.yaml into a new folder.

    Args:
        folder: The folder; it appears when it is complete.
        images: uint8 `[images, height, width, channels]`.
        labels: Class numbers `[images]`.
        pipeline: What made the images.
        config: The settings that made them.
    """
    with written_whole(folder) as partial:
        partial.mkdir()
        save_samples(partial / "samples.npz", images, labels)
        classes = np.unique(labels).tolist()
        names = pipeline.class_names
        sheet = contact_sheet(
            {"samples": rows_by_class(images, labels, classes)}, [names[c] for c in classes]
        )
        sheet.save(partial / "samples.png")
        text = json.dumps(manifest(pipeline, config, len(images)), indent=2)
        (partial / "manifest.json").write_text(text + "\n")
        save_config(replace(config, output_dir=str(folder)), partial / CONFIG_NAME)


def save_samples(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Write `arr_0` and `labels`, the layout that evaluation tools read."""
    with written_whole(path) as partial, partial.open("wb") as file:
        np.savez(file, arr_0=images, labels=labels)


def manifest(
    pipeline: ClassConditionalPipeline, config: SampleConfig, num_images: int
) -> dict[str, Any]:
    """What made a sample set, for a reader who has only the folder."""
    transformer, scheduler = pipeline.transformer, pipeline.scheduler
    return {
        "num_images": num_images,
        "files": ["samples.npz", "samples.png"],
        "seeds": f"sample i starts from noise of seed {config.seed} + i",
        "settings": asdict(config),
        "transformer": {"class": type(transformer).__name__, **_plain(transformer.config)},
        "scheduler": {"class": type(scheduler).__name__, **_plain(scheduler.config)},
        "versions": {name: version(name) for name in ("mhla_gen", "torch", "diffusers")},
    }


def _plain(config: Any) -> dict[str, Any]:
    """Public entries of a diffusers config, as JSON holds them."""
    entries = {key: value for key, value in config.items() if not key.startswith("_")}
    return json.loads(json.dumps(entries, default=str))
