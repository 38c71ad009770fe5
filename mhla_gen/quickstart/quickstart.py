"""The quickstart, step by step."""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from accelerate import PartialState

from mhla_gen.config import QuickstartConfig, SampleConfig, TrainConfig, save_config
from mhla_gen.data.images import digits
from mhla_gen.files import remove, write_json, written_whole
from mhla_gen.files.saved import read_json
from mhla_gen.outputs.folders import CONFIG_NAME, made_with
from mhla_gen.outputs.locks import claimed
from mhla_gen.pipelines.class_conditional import ClassConditionalPipeline
from mhla_gen.quickstart.figures import draw_losses, draw_mixing
from mhla_gen.quickstart.report import next_commands, table
from mhla_gen.quickstart.scores import FEATURE_SPACE, score, score_real
from mhla_gen.sampling import class_labels, generate
from mhla_gen.sampling.contact_sheet import contact_sheet, rows_by_class
from mhla_gen.sampling.manifest import manifest, weights_of
from mhla_gen.sampling.sample_set import save_samples
from mhla_gen.sampling.samplers import ClassSampler
from mhla_gen.training.log import LOG_NAME, read_log
from mhla_gen.training.loop import train
from mhla_gen.training.rehearsal import rehearse

METRICS_NAME = "metrics.json"
Attention = Literal["mhla", "linear"]


@dataclass(frozen=True)
class Arm:
    """One of the two models: trained, and sampled from."""

    title: str
    pipeline: ClassConditionalPipeline
    images: np.ndarray
    log: list[dict[str, float]]
    training_seconds: float


def quickstart(config: QuickstartConfig, dry_run: bool = False) -> None:
    """Train MHLA and plain linear attention on digits, sample both, score both, and say so.

    A folder that an interrupted quickstart with the same settings left is gone on with; a finished
    one is shown again.

    Args:
        config: Settings.
        dry_run: Build everything, do one training step of each model, and write nothing.

    Raises:
        ValueError: If settings do not fit together.
        OSError: If the output folder holds something else.
    """
    folder = Path(config.output_dir)
    started = made_with(folder, config)
    if dry_run:
        for attention in ("mhla", "linear"):
            # The folder is checked above; the rehearsal must not mind an interrupted run.
            print(rehearse(replace(training(config, attention), resume="latest")))
        return
    if not (folder / METRICS_NAME).is_file():
        with claimed(folder):
            _run(config, folder)
    elif started:
        print(f"{folder} holds a finished quickstart with these settings; nothing was run")
    metrics = read_json(folder / METRICS_NAME, "remove it and give the same command again")
    print(f"\n{table(metrics)}\n\nPictures and numbers are in {folder}. Next:\n")
    for command in next_commands(folder, config.max_steps):
        print(f"  {command}")


def training(config: QuickstartConfig, attention: Attention) -> TrainConfig:
    """The settings that `mhla-gen train` would be given."""
    return TrainConfig(
        output_dir=str(Path(config.output_dir) / "training" / attention),
        model=replace(config.model, attention=attention),
        seed=config.seed,
        max_steps=config.max_steps,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler="cosine",
        warmup_steps=min(50, config.max_steps // 10),
        mixed_precision="fp32",
        ema_decay=0.995,
        checkpoint_every=max(1, config.max_steps // 4),
        keep_checkpoints=1,
        log_every=10,
        report_to="none",
        sample_every=0,
    )


def _run(config: QuickstartConfig, folder: Path) -> None:
    began = time.perf_counter()
    save_config(config, folder / CONFIG_NAME)
    real = digits()
    labels = class_labels("all", config.samples_per_class, len(real.class_names))
    arms = {attention: _arm(config, attention, labels) for attention in ("mhla", "linear")}

    mhla = arms["mhla"]
    with written_whole(folder / "pipeline") as partial:
        mhla.pipeline.save_pretrained(partial)
    save_samples(folder / "samples.npz", mhla.images, labels)
    save_samples(folder / "samples_linear.npz", arms["linear"].images, labels)
    made = manifest(
        ClassSampler(mhla.pipeline, labels, seed=config.seed),
        _sampling(config),
        {"weights": weights_of(mhla.pipeline), "num_samples": len(labels)},
        ["samples.npz", "samples.png"],
    )
    write_json(folder / "manifest.json", made)
    _draw(config, folder, real, labels, arms)
    metrics = {
        "feature_space": FEATURE_SPACE,
        "num_samples": len(labels),
        "num_real": len(real),
        **{
            name: {
                "title": arm.title,
                **asdict(score(arm.images, labels, real)),
                "loss": float(np.mean([line["loss"] for line in arm.log[-10:]])),
                "training_seconds": round(arm.training_seconds, 1),
            }
            for name, arm in arms.items()
        },
        "real": score_real(real, config.samples_per_class, config.seed),
        "seconds": round(time.perf_counter() - began, 1),
    }
    # The last file: where it is, the quickstart is finished.
    write_json(folder / METRICS_NAME, metrics)
    for old in (folder / "training").glob("*/checkpoint-*"):
        remove(old)


def _arm(config: QuickstartConfig, attention: Attention, labels: np.ndarray) -> Arm:
    """Train one model, or go on with its training, and sample from it."""
    layout = config.model.mhla.layout
    blocks = layout if isinstance(layout, str) else " × ".join(map(str, layout))
    title = {"mhla": f"MHLA, {blocks} blocks", "linear": "linear attention, one block"}[attention]
    settings = training(config, attention)
    saved = train(replace(settings, resume="latest"), title=f"train {title}")
    pipeline = ClassConditionalPipeline.from_pretrained(saved).to(PartialState().device)
    images = generate(
        pipeline,
        labels,
        seed=config.seed,
        batch_size=_sampling(config).batch_size,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        title=f"sample {title}",
    )
    log = read_log(Path(settings.output_dir) / LOG_NAME)
    return Arm(title, pipeline, images, log, training_seconds(log, config.batch_size))


def training_seconds(log: list[dict[str, float]], batch_size: int) -> float:
    """What the logged steps took, those before an interruption included."""
    steps = np.diff([0] + [line["step"] for line in log])
    rates = [line["images_per_second"] for line in log]
    return float((steps * batch_size / rates).sum())


def _sampling(config: QuickstartConfig) -> SampleConfig:
    """The settings that `mhla-gen sample` would need for the same samples."""
    return SampleConfig(
        pipeline=str(Path(config.output_dir) / "pipeline"),
        output_dir=config.output_dir,
        samples_per_class=config.samples_per_class,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        seed=config.seed,
        batch_size=100,
    )


def _draw(
    config: QuickstartConfig, folder: Path, real: Any, labels: np.ndarray, arms: dict[str, Arm]
) -> None:
    classes = range(len(real.class_names))
    groups = {"real digits": rows_by_class(real.images, real.labels, classes)}
    groups |= {arm.title: rows_by_class(arm.images, labels, classes) for arm in arms.values()}
    contact_sheet(groups, real.class_names).save(folder / "samples.png")
    draw_losses({arm.title: arm.log for arm in arms.values()}, folder / "loss.png")
    model = arms["mhla"].pipeline.transformer
    draw_mixing(model, replace(config.model.mhla, layout=_layout(model)), folder / "mixing.png")


def _layout(model: Any) -> tuple[int, ...]:
    """The layout of a built model, which "auto" leaves to the model."""
    return tuple(model.config.mhla["layout"])
