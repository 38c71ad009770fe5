"""Speed of feature extraction and of the distance, with torch-fidelity's in the same run.

    python benchmarks/evaluation_speed.py docs/results/evaluation-speed-cpu.json --images 256

Weights and images are random, which does not change the time. Images of 256 × 256 are in one npz
file. `extraction` includes reading, hashing and writing features; `network` is the network alone,
as it is and in several variants (`--ways`); `peer` is torch-fidelity's; `layers` times its
convolutions one by one.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rows import machine
from torch import Tensor
from torch.nn import functional
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from mhla_gen.evaluation import FeatureStatistics, InceptionExtractor, frechet_distance, load_images
from mhla_gen.evaluation.extractor import full_float32
from mhla_gen.evaluation.features import ImageBatchReader, extract_features
from mhla_gen.evaluation.inception import FusedConvolution, write_random_weights
from mhla_gen.evaluation.sources import ImageSource, frame_shape
from mhla_gen.files import write_json
from mhla_gen.runtime.cuda_graphs import RecordedForward

SIDE = 256
PARTS = ("extraction", "network", "layers", "peer", "distance")


def seconds(run: Callable[[], object], repeats: int, warm_up: int = 1) -> float:
    """Median wall time of one run, after some warm-up runs."""
    times = []
    for _ in range(repeats + warm_up):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return float(np.median(times[warm_up:]))


# Variants of running the network.


def launched(extractor: InceptionExtractor) -> None:
    """The network unchanged."""


def unfused(extractor: InceptionExtractor) -> None:
    """Separate convolution and ReLU, with the norm folded in; cuDNN has more algorithms for it."""
    for block in convolutions(extractor):
        block.forward = lambda x, block=block: functional.relu_(plain_convolution(block, x))


def fastest(extractor: InceptionExtractor) -> None:
    """For each convolution the faster of the two above, as timed at its first call."""
    for block in convolutions(extractor):
        block.forward = Fastest(block)


def channels_last(extractor: InceptionExtractor) -> None:
    """Channels-last weights, which make activations channels-last, too."""
    for block in convolutions(extractor):
        block.weight = block.weight.contiguous(memory_format=torch.channels_last)


def recorded(extractor: InceptionExtractor) -> None:
    """The network as a CUDA graph."""
    extractor.extract = RecordedForward(extractor.extract)


def fastest_recorded(extractor: InceptionExtractor) -> None:
    """`fastest` as a CUDA graph."""
    fastest(extractor)
    recorded(extractor)


def compiled(extractor: InceptionExtractor) -> None:
    """Compiled by inductor, with the norm folded in."""
    unfused(extractor)
    extractor.network = torch.compile(extractor.network)


WAYS = (launched, unfused, fastest, channels_last, recorded, fastest_recorded, compiled)


class Fastest:
    """A fused or an unfused convolution, whichever was faster at the first call."""

    def __init__(self, block: FusedConvolution):
        fused = block.forward
        self._ways = (fused, lambda x: functional.relu_(plain_convolution(block, x)))
        self._chosen: Any = None

    def __call__(self, x: Tensor) -> Tensor:
        """Features of the block."""
        if self._chosen is None:
            times = [seconds(lambda way=way: way(x), 3, 2) for way in self._ways]
            self._chosen = self._ways[times.index(min(times))]
        return self._chosen(x)


def plain_convolution(block: FusedConvolution, x: Tensor) -> Tensor:
    """A block's convolution with its norm folded in, without ReLU."""
    conv = block.conv
    return functional.conv2d(x, block.weight, block.bias, conv.stride, conv.padding, conv.dilation)


def convolutions(extractor: InceptionExtractor) -> list[Any]:
    """The blocks of the network, in order."""
    return [block for block in extractor.network.modules() if isinstance(block, FusedConvolution)]


def network_speed(
    weights: Path, images: Tensor, ways: Sequence[Callable[[InceptionExtractor], None]]
) -> dict[str, Any]:
    """Images per second of the network alone, on batches that are already on the device.

    Args:
        weights: File of the network's weights.
        images: uint8 [images, 3, height, width].
        ways: How to run it; the first is what the features of the others are compared with.
    """
    count, repeats = len(images), 5 if images.is_cuda else 1
    found: dict[str, Any] = {}
    expected = None
    for way in ways:
        extractor = InceptionExtractor(weights).to(images.device)
        way(extractor)
        try:
            started = time.perf_counter()
            pool = extractor(images)["pool"].double()
            synchronize()
            first = time.perf_counter() - started
            expected = pool if expected is None else expected
            found[way.__name__] = {
                "images_per_second": count / seconds(lambda e=extractor: e(images), repeats, 3),
                "first_batch_seconds": round(first, 2),
                "relative_difference": float((pool - expected).norm() / expected.norm()),
            }
        except RuntimeError as error:
            found[way.__name__] = {"error": str(error).splitlines()[0]}
        print(way.__name__, found[way.__name__], flush=True)
        del extractor
        torch.compiler.reset()
    return found


def peer_speed(weights: Path, images: Tensor) -> dict[str, float]:
    """Images per second of torch-fidelity's network: with its TF32 convolutions, and in float32."""
    network = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], str(weights)
    ).to(images.device)

    @torch.no_grad()
    def run() -> object:
        return network(images)

    count, repeats = len(images), 5 if images.is_cuda else 1
    found = {"torch_fidelity": count / seconds(run, repeats)}
    if images.is_cuda:
        with full_float32(images.device):
            found["torch_fidelity_float32"] = count / seconds(run, repeats)
    return found


def layer_speed(weights: Path, images: Tensor) -> list[dict[str, Any]]:
    """Milliseconds and operations per second of each kind of convolution, fused and unfused."""
    extractor = InceptionExtractor(weights).to(images.device)
    inputs: list[tuple[FusedConvolution, torch.Size]] = []
    hooks = [
        block.register_forward_pre_hook(lambda m, x: inputs.append((m, x[0].shape)))
        for block in convolutions(extractor)
    ]
    extractor(images)
    for hook in hooks:
        hook.remove()
    kinds: dict[Any, dict[str, Any]] = {}
    with torch.no_grad(), full_float32(images.device):
        for block, shape in inputs:
            key = (tuple(block.weight.shape), tuple(shape[1:]), block.conv.stride)
            if key in kinds:
                kinds[key]["times_in_network"] += 1
                continue
            x = torch.randn(shape, device=images.device)
            out = block(x)
            fused = seconds(lambda b=block, x=x: b(x), 3)
            plain = seconds(lambda b=block, x=x: functional.relu_(plain_convolution(b, x)), 3)
            flops = 2 * out.numel() * block.weight[0].numel()
            kinds[key] = {
                "weight": list(block.weight.shape),
                "input": list(shape[1:]),
                "times_in_network": 1,
                "fused_ms": round(1e3 * fused, 3),
                "unfused_ms": round(1e3 * plain, 3),
                "fused_tflops": round(flops / fused / 1e12, 1),
                "unfused_tflops": round(flops / plain / 1e12, 1),
            }
    return list(kinds.values())


def extraction_speed(
    weights: Path, folder: Path, images: int, batch_size: int
) -> dict[str, dict[str, float]]:
    """Images per second from an npz file to features on disk, and of the parts of this alone.

    Once as in a command, including the search for the fastest algorithms, and once after it.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = load_images(folder / "images.npz")
    found: dict[str, dict[str, float]] = {"alone": parts_of(source, images, batch_size, device)}
    extractor = InceptionExtractor(weights).to(device)
    for name in ("first", "again") if device.type == "cuda" else ("first",):
        started = time.perf_counter()
        extract_features(
            source,
            extractor,
            ["pool", "spatial", "logits"],
            cache_dir=folder / f"cache-{name}",
            cache_limit_gb=100,
            settings={},
            batch_size=batch_size,
        )
        spent = time.perf_counter() - started
        found[name] = {"images_per_second": images / spent, "seconds": spent}
        print(name, found[name], flush=True)
    return found


def parts_of(
    source: ImageSource, images: int, batch_size: int, device: torch.device
) -> dict[str, float]:
    """Images per second of hashing alone, and of reading and copying to the device alone."""
    started = time.perf_counter()
    source.digest()
    hashed = time.perf_counter() - started
    ranges = [range(i, min(i + batch_size, images)) for i in range(0, images, batch_size)]
    reader = ImageBatchReader(source, ranges, frame_shape(source))
    started = time.perf_counter()
    for number in range(len(reader)):
        pixels = reader[number].images
        pixels = pixels.pin_memory() if device.type == "cuda" else pixels
        pixels.to(device, non_blocking=True)
    synchronize()
    return {"hashing": images / hashed, "reading": images / (time.perf_counter() - started)}


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
        "torch_fidelity": seconds(lambda: fid_statistics_to_metric(*theirs, verbose=False), 1, 0),
    }


def synchronize() -> None:
    """Wait for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    """Measure and write the results, after each part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--ways", nargs="+", choices=[way.__name__ for way in WAYS])
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = [way for way in WAYS if args.ways is None or way.__name__ in args.ways]
    if device.type == "cpu":
        chosen = [way for way in chosen if way in (launched, unfused)]
    found: dict[str, Any] = {**machine(), "cpu_threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        weights = folder / "weights.pth"
        write_random_weights(weights)
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (args.images, SIDE, SIDE, 3), dtype=np.uint8)
        np.savez(folder / "images.npz", arr_0=images)
        batch = torch.from_numpy(images[: args.batch_size]).permute(0, 3, 1, 2).to(device)
        measure = {
            "extraction": lambda: extraction_speed(weights, folder, args.images, args.batch_size),
            "network": lambda: network_speed(weights, batch, chosen),
            "layers": lambda: layer_speed(weights, batch),
            "peer": lambda: peer_speed(weights, batch),
            "distance": distance_speed,
        }
        for part, run in measure.items():
            if part in args.parts:
                started = time.perf_counter()
                found[part] = run()
                print(f"{part}: {time.perf_counter() - started:.1f} s", flush=True)
                write_json(args.out, found, indent=2)


if __name__ == "__main__":
    main()
