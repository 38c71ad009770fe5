"""What both commands begin with: processes, device, extractor, images and their protocol."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from mhla_gen.config import FeaturesConfig
from mhla_gen.evaluation.errors import EvaluationError
from mhla_gen.evaluation.extractor import Extractor
from mhla_gen.evaluation.extractors import build_extractor
from mhla_gen.evaluation.feature_files import FeatureSet
from mhla_gen.evaluation.features import extract_features
from mhla_gen.evaluation.protocol import EvaluationProtocol
from mhla_gen.evaluation.sources import ImageSource, load_images
from mhla_gen.evaluation.video import ClipRule
from mhla_gen.outputs.folders import check_writable
from mhla_gen.runtime.processes import join_processes, processes


@dataclass(frozen=True)
class Measurer:
    """Opens and measures sets of images, all with one extractor and one crop."""

    config: FeaturesConfig
    size: int | None
    skip_corrupt: bool

    @classmethod
    def start(cls, config: FeaturesConfig, size: int | None, skip_corrupt: bool) -> "Measurer":
        """Find the device; the extractor is loaded once it is used.

        Raises:
            EvaluationError: If the device is not there.
        """
        if config.device == "cuda" and not torch.cuda.is_available():
            raise EvaluationError(
                "features.device=cuda but PyTorch finds no CUDA device; use device=auto"
            )
        check_writable(config.cache_dir, "features.cache_dir")
        join_processes(config.device)
        return cls(config, size, skip_corrupt)

    @cached_property
    def extractor(self) -> Extractor:
        """The network, on its device; all processes must ask for it together.

        Raises:
            EvaluationError: If it is not there.
        """
        # One process per machine downloads; the others find the file.
        with join_processes(self.config.device).local_main_process_first():
            extractor = build_extractor(self.config)
        return extractor.to(processes().device)

    @property
    def clip(self) -> ClipRule | None:
        """Frame rule, if the extractor measures videos."""
        if self.config.extractor != "i3d":
            return None
        settings = self.config
        return ClipRule(settings.video_frames, settings.video_stride, settings.video_timeout)

    @property
    def _limits(self) -> dict[str, float]:
        # Part of what identifies features: with more time, more videos may be read.
        return {} if self.clip is None else {"timeout": self.clip.timeout}

    def open(self, paths: Sequence[str]) -> ImageSource:
        """The images at these paths."""
        return load_images(list(paths), self.size, self.clip)

    def protocol(self, shape: Sequence[int]) -> EvaluationProtocol:
        """How images, or frames, are measured that have this `(…, height, width)` once opened."""
        crop = f"adm-crop-{self.size}" if self.size and not self.clip else ""
        frames = str(self.clip) if self.clip else ""
        return EvaluationProtocol(self.extractor.identity, (shape[-2], shape[-1]), crop, frames)

    def features(self, source: ImageSource, names: Sequence[str]) -> FeatureSet:
        """Extract features, or find them in the cache."""
        workers = self.config.num_workers
        if workers is None:
            # A mapped array is copied faster than processes could hand it over.
            workers = 8 if self.extractor.device.type == "cuda" and source.decodes else 0
        return extract_features(
            source,
            self.extractor,
            names,
            cache_dir=self.config.cache_dir,
            cache_limit_gb=self.config.cache_limit_gb,
            settings={"size": self.size, "frames": str(self.clip), **self._limits},
            batch_size=self.config.batch_size,
            num_workers=workers,
            skip_corrupt=self.skip_corrupt,
        )
