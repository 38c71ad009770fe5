"""The quickstart, step by step: `train`, `sample` and `evaluate`, once for each of two models."""

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from sklearn.neighbors import KNeighborsClassifier

from mhla_gen.config import (
    EvaluateConfig,
    FeaturesConfig,
    QuickstartConfig,
    SampleConfig,
    TrainConfig,
    save_config,
)
from mhla_gen.data import ArrayImages
from mhla_gen.data.arrays import digits
from mhla_gen.evaluation import evaluate
from mhla_gen.evaluation.frechet import FeatureStatistics, frechet_distance
from mhla_gen.evaluation.nearest import NUM_NEIGHBOURS
from mhla_gen.files import remove, write_json, write_picture, written_whole
from mhla_gen.files.saved import read_json
from mhla_gen.hub import PIPELINE_NAME
from mhla_gen.outputs.folders import CONFIG_NAME, made_with
from mhla_gen.outputs.locks import claimed
from mhla_gen.pipelines.class_conditional import ClassConditionalPipeline
from mhla_gen.quickstart.figures import draw_losses, draw_mixing
from mhla_gen.quickstart.report import next_commands, table
from mhla_gen.sampling import sample
from mhla_gen.sampling.contact_sheet import contact_sheet, rows_by_class
from mhla_gen.sampling.manifest import MANIFEST_NAME
from mhla_gen.sampling.sample_files import SAMPLES_NAME, write_samples
from mhla_gen.training.log import LOG_NAME, read_log
from mhla_gen.training.loop import train
from mhla_gen.training.rehearsal import rehearse

METRICS_NAME = "metrics.json"
REAL_NAME = "real.npz"
Attention = Literal["mhla", "linear"]
ATTENTIONS: tuple[Attention, ...] = ("mhla", "linear")


@dataclass(frozen=True)
class Arm:
    """One of the two models: trained, sampled from, and measured."""

    title: str
    images: np.ndarray
    labels: np.ndarray
    log: list[dict[str, float]]
    metrics: dict[str, Any]


def quickstart(config: QuickstartConfig, dry_run: bool = False) -> None:
    """Train MHLA and plain linear attention on digits, sample and evaluate both, and report.

    An interrupted quickstart with the same settings is resumed; a finished
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
        for attention in ATTENTIONS:
            # The folder is checked above; the rehearsal must not mind an interrupted run.
            print(rehearse(training(config, attention)))
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
        resume="latest",
    )


def sampling(config: QuickstartConfig, attention: Attention, pipeline: Path) -> SampleConfig:
    """The settings that `mhla-gen sample` would be given."""
    return SampleConfig(
        pipeline=str(pipeline),
        output_dir=str(Path(config.output_dir) / "samples" / attention),
        samples_per_class=config.samples_per_class,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        seed=config.seed,
    )


def evaluation(config: QuickstartConfig, samples: Path) -> EvaluateConfig:
    """The settings that `mhla-gen evaluate` would be given."""
    folder = Path(config.output_dir)
    return EvaluateConfig(
        samples=str(samples),
        reference=str(folder / REAL_NAME),
        metrics=("accuracy", "copies", "fd"),
        features=FeaturesConfig(extractor="pixels", cache_dir=str(folder / "features")),
        out=str(samples / METRICS_NAME),
    )


def _run(config: QuickstartConfig, folder: Path) -> None:
    began = time.perf_counter()
    save_config(config, folder / CONFIG_NAME)
    real = digits()
    write_samples(folder / REAL_NAME, [real.images], real.images.shape, real.labels)
    arms: dict[Attention, Arm] = {name: _arm(config, name) for name in ATTENTIONS}
    # What a reader looks for first lies in the folder itself.
    for name, home in (
        (PIPELINE_NAME, "training"),
        (SAMPLES_NAME, "samples"),
        (MANIFEST_NAME, "samples"),
    ):
        _copy(folder / home / "mhla" / name, folder / name)
    _draw(config, folder, real, arms)
    metrics = {
        "feature_space": "raw pixels in [0, 1]",
        "num_samples": len(arms["mhla"].labels),
        "num_real": len(real),
        **{name: arm.metrics for name, arm in arms.items()},
        "real": score_real(real, config.samples_per_class, config.seed),
        "seconds": round(time.perf_counter() - began, 1),
    }
    # The last file: where it is, the quickstart is finished.
    write_json(folder / METRICS_NAME, metrics)
    for left in (*(folder / "training").glob("*/checkpoint-*"), folder / "features"):
        remove(left)


def _arm(config: QuickstartConfig, attention: Attention) -> Arm:
    """Train one model, sample from it and measure the samples; resumes an earlier run."""
    layout = config.model.mhla.layout
    blocks = layout if isinstance(layout, str) else " × ".join(map(str, layout))
    title = {"mhla": f"MHLA, {blocks} blocks", "linear": "linear attention, one block"}[attention]
    settings = training(config, attention)
    samples = sample(sampling(config, attention, train(settings, title=f"train {title}")))
    found = {result.metric: result.value for result in evaluate(evaluation(config, samples))}
    with np.load(samples / SAMPLES_NAME) as arrays:
        images, labels = arrays["arr_0"], arrays["labels"]
    log = read_log(Path(settings.output_dir) / LOG_NAME)
    metrics = {
        "title": title,
        "class_accuracy": found["accuracy"],
        "copy_share": found["copies"],
        "frechet_distance": found["fd"],
        "loss": float(np.mean([line["loss"] for line in log[-10:]])),
        "training_seconds": round(training_seconds(log, config.batch_size), 1),
    }
    return Arm(title, images, labels, log, metrics)


def training_seconds(log: list[dict[str, float]], batch_size: int) -> float:
    """Time of the logged steps, including those before an interruption."""
    steps = np.diff([0] + [line["step"] for line in log])
    rates = [line["images_per_second"] for line in log]
    return float((steps * batch_size / rates).sum())


def score_real(real: ArrayImages, samples_per_class: int, seed: int) -> dict[str, float]:
    """Scores of real images, on their pixels in [0, 1]: what perfect samples would get.

    Args:
        real: The real images.
        samples_per_class: Size of the small set; the distance grows as sets shrink.
        seed: Fixes which images are in which part.

    Returns:
        `class_accuracy`, each image judged by the others; `frechet_distance_halves`, between two
        random halves; `frechet_distance_same_size`, from as many real images as there are samples
        to the rest.
    """
    features = real.images.reshape(len(real), -1) / 255.0
    order = np.random.default_rng(seed).permutation(len(real))
    half = len(order) // 2
    small = np.concatenate(
        [order[real.labels[order] == c][:samples_per_class] for c in range(len(real.class_names))]
    )
    rest = np.setdiff1d(order, small)
    judge = KNeighborsClassifier(NUM_NEIGHBOURS).fit(features, real.labels)
    return {
        # Without images of its own, it asks each of those it knows, which does not vote for itself.
        "class_accuracy": float(judge.score(None, real.labels)),
        "frechet_distance_halves": _distance(features[order[:half]], features[order[half:]]),
        "frechet_distance_same_size": _distance(features[small], features[rest]),
    }


def _distance(first: np.ndarray, second: np.ndarray) -> float:
    return frechet_distance(
        FeatureStatistics.from_features(first), FeatureStatistics.from_features(second)
    )


def _copy(source: Path, target: Path) -> None:
    with written_whole(target) as partial:
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, partial)


def _draw(
    config: QuickstartConfig, folder: Path, real: ArrayImages, arms: dict[Attention, Arm]
) -> None:
    classes = range(len(real.class_names))
    groups = {"real digits": rows_by_class(real.images, real.labels, classes)}
    groups |= {arm.title: rows_by_class(arm.images, arm.labels, classes) for arm in arms.values()}
    write_picture(folder / "samples.png", contact_sheet(groups, real.class_names))
    draw_losses({arm.title: arm.log for arm in arms.values()}, folder / "loss.png")
    model = ClassConditionalPipeline.from_pretrained(folder / PIPELINE_NAME).transformer
    # "auto" leaves the layout to the model.
    layout = tuple(model.config.mhla["layout"])
    draw_mixing(model, replace(config.model.mhla, layout=layout), folder / "mixing.png")
