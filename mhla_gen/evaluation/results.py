"""Numbers of measured samples, with protocols and intervals."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from mhla_gen.config import EvaluateConfig
from mhla_gen.evaluation.feature_files import FeatureSet
from mhla_gen.evaluation.frechet import FewSamplesWarning, frechet_distance
from mhla_gen.evaluation.intervals import jackknife_interval, subsampling_interval
from mhla_gen.evaluation.protocol import EvaluationProtocol, short_count
from mhla_gen.evaluation.reference import MeasuredReference
from mhla_gen.evaluation.report import Result
from mhla_gen.evaluation.scores import inception_score, kernel_distance, precision_recall

# Metric → features it is computed from.
FEATURES = {
    "fid": "pool",
    "fd": "pool",
    "fvd": "pool",
    "sfid": "spatial",
    "is": "logits",
    "precision": "pool",
    "recall": "pool",
    "kid": "pool",
}


@dataclass(frozen=True)
class Evaluation:
    """Numbers from measured samples and a measured reference."""

    config: EvaluateConfig
    protocol: EvaluationProtocol
    samples: FeatureSet
    reference: MeasuredReference | None
    device: str = "cpu"

    def result(self, metric: str) -> Result:
        """One metric, with a note if its number needs one."""
        compute: dict[str, Callable[[str], Result]] = {
            "is": self._inception_score,
            "kid": self._kernel_distance,
            "precision": self._manifold_share,
            "recall": self._manifold_share,
        }
        return compute.get(metric, self._frechet)(metric)

    def _frechet(self, metric: str) -> Result:
        name = FEATURES[metric]
        reference = self._known_reference.statistics(name)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", FewSamplesWarning)
            value, interval = jackknife_interval(
                self.samples.load(name),
                lambda statistics: frechet_distance(statistics, reference),
                self.config.jackknife_groups,
                self.config.seed,
            )
        note = str(caught[0].message) if caught else ""
        versus = f"vs-{short_count(self._known_reference.count)}"
        return Result(metric, value, self._describe(metric, versus), interval, note=note)

    def _inception_score(self, metric: str) -> Result:
        mean, spread = inception_score(self.samples.load("logits"))
        protocol = self._describe(metric, "splits-of-5000-in-order")
        return Result(metric, mean, protocol, spread=spread)

    def _kernel_distance(self, metric: str) -> Result:
        config = self.config
        distance = kernel_distance(
            self.samples.load("pool"),
            self._known_reference.features("pool"),
            config.kid_subsets,
            config.kid_subset_size,
            config.seed,
        )
        smaller = min(self.samples.count, self._known_reference.image_count)
        interval = subsampling_interval(distance, smaller)
        note = "" if interval else "no interval: each subset is the whole set"
        details = (
            f"{config.kid_subsets}x{config.kid_subset_size}-subsets seed-{config.seed} "
            f"vs-{short_count(self._known_reference.image_count)}"
        )
        protocol = self._describe(metric, details)
        return Result(metric, distance.mean, protocol, interval, distance.std, note)

    def _manifold_share(self, metric: str) -> Result:
        value = self._precision_recall[metric == "recall"]
        details = f"k-{self.config.neighbours} vs-{short_count(self._known_reference.image_count)}"
        return Result(metric, value, self._describe(metric, details))

    @cached_property
    def _precision_recall(self) -> tuple[float, float]:
        samples, reference = self.samples.load("pool"), self._known_reference.features("pool")
        return precision_recall(samples, reference, self.config.neighbours, self.device)

    @property
    def _known_reference(self) -> MeasuredReference:
        assert self.reference is not None
        return self.reference

    def _describe(self, metric: str, details: str) -> str:
        label = metric if metric in ("precision", "recall") else metric.upper().replace("SF", "sF")
        return f"{label}-{short_count(self.samples.count)} {self.protocol} {details}"
