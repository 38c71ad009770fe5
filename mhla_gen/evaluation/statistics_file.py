"""Reference files: ADM's npz keys, and beside them the protocol that made the numbers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mhla_gen.evaluation.errors import EvaluationError
from mhla_gen.evaluation.extractor import ExtractorIdentity
from mhla_gen.evaluation.frechet import FeatureStatistics
from mhla_gen.evaluation.inception import OFFICIAL_SHA256_PREFIX
from mhla_gen.evaluation.npz import npz_keys, open_array
from mhla_gen.evaluation.protocol import EvaluationProtocol
from mhla_gen.files import write_arrays

# Feature name → keys of its mean and covariance.
STATISTICS_KEYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


@dataclass(frozen=True)
class StatisticsFile:
    """An npz file with mean and covariance of features, and maybe some of the images."""

    path: Path

    def statistics(self, name: str) -> FeatureStatistics:
        """Statistics of one kind of features.

        Raises:
            EvaluationError: If the file has none, or they are malformed.
        """
        if name not in STATISTICS_KEYS:
            raise EvaluationError(f"statistics files hold no {name} features")
        mean, covariance = STATISTICS_KEYS[name]
        missing = [key for key in (mean, covariance) if key not in npz_keys(self.path)]
        if missing:
            metric = "sfid" if name == "spatial" else "fid"
            raise EvaluationError(
                f"{self.path} has no {' and no '.join(missing)}, which {metric} needs; rebuild it "
                f"with `mhla-gen reference` or leave {metric} out of metrics"
            )
        try:
            return FeatureStatistics(
                open_array(self.path, mean), open_array(self.path, covariance), self.count
            )
        except EvaluationError as error:
            raise EvaluationError(f"{self.path}: {error}") from error

    @property
    def has_images(self) -> bool:
        """Whether `arr_0` is there."""
        return "arr_0" in npz_keys(self.path)

    @property
    def count(self) -> int | None:
        """Number of images behind the statistics; unknown for ADM's files."""
        if "count" not in npz_keys(self.path):
            return None
        return int(open_array(self.path, "count"))

    def protocol(self) -> EvaluationProtocol:
        """The stated protocol, or that of ADM's files if none is stated."""
        if "protocol" in npz_keys(self.path):
            return EvaluationProtocol.from_json(str(open_array(self.path, "protocol")))
        shape = None
        if self.has_images:
            height, width = open_array(self.path, "arr_0").shape[1:3]
            shape = (height, width)
        official = ExtractorIdentity(
            "inception-2015-12-05", OFFICIAL_SHA256_PREFIX, "tf1-resize", "fp32"
        )
        return EvaluationProtocol(official, shape)


def write_statistics(
    path: Path,
    statistics: dict[str, FeatureStatistics],
    protocol: EvaluationProtocol,
    images: Mapping[str, np.ndarray],
) -> None:
    """Write a reference file under ADM's keys; it appears whole or not at all.

    Args:
        path: The npz file.
        statistics: By feature name; all from the same images.
        protocol: How they were measured.
        images: What to keep for metrics of images: `arr_0`, uint8 [count, height, width, 3], and
            their `labels`, int64 [count], if they have any; or nothing.
    """
    counts = {found.count for found in statistics.values()}
    assert len(counts) == 1
    arrays = {"count": np.asarray(counts.pop()), "protocol": np.asarray(protocol.to_json())}
    for name, found in statistics.items():
        mean, covariance = STATISTICS_KEYS[name]
        arrays[mean], arrays[covariance] = found.mean, found.covariance
    write_arrays(path, {**arrays, **images})
