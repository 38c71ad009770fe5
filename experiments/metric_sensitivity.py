"""How much known damage changes the distance of real images: the table in docs/evaluation.md.

    python experiments/metric_sensitivity.py IMAGES.npz docs/results/metric-sensitivity.json

IMAGES.npz has `arr_0` and `labels`. The first half is the reference; as many images of the second
half are measured unchanged, and after JPEG, blur, noise, or the removal of classes.
"""

import argparse
import io
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

from mhla_gen.config import EvaluateConfig, FeaturesConfig
from mhla_gen.evaluation import evaluate
from mhla_gen.files import write_json

SEED = 0
METRICS = ("fd", "kid", "precision", "recall")


def jpeg(quality: int) -> Callable[[np.ndarray], np.ndarray]:
    """Save as JPEG with this quality and read again."""

    def damage(pixels: np.ndarray) -> np.ndarray:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "jpeg", quality=quality)
        return np.asarray(Image.open(buffer))

    return damage


def blur(sigma: float) -> Callable[[np.ndarray], np.ndarray]:
    """Gaussian blur; sigma in pixels."""
    return lambda x: np.asarray(Image.fromarray(x).filter(ImageFilter.GaussianBlur(sigma)))


def noise(std: float) -> Callable[[np.ndarray], np.ndarray]:
    """Add Gaussian noise; std in grey levels of 255."""
    rng = np.random.default_rng(SEED)
    return lambda x: np.clip(x + rng.normal(0, std, x.shape).round(), 0, 255).astype(np.uint8)


DAMAGE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "JPEG, quality 50": jpeg(50),
    "JPEG, quality 10": jpeg(10),
    "blur, σ = 0.5 px": blur(0.5),
    "blur, σ = 1.5 px": blur(1.5),
    "noise, σ = 8 of 255": noise(8),
    "noise, σ = 32 of 255": noise(32),
}


def copies(images: np.ndarray, labels: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """Name → `count` images: unchanged, damaged, and from fewer classes."""
    clean = images[:count]
    found = {"another half, untouched": clean}
    for name, damage in DAMAGE.items():
        found[name] = np.stack([damage(image) for image in clean])
    classes = np.unique(labels)
    for removed in (len(classes) // 6, len(classes) // 3):
        kept = images[~np.isin(labels, classes[:removed])]
        found[f"{removed} of {len(classes)} classes removed"] = kept[:count]
    return found


def main() -> None:
    """Measure every copy and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=1800, help="images per copy")
    parser.add_argument("--work", type=Path, default=Path("runs/sensitivity"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    with np.load(args.images) as file:
        images, labels = file["arr_0"], file["labels"]
    order = np.random.default_rng(SEED).permutation(len(images))
    first, second = np.array_split(order, 2)
    np.savez(args.work / "reference.npz", arr_0=images[first])
    features = FeaturesConfig(
        extractor="efficientnet-lite0", cache_dir=str(args.work / "cache"), batch_size=32
    )
    start, rows = time.time(), {}
    for name, copy in copies(images[second], labels[second], args.count).items():
        assert len(copy) == args.count, f"{name}: {len(copy)} images"
        np.savez(args.work / "copy.npz", arr_0=copy)
        config = EvaluateConfig(
            samples=str(args.work / "copy.npz"),
            reference=str(args.work / "reference.npz"),
            metrics=METRICS,
            features=features,
            out=str(args.work / "metrics.json"),
        )
        print(f"\n{name}")
        rows[name] = {result.metric: result.to_dict() for result in evaluate(config)}
    content = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "seconds": round(time.time() - start),
        "images": len(images),
        "reference_images": len(first),
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, content)
    print(table(rows))


def table(rows: dict) -> str:
    """The rows in Markdown."""
    lines = [
        "| samples | fd, 95 % interval | KID × 1000 | precision | recall |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        low, high = row["fd"]["interval_95"]
        lines.append(
            f"| {name} | {row['fd']['value']:.1f} ({low:.1f} … {high:.1f}) "
            f"| {1000 * row['kid']['value']:.3f} | {row['precision']['value']:.3f} "
            f"| {row['recall']['value']:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
