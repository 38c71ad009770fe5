"""Features on disk: a file for each chunk of images, and the set that they make up."""

import json
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from mhla_gen.evaluation.frechet import FeatureStatistics, FeatureSums
from mhla_gen.evaluation.npz import open_array
from mhla_gen.files import write_arrays
from mhla_gen.files.saved import DamagedFileError

_REMEDY = "run the same command again, which computes it once more"


@dataclass(frozen=True)
class FeatureSet:
    """Features of one source, on disk."""

    folder: Path
    chunks: int
    count: int
    """Images that were read."""
    unreadable: dict[int, str]
    """The numbers of images that were left out, and a line for each."""
    digest: str
    """SHA-256 of the images."""
    labels: np.ndarray | None = None
    """Class of each image that was read, int64 [count], where metrics need it."""

    def labelled(self, labels: np.ndarray | None) -> "FeatureSet":
        """This set with the labels of its images, from those of all images of the source."""
        kept = None if labels is None else np.delete(labels, list(self.unreadable))
        return replace(self, labels=kept)

    def stream(self, name: str) -> Iterator[np.ndarray]:
        """Features [n, dim] chunk by chunk, in order, without chunks that have none."""
        for chunk in range(self.chunks):
            features = read_features(self.folder, name, chunk)[0]
            if len(features):
                yield features

    def load(self, name: str) -> Tensor:
        """All features [count, dim], float32, in order."""
        return torch.as_tensor(np.concatenate(list(self.stream(name))), device="cpu")

    def statistics(self, name: str) -> FeatureStatistics:
        """Mean and covariance; kept beside the features once computed."""
        path = self.folder / f"{name}-statistics.npz"
        if path.is_file():
            try:
                known = _read_checked(path)
                return FeatureStatistics(known["mu"], known["sigma"], self.count)
            except DamagedFileError:
                # Computed again from the features, which have their own checksums.
                pass
        sums: FeatureSums | None = None
        for features in self.stream(name):
            sums = (sums or FeatureSums(features.shape[1])).add(features)
        assert sums is not None
        statistics = sums.statistics()
        write_arrays(path, {"mu": statistics.mean, "sigma": statistics.covariance})
        return statistics


def _chunk_file(folder: Path, name: str, chunk: int) -> Path:
    return folder / f"{name}-{chunk:06d}.npz"


def write_chunk(
    folder: Path,
    chunk: int,
    outputs: list[dict[str, Tensor]],
    dims: dict[str, int],
    unreadable: dict[int, str],
) -> None:
    """Write the features of a chunk, and why some of its images are missing.

    Args:
        folder: Of the set.
        chunk: Its number.
        outputs: Features of each batch by name, `[batch, dim]`.
        dims: Their sizes, for a chunk without a readable image.
        unreadable: The numbers of images that are missing, and a line for each.
    """
    for name, dim in dims.items():
        # Copied here, not after each batch: a copy waits for the device.
        parts = [output[name].cpu() for output in outputs]
        features = torch.cat(parts) if parts else torch.zeros(0, dim)
        write_features(folder, name, chunk, features.numpy(), unreadable)


def write_features(
    folder: Path,
    name: str,
    chunk: int,
    features: np.ndarray,
    unreadable: Mapping[int, str] = MappingProxyType({}),
) -> None:
    """Write features of a chunk, `[images, dim]`, with a checksum: that of zip files."""
    lines = np.frombuffer(json.dumps(dict(unreadable)).encode(), np.uint8)
    write_arrays(_chunk_file(folder, name, chunk), {"features": features, "unreadable": lines})


def read_features(folder: Path, name: str, chunk: int) -> tuple[np.ndarray, dict[int, str]]:
    """Features of a chunk, `[images, dim]`, and by number why images are missing.

    Raises:
        DamagedFileError: If the file is missing or not as it was written.
    """
    path = _chunk_file(folder, name, chunk)
    found = _read_checked(path)
    return found["features"], _by_number(path, found["unreadable"])


def _by_number(path: Path, lines: np.ndarray) -> dict[int, str]:
    found: dict[str, str] | list[str] = json.loads(lines.tobytes())
    if isinstance(found, dict):
        return {int(number): line for number, line in found.items()}
    if found:
        raise DamagedFileError(path, "an earlier version wrote it without numbers", _REMEDY)
    return {}


def _read_checked(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an npz file of ours; reading them whole compares their checksums."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return dict(archive)
    except FileNotFoundError as error:
        raise DamagedFileError(path, "it is missing", _REMEDY) from error
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DamagedFileError(path, str(error), _REMEDY) from error


def is_complete(folder: Path, names: Sequence[str], chunk: int) -> bool:
    """Whether the features of a chunk exist, unchanged."""
    for name in names:
        path = _chunk_file(folder, name, chunk)
        if not path.is_file():
            return False
        try:
            read_features(folder, name, chunk)
        except DamagedFileError as error:
            print(f"{str(error).split(';')[0]}: computed again", file=sys.stderr)
            return False
    return True


def collect(folder: Path, chunks: int, name: str, digest: str) -> FeatureSet:
    """The set of a folder with all chunks; arguments as its fields."""
    unreadable: dict[int, str] = {}
    count = 0
    for chunk in range(chunks):
        # Features themselves are read, and their checksums compared, where they are used.
        path = _chunk_file(folder, name, chunk)
        unreadable |= _by_number(path, open_array(path, "unreadable"))
        count += len(open_array(path, "features"))
    return FeatureSet(folder, chunks, count, unreadable, digest)
