"""Speed of encoding by `mhla-gen cache`, and of reading the cache in training.

    python benchmarks/cache_speed.py OUT.json --images 4000 --size 256 --clips 8 --video CLIP.mp4

The autoencoders have the released sizes and random weights: Stable Diffusion's AutoencoderKL and
Wan 2.1's AutoencoderKLWan. Images are smooth random JPEGs of 384 × 320 pixels; clips are copies of
one video, 81 frames of 480 × 832. Times are those of the whole command, from listing files to the
last digest, and of a second run on the finished cache.
"""

import argparse
import json
import platform
import shutil
import tempfile
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderKLWan
from PIL import Image

from mhla_gen.config import AutoencoderConfig, CacheConfig, ClipsConfig, DataConfig
from mhla_gen.data import BatchOrder, batches, load_data
from mhla_gen.data.caching.build import build_cache


def main() -> None:
    """Measure images, then clips, and write the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--clips", type=int, default=0)
    parser.add_argument("--video", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--workers", type=int, default=8)
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if cuda else platform.processor(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "arguments": {k: str(v) for k, v in vars(args).items()},
    }
    with tempfile.TemporaryDirectory() as root:
        if args.images:
            report["images"] = measure(images_config(Path(root), args), args.images)
        if args.clips:
            report["clips"] = measure(clips_config(Path(root), args), args.clips)
    args.out.write_text(json.dumps(report, indent=1))
    print(json.dumps(report, indent=1))


def measure(config: CacheConfig, count: int) -> dict[str, float]:
    """Build a cache, run the command on it again, and read it for training."""
    seconds = [_seconds(lambda: print(build_cache(config))) for _ in range(2)]
    data = load_data(DataConfig(source="cache", path=config.output_dir))
    size = min(256 if len(data.sample_shapes[0]) == 3 else 1, len(data))
    order, steps = BatchOrder(data.buckets, size, seed=0), 50
    reading = _seconds(lambda: [None for _ in batches(data, order, 0, steps)])
    memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    return {
        "first_run_s": seconds[0],
        "second_run_s": seconds[1],
        "encoded_per_s": count / seconds[0],
        "read_per_s": steps * size / reading,
        "peak_memory_gib": memory,
    }


def images_config(root: Path, args: argparse.Namespace) -> CacheConfig:
    """Write images and an autoencoder."""
    generator = np.random.default_rng(0)
    (root / "images" / "a").mkdir(parents=True)
    for number in range(args.images):
        small = generator.integers(0, 256, (12, 10, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize((320, 384), Image.Resampling.BICUBIC)
        picture.save(root / "images" / "a" / f"{number:06d}.jpg")
    sizes: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
    }
    AutoencoderKL(**sizes).save_pretrained(root / "kl")
    data = DataConfig(
        source="folder", path=str(root / "images"), image_size=args.size, horizontal_flip=True
    )
    return _config(root, "kl", data, args)


def clips_config(root: Path, args: argparse.Namespace) -> CacheConfig:
    """Copy the video and write an autoencoder."""
    (root / "clips").mkdir()
    for number in range(args.clips):
        shutil.copy(args.video, root / "clips" / f"{number:03d}{args.video.suffix}")
    AutoencoderKLWan().save_pretrained(root / "wan")
    data = DataConfig(source="clips", path=str(root / "clips"))
    clips = ClipsConfig(buckets=[(81, 480, 832)], upscale=True, missing_caption="empty")
    return replace(_config(root, "wan", data, args), clips=clips)


def _config(root: Path, vae: str, data: DataConfig, args: argparse.Namespace) -> CacheConfig:
    return CacheConfig(
        output_dir=str(root / f"{vae}-cache"),
        data=data,
        vae=AutoencoderConfig(path=str(root / vae), dtype=args.dtype),
        batch_size=32,
        num_workers=args.workers,
    )


def _seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
