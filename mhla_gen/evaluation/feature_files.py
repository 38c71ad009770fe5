"""Features on disk: a file for each chunk of images, and the set that they make up."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mhla_gen.evaluation.frechet import FeatureStatistics, FeatureSums
from mhla_gen.evaluation.npz import open_array, write_npz
from mhla_gen.files import write_json, written_whole


@dataclass(frozen=True)
class FeatureSet:
    """Features of one source, on disk."""

    folder: Path
    chunks: int
    count: int
    """Images that were read."""
    unreadable: tuple[str, ...]
    """One line for each image that was left out."""
    frame_shape: tuple[int, ...]
    """(height, width), or (frames, height, width)."""
    digest: str
    """SHA-256 of the images."""

    def stream(self, name: str) -> Iterator[np.ndarray]:
        """Features [n, dim] chunk by chunk, in order."""
        for chunk in range(self.chunks):
            yield np.load(_chunk_file(self.folder, name, chunk))

    def load(self, name: str) -> Tensor:
        """All features [count, dim], float32, in order."""
        return torch.from_numpy(np.concatenate(list(self.stream(name))))

    def statistics(self, name: str) -> FeatureStatistics:
        """Mean and covariance; kept beside the features once computed."""
        path = self.folder / f"{name}-statistics.npz"
        if path.is_file():
            return FeatureStatistics(open_array(path, "mu"), open_array(path, "sigma"), self.count)
        sums: FeatureSums | None = None
        for features in self.stream(name):
            sums = (sums or FeatureSums(features.shape[1])).add(features)
        assert sums is not None
        statistics = sums.statistics()
        write_npz(path, {"mu": statistics.mean, "sigma": statistics.covariance})
        return statistics


def _chunk_file(folder: Path, name: str, chunk: int) -> Path:
    return folder / f"{name}-{chunk:06d}.npy"


def _problems_file(folder: Path, chunk: int) -> Path:
    return folder / f"unreadable-{chunk:06d}.json"


def write_chunk(
    folder: Path,
    chunk: int,
    outputs: list[dict[str, Tensor]],
    dims: dict[str, int],
    unreadable: list[str],
) -> None:
    """Write the features of a chunk, and why images of it are missing.

    Args:
        folder: Of the set.
        chunk: Its number.
        outputs: Features of each batch by name, `[batch, dim]`.
        dims: Their sizes, for a chunk without a readable image.
        unreadable: A line for each image that is missing.
    """
    write_json(_problems_file(folder, chunk), unreadable, indent=None)
    for name, dim in dims.items():
        # Copied here, not after each batch: a copy waits for the device.
        parts = [output[name].cpu() for output in outputs]
        features = torch.cat(parts) if parts else torch.zeros(0, dim)
        path = _chunk_file(folder, name, chunk)
        with written_whole(path) as partial, partial.open("wb") as file:
            np.save(file, features.numpy())


def is_complete(folder: Path, names: Sequence[str], chunk: int) -> bool:
    """Whether all files of a chunk are there."""
    files = [_chunk_file(folder, name, chunk) for name in names]
    return all(file.is_file() for file in [_problems_file(folder, chunk), *files])


def collect(
    folder: Path, chunks: int, name: str, shape: tuple[int, ...], digest: str
) -> FeatureSet:
    """The set of a folder whose chunks are all there; arguments as its fields."""
    unreadable, count = [], 0
    for chunk in range(chunks):
        unreadable += json.loads(_problems_file(folder, chunk).read_text())
        count += len(np.load(_chunk_file(folder, name, chunk), mmap_mode="r"))
    return FeatureSet(folder, chunks, count, tuple(unreadable), shape, digest)
