"""Speed of extraction and of the distance, beside torch-fidelity's in the same run.

    python benchmarks/evaluation_speed.py docs/results/evaluation-speed-cpu.json --images 256

Random weights and random images: neither changes the time. Images of 256 × 256 come from one npz
file; `end to end` includes reading, hashing and writing features, `network` only the network.
"""

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from mhla_gen.evaluation import FeatureStatistics, InceptionExtractor, frechet_distance, load_images
from mhla_gen.evaluation.extractor import full_float32
from mhla_gen.evaluation.features import extract_features
from mhla_gen.evaluation.inception import write_random_weights

SIDE = 256


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Median wall time of one run, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))


def network_speed(extractor: InceptionExtractor, weights: Path, batch: Tensor) -> dict[str, float]:
    """Images per second of the network alone, on a batch that is on the device.

    torch-fidelity's is taken twice on a GPU: as it comes, with TF32 convolutions, and in float32.
    """
    theirs = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], str(weights)
    ).to(batch.device)

    def peer() -> object:
        with torch.no_grad():
            return theirs(batch)

    count, repeats = len(batch), 5 if batch.is_cuda else 2
    found = {
        "ours": count / seconds(lambda: extractor(batch), repeats),
        "torch_fidelity": count / seconds(peer, repeats),
    }
    if batch.is_cuda:
        with full_float32(batch.device):
            found["torch_fidelity_float32"] = count / seconds(peer, repeats)
    return found


def extraction_speed(
    extractor: InceptionExtractor, folder: Path, images: int, batch_size: int, workers: int
) -> dict[str, float]:
    """Images per second from an npz file to features on disk, and of hashing alone."""
    source = load_images(folder / "images.npz")
    start = time.perf_counter()
    source.digest()
    hashed = time.perf_counter() - start
    start = time.perf_counter()
    extract_features(
        source,
        extractor,
        ["pool", "spatial", "logits"],
        cache_dir=folder / "cache",
        settings={},
        batch_size=batch_size,
        num_workers=workers,
    )
    return {
        "end_to_end": images / (time.perf_counter() - start),
        "hashing": images / hashed,
    }


def distance_speed() -> dict[str, float]:
    """Seconds for the distance at 2,048 dimensions, ours and torch-fidelity's."""
    rng = np.random.default_rng(0)
    scale = np.logspace(0, -3, 2048)
    sides = [torch.from_numpy(rng.normal(size=(5000, 2048)) * scale) for _ in range(2)]
    ours = [FeatureStatistics.from_features(side) for side in sides]
    theirs = [fid_features_to_statistics(side) for side in sides]
    values = frechet_distance(*ours), fid_statistics_to_metric(*theirs, verbose=False)
    assert abs(values[0] / values[1]["frechet_inception_distance"] - 1) < 1e-6
    return {
        "ours": seconds(lambda: frechet_distance(*ours), 3),
        "torch_fidelity": seconds(lambda: fid_statistics_to_metric(*theirs, verbose=False), 1),
    }


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    found: dict[str, object] = {
        "date": time.strftime("%Y-%m-%d"),
        "device": name,
        "cpu_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "arguments": {key: str(value) for key, value in vars(args).items()},
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_random_weights(folder / "weights.pth")
        extractor = InceptionExtractor(folder / "weights.pth").to(device)
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (args.images, SIDE, SIDE, 3), dtype=np.uint8)
        np.savez(folder / "images.npz", arr_0=images)
        batch = torch.from_numpy(images[: args.batch_size]).permute(0, 3, 1, 2).to(device)
        found["network_images_per_second"] = network_speed(extractor, folder / "weights.pth", batch)
        found["extraction_images_per_second"] = extraction_speed(
            extractor, folder, args.images, args.batch_size, args.workers
        )
        found["distance_seconds"] = distance_speed()
        write(args.out, found)


def write(path: Path, found: dict[str, object]) -> None:
    """Print the results, and write them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=2) + "\n")
    print(path.read_text(), flush=True)


if __name__ == "__main__":
    main()
