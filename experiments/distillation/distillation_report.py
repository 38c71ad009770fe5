"""Score the models of experiments/distillation.sh: tables and picture of docs/distillation.md.

    python experiments/distillation/distillation_report.py OUT [--samples 1800] [--features pixels]

OUT holds the runs teacher, mhla, linear and continued. Each model samples the same classes, as
frequent as in the data, from the same noise, without guidance. OUT/report gets the samples,
report.json and report.png; samples of the same weights and steps are not drawn again.
"""

import argparse
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import mhla_gen
from mhla_gen.config import FeaturesConfig, TrainConfig, load_config
from mhla_gen.data import open_images
from mhla_gen.evaluation import FeatureStatistics, build_extractor, frechet_distance
from mhla_gen.evaluation.intervals import jackknife_interval
from mhla_gen.files import write_arrays, write_json, write_picture
from mhla_gen.files.digests import tensors_digest
from mhla_gen.outputs.folders import CONFIG_NAME
from mhla_gen.runtime.devices import device_name, resolve_device
from mhla_gen.sampling.contact_sheet import contact_sheet, rows_by_class
from mhla_gen.training.log import LOG_NAME, read_log
from mhla_gen.version import __version__

_BATCH = 256
_GROUPS = 4
# Distances computed in parallel: a singular value decomposition does not use many cores.
_THREADS = 4
# Title → the runs that led to the model, the last of which contains it.
MODELS: dict[str, tuple[str, ...]] = {
    "softmax teacher": ("teacher",),
    "MHLA, layers": ("mhla/stage-1-layers",),
    "MHLA, layers + output": ("mhla/stage-1-layers", "mhla/stage-2-output"),
    "linear, layers": ("linear/stage-1-layers",),
    "linear, layers + output": ("linear/stage-1-layers", "linear/stage-2-output"),
    "softmax, trained further": ("continued",),
}


@dataclass(frozen=True)
class Row:
    """One model in the table."""

    title: str
    frechet_distance: float
    interval_95: tuple[float, float]
    rms_to_teacher: float
    """RMS difference from the teacher's samples of the same noise, in grey levels of 255."""
    steps: int
    """Optimizer steps after the teacher; the teacher's own in its row."""
    minutes: float
    """Duration of these steps."""
    last_losses: dict[str, float]
    """Means over the last tenth of its last run, by name; layers are named by their path."""
    added_parameters: int
    """Parameters that MHLA adds to the softmax model."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw, score and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--samples", type=int, default=1800)
    parser.add_argument("--inference-steps", type=int, default=40)
    parser.add_argument(
        "--features", default="efficientnet-lite0", choices=["efficientnet-lite0", "pixels"]
    )
    options = parser.parse_args(arguments)
    began = time.perf_counter()
    device = resolve_device("auto")
    config: TrainConfig = load_config(options.out / "teacher" / CONFIG_NAME, schema=TrainConfig)
    real = open_images(config.data)
    pixels = np.stack([real.pixels(index) for index in range(len(real))])
    labels, names = np.asarray(real.labels), real.class_names or ()
    wanted = np.random.default_rng(0).permutation(np.resize(labels, options.samples))
    judge = Judge(pixels, options.features, device)
    folder = options.out / "report"
    folder.mkdir(exist_ok=True)
    models, missing = trained(options.out)
    samples = {
        title: drawn(options, folder, title, runs[-1], wanted, device)
        for title, runs in models.items()
    }
    teacher = samples["softmax teacher"]
    features = {title: judge.extract(images) for title, images in samples.items()}
    with ThreadPoolExecutor(_THREADS) as pool:
        scores = dict(zip(features, pool.map(judge.score, features.values()), strict=True))
    rows = [
        row(options.out, title, runs, samples[title], teacher, scores[title])
        for title, runs in models.items()
    ]
    content = {
        "data": {"images": len(real), "classes": len(names), "side": pixels.shape[1]},
        "distance": f"Fréchet, {options.features}, {options.samples} samples",
        "halves_of_the_data": judge.halves(),
        "sampling": f"{options.inference_steps} Euler steps, no guidance",
        "rows": [asdict(item) for item in rows],
        "left_out": missing,
        "first_layer_errors": {
            arm: layer_errors(options.out / f"{arm}/stage-1-layers")
            for arm in ("mhla", "linear")
            if any(f"{arm}/stage-1-layers" in runs for runs in models.values())
        },
        "machine": machine(device),
        "date": time.strftime("%Y-%m-%d"),
        "report_seconds": round(time.perf_counter() - began, 1),
    }
    write_json(folder / "report.json", content)
    groups = {"real": rows_by_class(pixels, labels, range(len(names)))}
    groups |= {
        title: rows_by_class(images, wanted, range(len(names))) for title, images in samples.items()
    }
    write_picture(folder / "report.png", contact_sheet(groups, names, per_row=5))
    print(table(rows))
    print(f"two halves of the data: {content['halves_of_the_data']:.2f}")
    print(f"wrote {folder / 'report.json'} and {folder / 'report.png'}")


def trained(out: Path) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Those of `MODELS` that are trained to the end, and the titles of the others."""
    found = {
        title: runs for title, runs in MODELS.items() if (out / runs[-1] / "pipeline").is_dir()
    }
    missing = [title for title in MODELS if title not in found]
    if missing:
        print(f"left out, not trained to the end: {', '.join(missing)}")
    return found, missing


def drawn(
    options: argparse.Namespace,
    folder: Path,
    title: str,
    run: str,
    labels: np.ndarray,
    device: torch.device,
) -> np.ndarray:
    """A run's samples for seed i and label i, uint8 `[images, height, width, channels]`.

    Samples of an earlier report are read from its folder, if they are those of these weights.
    """
    file = folder / f"{run.replace('/', '-')}.npz"
    pipeline = mhla_gen.ClassConditionalPipeline.from_pretrained(options.out / run / "pipeline")
    origin = f"{options.inference_steps} {tensors_digest(pipeline.transformer.state_dict())}"
    if file.is_file():
        with np.load(file) as saved:
            if np.array_equal(saved["labels"], labels) and saved.get("origin") == origin:
                return saved["arr_0"]
    pipeline.to(device).set_progress_bar_config(disable=True)
    images = []
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        for start in tqdm(range(0, len(labels), _BATCH), desc=f"sample {title}", unit="batch"):
            batch = labels[start : start + _BATCH]
            seeds = range(start, start + len(batch))
            result: Any = pipeline(
                batch.tolist(),
                num_inference_steps=options.inference_steps,
                guidance_scale=1.0,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="np",
            )
            images.append(np.round(result.images * 255).astype(np.uint8))
    made = np.concatenate(images)
    write_arrays(file, {"arr_0": made, "labels": labels, "origin": np.array(origin)})
    return made


class Judge:
    """Distances to the real images.

    Args:
        real: uint8 `[images, height, width, channels]`.
        features: efficientnet-lite0, or pixels.
        device: Device on which features are computed.
    """

    def __init__(self, real: np.ndarray, features: str, device: torch.device):
        self.device = device
        self.extractor = build_extractor(FeaturesConfig(extractor=features)).to(device)  # type: ignore[arg-type]
        self.real = self.extract(real)
        self.statistics = FeatureStatistics.from_features(self.real)

    def extract(self, images: np.ndarray) -> Tensor:
        """Features `[images, channels]`, on the CPU."""
        colour = np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images
        parts = torch.from_numpy(colour).movedim(-1, 1).split(_BATCH)
        found = [
            self.extractor(part.to(self.device))["pool"].cpu()
            for part in tqdm(parts, desc="features", unit="batch")
        ]
        return torch.cat(found)

    def score(self, features: Tensor) -> tuple[float, tuple[float, float]]:
        """Distance to all real images and its 95 % interval over left-out groups of samples."""
        value, interval = jackknife_interval(
            features,
            lambda statistics: frechet_distance(statistics, self.statistics),
            _GROUPS,
        )
        return float(value), (interval.low, interval.high)

    def halves(self) -> float:
        """Distance between two random halves of the real images."""
        order = torch.randperm(len(self.real), generator=torch.Generator().manual_seed(0))
        halves = [FeatureStatistics.from_features(self.real[part]) for part in order.chunk(2)]
        return frechet_distance(*halves)


def row(
    out: Path,
    title: str,
    runs: Sequence[str],
    images: np.ndarray,
    teacher: np.ndarray,
    score: tuple[float, tuple[float, float]],
) -> Row:
    """The row of one model."""
    distance, interval = score
    difference = images.astype(np.float32) - teacher.astype(np.float32)
    logs = [read_log(out / run / LOG_NAME) for run in runs]
    return Row(
        title=title,
        frechet_distance=distance,
        interval_95=interval,
        rms_to_teacher=float(np.sqrt(np.square(difference).mean())),
        steps=sum(int(log[-1]["step"]) for log in logs),
        minutes=sum(minutes(out / run) for run in runs),
        last_losses=last_losses(logs[-1]),
        added_parameters=added_parameters(out / runs[-1]),
    )


def minutes(run: Path) -> float:
    """Time of a run's steps from the speeds in its log, so interruptions do not count."""
    config: TrainConfig = load_config(run / CONFIG_NAME, schema=TrainConfig)
    seconds, before = 0.0, 0.0
    for line in read_log(run / LOG_NAME):
        seconds += (line["step"] - before) * config.batch_size / line["images_per_second"]
        before = line["step"]
    return seconds / 60


def last_losses(log: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means of the losses over the last tenth of a log."""
    lines = log[-max(1, len(log) // 10) :]
    kept = [
        name
        for name in lines[-1]
        if name in ("loss", "objective_loss", "teacher_distance") or name.endswith(".attn1")
    ]
    return {name: float(np.mean([line[name] for line in lines])) for name in kept}


def layer_errors(run: Path) -> dict[str, float]:
    """Relative errors of the layers in the first line of a log."""
    line = read_log(run / LOG_NAME)[0]
    return {name: value for name, value in line.items() if name.endswith(".attn1")}


def added_parameters(run: Path) -> int:
    """Parameters of MHLA in a run's pipeline."""
    pipeline = mhla_gen.ClassConditionalPipeline.from_pretrained(run / "pipeline")
    return sum(layer.added_parameters for layer in mhla_gen.summary(pipeline))


def machine(device: torch.device) -> str:
    """Hardware and software of the report."""
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    return f"{device_name(device)}{threads}, torch {torch.__version__}, mhla_gen {__version__}"


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    lines = [
        "| model | distance, 95 % interval | samples' RMS to the teacher's | steps | minutes |",
        "|---|---|---|---|---|",
    ]
    for item in rows:
        low, high = item.interval_95
        lines.append(
            f"| {item.title} | {item.frechet_distance:.2f} ({low:.2f} … {high:.2f}) "
            f"| {item.rms_to_teacher:.1f} | {item.steps} | {item.minutes:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
