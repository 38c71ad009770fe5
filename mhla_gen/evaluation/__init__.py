"""Evaluation: images → features → statistics → numbers.

Names are imported on first use: distances of features need no network and no images.
"""

from typing import TYPE_CHECKING

from mhla_gen.lazy import names_from

if TYPE_CHECKING:
    from mhla_gen.evaluation.evaluation import evaluate
    from mhla_gen.evaluation.extractors import build_extractor
    from mhla_gen.evaluation.frechet import FeatureStatistics, FeatureSums, frechet_distance
    from mhla_gen.evaluation.inception import InceptionExtractor
    from mhla_gen.evaluation.metrics import (
        FrechetDistance,
        InceptionScore,
        KernelDistance,
        PrecisionRecall,
    )
    from mhla_gen.evaluation.reference import build_reference
    from mhla_gen.evaluation.scores import inception_score, kernel_distance, precision_recall
    from mhla_gen.evaluation.sources import load_images

_HOMES = {
    "FeatureStatistics": "frechet",
    "FeatureSums": "frechet",
    "FrechetDistance": "metrics",
    "InceptionExtractor": "inception",
    "InceptionScore": "metrics",
    "KernelDistance": "metrics",
    "PrecisionRecall": "metrics",
    "build_extractor": "extractors",
    "build_reference": "reference",
    "evaluate": "evaluation",
    "frechet_distance": "frechet",
    "inception_score": "scores",
    "kernel_distance": "scores",
    "load_images": "sources",
    "precision_recall": "scores",
}

__all__ = [
    "FeatureStatistics",
    "FeatureSums",
    "FrechetDistance",
    "InceptionExtractor",
    "InceptionScore",
    "KernelDistance",
    "PrecisionRecall",
    "build_extractor",
    "build_reference",
    "evaluate",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "load_images",
    "precision_recall",
]

__getattr__ = names_from(__name__, _HOMES)


def __dir__() -> list[str]:
    return __all__
