"""Evaluate samples while they are made, as `mhla-gen evaluate` would afterwards."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mhla_gen.config import EvaluateConfig
from mhla_gen.evaluation.errors import EvaluationError
from mhla_gen.evaluation.evaluation import Scoring
from mhla_gen.evaluation.feature_files import FeatureSet, write_features
from mhla_gen.evaluation.measurer import Measurer
from mhla_gen.evaluation.results import Result
from mhla_gen.media.pictures import crop_array
from mhla_gen.sampling.units import Units


class Scorer:
    """Features of units, and the numbers of the whole set."""

    def __init__(
        self,
        config: EvaluateConfig,
        folder: Path,
        features: Path,
        shape: tuple[int, ...],
        count: int,
        labels: np.ndarray | None = None,
    ):
        """Load the extractor and open the reference, before sampling starts.

        Args:
            config: What to measure; `out` is a path in `folder`.
            folder: Of the sample set.
            features: Folder for features.
            shape: Of a sample, `(frames,) height, width, channels`.
            count: How many samples there will be.
            labels: The class that each will be asked to show.

        Raises:
            UserError: If settings do not fit, as an `EvaluationError` if something is missing,
                unusable or not comparable.
        """
        config = replace(config, samples=(str(folder),), out=str(folder / config.out))
        config.check_comparison()
        self._folder, self._labels = features, labels
        self._measurer = Measurer.start(config.features, config.size, skip_corrupt=False)
        clip, self._frame = self._measurer.clip, shape[-3:-1]
        if (clip is not None) != (len(shape) == 4):
            raise EvaluationError(
                "the samples are images, which evaluate.features.extractor=i3d does not measure; "
                "give another one, such as inception"
                if clip
                else "the samples are videos, which evaluate.features.extractor="
                f"{config.features.extractor} does not measure; give "
                "evaluate.features.extractor=i3d evaluate.features.weights=FILE "
                "evaluate.metrics=[fvd]"
            )
        if clip is not None:
            clip.indices(shape[0])
        elif config.size is not None:
            self._frame = config.size, config.size
        self._scoring = Scoring.prepare(config, self._measurer, self._frame, count, labels)

    def measure(self, unit: int, samples: Tensor) -> None:
        """Write the features of a unit.

        Args:
            unit: Its number.
            samples: uint8 `[samples, (frames,) height, width, channels]`, on any device.
        """
        pixels = self._prepared(samples).to(self._measurer.extractor.device).movedim(-1, -3)
        features = self._measurer.extractor(pixels)
        for name in self._scoring.feature_names:
            write_features(self._folder, name, unit, features[name].cpu().numpy())

    def score(self, units: Units, digest: str) -> list[Result]:
        """The numbers of the set, also written to `evaluate.out`; all processes call this.

        Args:
            units: All of them measured.
            digest: What the report calls the samples by.
        """
        return self._scoring.score(
            FeatureSet(self._folder, len(units), units.count, {}, digest, self._labels)
        )

    def _prepared(self, samples: Tensor) -> Tensor:
        """As a reader of files would give them: colour, and the crop or the frames asked for."""
        if samples.shape[-1] == 1:
            samples = samples.expand(*samples.shape[:-1], 3)
        if clip := self._measurer.clip:
            return samples[:, clip.indices(samples.shape[1])]
        if tuple(samples.shape[1:3]) == self._frame:
            return samples
        cropped = [crop_array(pixels, self._measurer.size) for pixels in samples.cpu().numpy()]
        return torch.from_numpy(np.stack(cropped))
