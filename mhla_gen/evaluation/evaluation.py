"""The evaluation command: samples and a reference → numbers with protocols and intervals."""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from mhla_gen.config import EvaluateConfig
from mhla_gen.evaluation.errors import EvaluationError
from mhla_gen.evaluation.features import FeatureSet
from mhla_gen.evaluation.frechet import FewSamplesWarning, frechet_distance
from mhla_gen.evaluation.intervals import jackknife_interval, subsampling_interval
from mhla_gen.evaluation.measurer import Measurer
from mhla_gen.evaluation.protocol import Protocol, short_count
from mhla_gen.evaluation.reference import MeasuredReference, Reference
from mhla_gen.evaluation.report import Result, format_table, write_report
from mhla_gen.evaluation.scores import inception_score, kernel_distance, precision_recall
from mhla_gen.evaluation.sources import MANIFEST_NAME
from mhla_gen.version import __version__

# Metric → features it is computed from.
_FEATURES = {
    "fid": "pool",
    "fd": "pool",
    "fvd": "pool",
    "sfid": "spatial",
    "is": "logits",
    "precision": "pool",
    "recall": "pool",
    "kid": "pool",
}
_OF_IMAGES = ("precision", "recall", "kid")
_OF_INCEPTION = ("fid", "sfid", "is")


def evaluate(config: EvaluateConfig, dry_run: bool = False) -> list[Result]:
    """Measure samples against a reference, print a table and write `config.out`.

    Args:
        config: What to measure.
        dry_run: Check that everything is there and comparable, and stop.

    Returns:
        The results, on the main process; nothing on the others or after a dry run.

    Raises:
        EvaluationError: If something is missing, unusable or not comparable.
    """
    _check(config)
    measurer = Measurer.start(config.features, config.size, config.skip_corrupt)
    source = measurer.open(config.samples)
    protocol = measurer.protocol(source)
    reference = _open_reference(config, measurer)
    if reference:
        protocol.require_same(reference.protocol)
    _require_enough(config, len(source), "samples")
    if reference and reference.source is not None:
        _require_enough(config, len(reference.source), "reference")
    if dry_run:
        print(f"would measure {len(source)} images of {source.name}: {protocol}")
        return []
    samples = measurer.features(source, sorted({_FEATURES[name] for name in config.metrics}))
    measured = _measure_reference(config, measurer, reference)
    if not PartialState().is_main_process:
        return []
    evaluation = Evaluation(config, protocol, samples, measured, str(PartialState().device))
    results = [evaluation.result(metric) for metric in config.metrics]
    context = _context(config, samples, reference, measured)
    write_report(Path(config.out), results, context)
    print(format_table(results))
    return results


@dataclass(frozen=True)
class Evaluation:
    """Numbers from measured samples and a measured reference."""

    config: EvaluateConfig
    protocol: Protocol
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
        name = _FEATURES[metric]
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


def _check(config: EvaluateConfig) -> None:
    if config.samples is None:
        raise EvaluationError("samples=PATH is required: the images to measure")
    if config.reference is None and set(config.metrics) != {"is"}:
        raise EvaluationError("reference=PATH is required for every metric but is")
    extractor = config.features.extractor
    wrong = [name for name in config.metrics if not _fits(name, extractor)]
    if wrong:
        raise EvaluationError(
            f"{', '.join(wrong)} cannot be measured with features.extractor={extractor}: fid, sfid "
            "and is mean inception, fvd means i3d, fd is the same distance on any other network"
        )


def _fits(metric: str, extractor: str) -> bool:
    if metric in _OF_INCEPTION:
        return extractor == "inception"
    if metric == "fvd":
        return extractor == "i3d"
    return metric != "fd" or extractor not in ("inception", "i3d")


def _require_enough(config: EvaluateConfig, count: int, side: str) -> None:
    """Raise, before anything is extracted, if a metric needs more images than there are."""
    distances = side == "samples" and any(m in ("fid", "sfid", "fd", "fvd") for m in config.metrics)
    manifolds = "precision" in config.metrics or "recall" in config.metrics
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


def _open_reference(config: EvaluateConfig, measurer: Measurer) -> Reference | None:
    if config.reference is None:
        return None
    reference = Reference.open(config.reference, measurer)
    if reference.file:
        # A missing key is found now, not after hours of extraction.
        for name in {_FEATURES[metric] for metric in config.metrics} - {"logits"}:
            reference.file.statistics(name)
    if reference.source is None:
        wanting = [metric for metric in config.metrics if metric in _OF_IMAGES]
        if wanting:
            MeasuredReference(reference.file, None).features("pool")
    return reference


def _measure_reference(
    config: EvaluateConfig, measurer: Measurer, reference: Reference | None
) -> MeasuredReference | None:
    if reference is None:
        return None
    if reference.file is None:
        names = sorted({_FEATURES[metric] for metric in config.metrics} - {"logits"})
        assert reference.source is not None
        return MeasuredReference(None, measurer.features(reference.source, names))
    images = None
    if reference.source is not None and any(metric in _OF_IMAGES for metric in config.metrics):
        images = measurer.features(reference.source, ["pool"])
    return MeasuredReference(reference.file, images)


def _context(
    config: EvaluateConfig,
    samples: FeatureSet,
    reference: Reference | None,
    measured: MeasuredReference | None,
) -> dict[str, Any]:
    described: dict[str, Any] = {
        "paths": list(config.samples),
        "count": samples.count,
        "unreadable": list(samples.unreadable),
        "sha256": samples.digest,
        "manifests": [json.loads(path.read_text()) for path in _manifests(config.samples)],
    }
    context: dict[str, Any] = {"samples": described}
    if reference and measured:
        context["reference"] = {
            "paths": list(config.reference),
            "count": measured.count,
            "image_count": measured.image_count,
            "unreadable": list(measured.images.unreadable) if measured.images else [],
            "protocol": str(reference.protocol),
        }
    context["versions"] = {"mhla_gen": __version__, "torch": torch.__version__}
    return context


def _manifests(paths: tuple[str, ...]) -> list[Path]:
    return [Path(path, MANIFEST_NAME) for path in paths if Path(path, MANIFEST_NAME).is_file()]
