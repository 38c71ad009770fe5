"""References: statistics files, sets of images, and the builder of the former."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from mhla_gen.config import ReferenceConfig
from mhla_gen.evaluation.errors import EvaluationError
from mhla_gen.evaluation.feature_files import FeatureSet
from mhla_gen.evaluation.frechet import FeatureStatistics
from mhla_gen.evaluation.measurer import Measurer
from mhla_gen.evaluation.protocol import EvaluationProtocol
from mhla_gen.evaluation.sources import ImageSource, has_statistics
from mhla_gen.evaluation.statistics_file import STATISTICS_KEYS, StatisticsFile, write_statistics
from mhla_gen.media.pictures import UnreadableImageError
from mhla_gen.outputs.folders import check_writable
from mhla_gen.runtime.processes import on_main


@dataclass(frozen=True)
class Reference:
    """What samples are compared with: statistics in a file, images, or both."""

    protocol: EvaluationProtocol
    file: StatisticsFile | None
    source: ImageSource | None
    """The images, all of them or those that a file keeps."""
    images: FeatureSet | None = None
    """Their features, once they are measured."""

    @classmethod
    def open(cls, paths: Sequence[str], measurer: Measurer) -> "Reference":
        """Open a statistics file or images; nothing is measured yet.

        Raises:
            EvaluationError: If there is nothing usable, or a file is joined with something.
        """
        files = [path for path in paths if has_statistics(path)]
        if not files:
            source = measurer.open(paths)
            return cls(measurer.protocol(source), None, source)
        if len(paths) > 1:
            raise EvaluationError(
                f"{files[0]} holds statistics, which cannot be joined with other references; "
                "give it alone"
            )
        file = StatisticsFile(Path(files[0]))
        source = measurer.open(files) if file.has_images else None
        return cls(file.protocol(), file, source)

    def require(self, names: Collection[str], images: bool) -> None:
        """Raise unless what metrics need is there, before hours of extraction.

        Args:
            names: Features whose statistics they need.
            images: Whether some need the features of each image.

        Raises:
            EvaluationError: Naming what a file lacks.
        """
        if self.file is None:
            return
        for name in names:
            self.file.statistics(name)
        if self.source is None and images:
            raise EvaluationError(
                f"{self.file.path} has no arr_0: precision, recall and KID need images; rebuild it "
                "with `mhla-gen reference` or leave them out of metrics"
            )

    def measured(self, measurer: Measurer, names: Collection[str], images: bool) -> "Reference":
        """The same with the features of its images; arguments as those of `require`."""
        if self.file is not None:
            names = ["pool"] if images else []
        if self.source is None or not names:
            return self
        return replace(self, images=measurer.features(self.source, sorted(names)))

    def statistics(self, name: str) -> FeatureStatistics:
        """Mean and covariance: those in the file, else those of the images."""
        return (self.file or self._measured_images).statistics(name)

    def features(self, name: str) -> Tensor:
        """Features of the images."""
        return self._measured_images.load(name)

    @property
    def count(self) -> int | None:
        """Images behind the statistics, where that is known."""
        return (self.file or self._measured_images).count

    @property
    def image_count(self) -> int:
        """Images behind the features."""
        return self.images.count if self.images else 0

    @property
    def _measured_images(self) -> FeatureSet:
        assert self.images is not None
        return self.images


def build_reference(config: ReferenceConfig, dry_run: bool = False) -> Path | None:
    """Write statistics of the user's own images under ADM's keys.

    Args:
        config: Which images, size and extractor.
        dry_run: Check that everything is there, and stop.

    Returns:
        The file; None after a dry run.

    Raises:
        EvaluationError: If images or extractor are missing or unusable.
    """
    if config.data is None:
        raise EvaluationError("data=FOLDER is required: the images to take statistics of")
    out = Path(config.out)
    if out.suffix != ".npz":
        raise EvaluationError(f"out must be an npz file, found {out}")
    check_writable(out.parent, "out")
    measurer = Measurer.start(config.features, config.size, config.skip_corrupt)
    source = measurer.open(config.data)
    protocol = measurer.protocol(source)
    if dry_run:
        print(f"would measure {len(source)} images of {source.name}: {protocol}")
        return None
    names = [name for name in STATISTICS_KEYS if name in measurer.extractor.dims]
    measured = measurer.features(source, names)

    def write() -> None:
        statistics = {name: measured.statistics(name) for name in names}
        images = None if measurer.clip else kept_images(source, config.keep_images, config.seed)
        write_statistics(out, statistics, protocol, images)
        print(f"{out}: {measured.count} images, {protocol}")

    on_main(write)
    return out


def kept_images(source: ImageSource, count: int, seed: int) -> np.ndarray | None:
    """A random choice of readable images, in their order; all of them if there are no more.

    Returns:
        uint8 [count, height, width, 3], or None if none are wanted.
    """
    chosen = np.random.default_rng(seed).permutation(len(source))
    images: dict[int, np.ndarray] = {}
    for index in chosen.tolist():
        if len(images) == count:
            break
        try:
            images[index] = source.read(index)
        except UnreadableImageError:
            continue
    return np.stack([images[index] for index in sorted(images)]) if images else None
