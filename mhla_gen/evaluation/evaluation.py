"""The evaluation command: samples and a reference → numbers with protocols and intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mhla_gen.config import EvaluateConfig
from mhla_gen.evaluation.errors import EvaluationError
from mhla_gen.evaluation.feature_files import FeatureSet
from mhla_gen.evaluation.measurer import Measurer
from mhla_gen.evaluation.outs import check_report
from mhla_gen.evaluation.protocol import EvaluationProtocol
from mhla_gen.evaluation.results import (
    FRECHET,
    Result,
    compute_metrics,
    features_of,
    format_table,
    need_images,
    need_labels,
    write_report,
)
from mhla_gen.evaluation.sources import (
    MANIFEST_NAME,
    ImageSource,
    frame_shape,
    has_statistics,
)
from mhla_gen.evaluation.statistics_file import StatisticsFile
from mhla_gen.files import remove_leftovers
from mhla_gen.files.saved import read_json
from mhla_gen.runtime.processes import on_main, processes
from mhla_gen.version import __version__


def evaluate(config: EvaluateConfig, dry_run: bool = False) -> list[Result]:
    """Measure samples against a reference, print a table and write `config.out`.

    Args:
        config: What to measure.
        dry_run: Check that everything is there and comparable, and stop.

    Returns:
        The results, on the main process; nothing on the others or after a dry run.

    Raises:
        UserError: If settings are missing or do not fit, as an `EvaluationError` if images,
            features or statistics are missing, unusable or not comparable.
    """
    config.check_comparison()
    check_report(config.out)
    measurer = Measurer.start(config.features, config.size, config.skip_corrupt)
    source = measurer.open(config.samples)
    labels = source.labels() if need_labels(config.metrics) else None
    shape = frame_shape(source)
    scoring = Scoring.prepare(config, measurer, shape, len(source), labels, source.classes)
    if dry_run:
        print(f"would measure {len(source)} images of {source.name}: {scoring.protocol}")
        return []
    on_main(lambda: remove_leftovers(Path(config.out).parent))
    samples = measurer.features(source, scoring.feature_names)
    return scoring.score(samples.labelled(labels))


@dataclass(frozen=True)
class Scoring:
    """A comparison, checked to be possible before anything is measured."""

    config: EvaluateConfig
    measurer: Measurer
    protocol: EvaluationProtocol
    """Of the samples."""
    file: StatisticsFile | None
    """The reference, if it is a file of statistics."""
    images: ImageSource | None
    """Those of the reference: all, or the ones that its file keeps."""

    @classmethod
    def prepare(
        cls,
        config: EvaluateConfig,
        measurer: Measurer,
        shape: Sequence[int],
        count: int,
        labels: np.ndarray | None,
        classes: tuple[str, ...] | None = None,
    ) -> "Scoring":
        """Open the reference, and check that everything that must be equal is.

        Args:
            config: What to measure.
            measurer: How both are measured.
            shape: Of a sample, `(…, height, width)`.
            count: How many samples there are, or will be.
            labels: Their class numbers, if they have any.
            classes: Names of their class folders, if they lie in such.

        Raises:
            EvaluationError: If something is missing, unusable or not comparable.
        """
        # Before the extractor: what it measures may need another one.
        reference = _open_reference(config, measurer)
        scoring = cls(config, measurer, measurer.protocol(shape), *reference)
        if protocol := scoring.reference_protocol:
            scoring.protocol.require_same(protocol)
        _require_enough(config, count, "samples")
        if scoring.images is not None:
            _require_enough(config, len(scoring.images), "reference")
        if need_labels(config.metrics):
            found = _require_labels(scoring._reference_labels(), "reference has")
            _require_one_numbering(
                (_require_labels(labels, "samples have"), classes),
                (found, scoring.images.classes if scoring.images else None),
            )
        return scoring

    @property
    def feature_names(self) -> list[str]:
        """The features that the metrics need."""
        return sorted(features_of(self.config.metrics))

    @property
    def reference_protocol(self) -> EvaluationProtocol | None:
        """The protocol of the reference."""
        if self.file is not None:
            return self.file.protocol()
        return None if self.images is None else self.measurer.protocol(frame_shape(self.images))

    def score(self, samples: FeatureSet) -> list[Result]:
        """Print a table of the numbers and write `config.out`; all processes call this.

        Returns:
            The results, on the main process; nothing on the others.
        """
        images = self._measured_images()
        if not processes().is_main_process:
            return []
        statistics = self.file or images
        device = str(processes().device)
        results = compute_metrics(self.config, self.protocol, samples, statistics, images, device)
        write_report(Path(self.config.out), results, self._context(samples, images))
        print(format_table(results))
        return results

    def _measured_images(self) -> FeatureSet | None:
        """The features of the reference's images that the metrics need, if any."""
        names = _statistics_of(self.config)
        if self.file is not None:
            names = {"pool"} if need_images(self.config.metrics) else set[str]()
        if self.images is None or not names:
            return None
        found = self.measurer.features(self.images, sorted(names))
        return found.labelled(self._reference_labels())

    def _reference_labels(self) -> np.ndarray | None:
        if self.images is None or not need_labels(self.config.metrics):
            return None
        return self.images.labels()

    def _context(self, samples: FeatureSet, images: FeatureSet | None) -> dict[str, Any]:
        described: dict[str, Any] = {
            "paths": list(self.config.samples),
            "count": samples.count,
            "unreadable": list(samples.unreadable.values()),
            "sha256": samples.digest,
            "manifests": [
                read_json(path, "sample the set again, or remove it")
                for path in _manifests(self.config.samples)
            ],
        }
        context: dict[str, Any] = {"samples": described}
        if statistics := self.file or images:
            context["reference"] = {
                "paths": list(self.config.reference),
                "count": statistics.count,
                "image_count": images.count if images else 0,
                "unreadable": list(images.unreadable.values()) if images else [],
                "protocol": str(self.reference_protocol),
            }
        context["versions"] = {"mhla_gen": __version__, "torch": torch.__version__}
        return context


def _require_enough(config: EvaluateConfig, count: int, side: str) -> None:
    """Raise, before anything is extracted, if a metric needs more images than there are."""
    distances = side == "samples" and not FRECHET.isdisjoint(config.metrics)
    manifolds = not {"precision", "recall"}.isdisjoint(config.metrics)
    for wanted, least, remedy in (
        ("kid" in config.metrics, config.kid_subset_size, "kid_subset_size"),
        (manifolds, config.neighbours + 1, "neighbours"),
        (distances, 2 * config.jackknife_groups, "jackknife_groups"),
    ):
        if wanted and count < least:
            raise EvaluationError(
                f"the {side} hold {count} of the {least} images that these settings need; use "
                f"more, lower {remedy}, or leave its metrics out"
            )


def _require_labels(labels: np.ndarray | None, side: str) -> np.ndarray:
    if labels is None:
        raise EvaluationError(
            f"the {side} no labels, which accuracy and copies need: a class number for each image, "
            "the array `labels` of an npz file beside `arr_0`, or one sub-folder for each class; "
            "leave these metrics out, or add labels"
        )
    return labels


def _require_one_numbering(
    *sides: tuple[np.ndarray, tuple[str, ...] | None],
) -> None:
    """Raise if a number may mean one class in samples and another in the reference.

    Class folders are numbered by name, so folders of some of the classes have other numbers.
    """
    known = {classes for _, classes in sides if classes is not None}
    most = max(int(labels.max()) for labels, _ in sides)
    if len(known) > 1 or any(most >= len(classes) for classes in known):
        raise EvaluationError(
            "samples and reference do not have the same class folders, which are numbered by name, "
            "so one number would mean two classes; give both the same folders, or files with "
            "`labels`"
        )


def _open_reference(
    config: EvaluateConfig, measurer: Measurer
) -> tuple[StatisticsFile | None, ImageSource | None]:
    """The statistics file, the images, or both, with all that the metrics need."""
    if config.reference is None:
        return None, None
    files = [path for path in config.reference if has_statistics(path)]
    if not files:
        return None, measurer.open(config.reference)
    if len(config.reference) > 1:
        raise EvaluationError(
            f"{files[0]} holds statistics, which cannot be joined with other references; "
            "give it alone"
        )
    file = StatisticsFile(Path(files[0]))
    # Now, not after hours of extraction.
    for name in _statistics_of(config):
        file.statistics(name)
    if not file.has_images and need_images(config.metrics):
        raise EvaluationError(
            f"{file.path} has no arr_0: precision, recall and KID need images, as accuracy and "
            "copies do; rebuild it with `mhla-gen reference` or leave them out of metrics"
        )
    return file, measurer.open(files) if file.has_images else None


def _statistics_of(config: EvaluateConfig) -> set[str]:
    """Features of the reference that are compared with those of the samples."""
    return features_of(config.metrics) - {"logits"}


def _manifests(paths: tuple[str, ...]) -> list[Path]:
    return [Path(path, MANIFEST_NAME) for path in paths if Path(path, MANIFEST_NAME).is_file()]
