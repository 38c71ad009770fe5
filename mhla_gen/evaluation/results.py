"""Metrics with protocols and intervals: computed, written, shown."""

import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mhla_gen.config import EvaluateConfig
from mhla_gen.evaluation.feature_files import FeatureSet
from mhla_gen.evaluation.frechet import FewSamplesWarning, frechet_distance
from mhla_gen.evaluation.intervals import Interval, jackknife_interval, subsampling_interval
from mhla_gen.evaluation.nearest import class_accuracy, copy_share
from mhla_gen.evaluation.protocol import EvaluationProtocol, short_count
from mhla_gen.evaluation.scores import inception_score, kernel_distance, precision_recall
from mhla_gen.evaluation.statistics_file import StatisticsFile
from mhla_gen.files import write_json


class Metric(NamedTuple):
    """The name of a metric in a protocol, and what it is computed from."""

    label: str
    features: str = "pool"
    of_images: bool = False
    """It needs the features of each image of the reference; statistics do not do."""
    of_labels: bool = False
    """It needs labels of samples and reference."""


METRICS = {
    "fid": Metric("FID"),
    "fd": Metric("FD"),
    "fvd": Metric("FVD"),
    "sfid": Metric("sFID", "spatial"),
    "is": Metric("IS", "logits"),
    "precision": Metric("precision", of_images=True),
    "recall": Metric("recall", of_images=True),
    "kid": Metric("KID", of_images=True),
    "accuracy": Metric("accuracy", of_images=True, of_labels=True),
    "copies": Metric("copies", of_images=True, of_labels=True),
}

FRECHET = {"fid", "fd", "fvd", "sfid"}


@dataclass(frozen=True)
class Result:
    """One number, and all that is needed to compare it."""

    metric: str
    value: float
    protocol: str
    interval: Interval | None = None
    spread: float | None = None
    """Standard deviation over splits (IS) or subsets (KID)."""
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for metrics.json; what a metric does not have is left out."""
        found: dict[str, Any] = {"value": self.value, "protocol": self.protocol}
        if self.interval:
            found["interval_95"] = [self.interval.low, self.interval.high]
            found["interval_method"] = self.interval.method
        if self.spread is not None:
            found["std"] = self.spread
        if self.note:
            found["note"] = self.note
        return found


def features_of(metrics: Collection[str]) -> set[str]:
    """The features that metrics are computed from."""
    return {METRICS[name].features for name in metrics}


def need_images(metrics: Collection[str]) -> bool:
    """Whether some need the features of each image of the reference."""
    return any(METRICS[name].of_images for name in metrics)


def need_labels(metrics: Collection[str]) -> bool:
    """Whether some need labels of samples and reference."""
    return any(METRICS[name].of_labels for name in metrics)


def compute_metrics(
    config: EvaluateConfig,
    protocol: EvaluationProtocol,
    samples: FeatureSet,
    statistics: StatisticsFile | FeatureSet | None,
    images: FeatureSet | None,
    device: str = "cpu",
) -> list[Result]:
    """The metrics of the settings, in order, with notes where a number needs one.

    Args:
        config: Which metrics, and how intervals are made.
        protocol: How the samples were measured.
        samples: Their features.
        statistics: The reference's; None if no metric needs them.
        images: Features of the reference's images; None if no metric needs them.
        device: Where distances between images are computed.
    """
    found: dict[str, dict[str, Any]] = {}
    if "is" in config.metrics:
        mean, spread = inception_score(samples.load("logits"))
        found["is"] = {"value": mean, "spread": spread, "protocol": "splits-of-5000-in-order"}
    if statistics is not None:
        for metric in FRECHET & set(config.metrics):
            found[metric] = _frechet(METRICS[metric].features, config, samples, statistics)
    if images is not None:
        if "kid" in config.metrics:
            found["kid"] = _kernel_distance(config, samples, images)
        if not {"precision", "recall"}.isdisjoint(config.metrics):
            shares = precision_recall(
                samples.load("pool"), images.load("pool"), config.neighbours, device
            )
            details = f"k-{config.neighbours} vs-{short_count(images.count)}"
            for metric, share in zip(("precision", "recall"), shares, strict=True):
                found[metric] = {"value": share, "protocol": details}
        for metric, share in (("accuracy", class_accuracy), ("copies", copy_share)):
            if metric in config.metrics:
                assert samples.labels is not None and images.labels is not None
                sides = (samples.load("pool"), samples.labels, images.load("pool"), images.labels)
                details = f"vs-{short_count(images.count)}"
                found[metric] = {"value": share(*sides), "protocol": details}
    results: list[Result] = []
    for metric in config.metrics:
        label = f"{METRICS[metric].label}-{short_count(samples.count)}"
        details = found[metric].pop("protocol")
        results.append(Result(metric, protocol=f"{label} {protocol} {details}", **found[metric]))
    return results


def _frechet(
    name: str, config: EvaluateConfig, samples: FeatureSet, reference: StatisticsFile | FeatureSet
) -> dict[str, Any]:
    statistics = reference.statistics(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FewSamplesWarning)
        value, interval = jackknife_interval(
            samples.load(name),
            lambda found: frechet_distance(found, statistics),
            config.jackknife_groups,
            config.seed,
        )
    return {
        "value": value,
        "interval": interval,
        "note": str(caught[0].message) if caught else "",
        "protocol": f"vs-{short_count(reference.count)}",
    }


def _kernel_distance(
    config: EvaluateConfig, samples: FeatureSet, reference: FeatureSet
) -> dict[str, Any]:
    distance = kernel_distance(
        samples.load("pool"),
        reference.load("pool"),
        config.kid_subsets,
        config.kid_subset_size,
        config.seed,
    )
    interval = subsampling_interval(distance, min(samples.count, reference.count))
    subsets = f"{config.kid_subsets}x{config.kid_subset_size}-subsets seed-{config.seed}"
    return {
        "value": distance.mean,
        "interval": interval,
        "spread": distance.std,
        "note": "" if interval else "no interval: each subset is the whole set",
        "protocol": f"{subsets} vs-{short_count(reference.count)}",
    }


def write_report(path: Path, results: list[Result], context: dict[str, Any]) -> None:
    """Write metrics.json: `context`, and each metric by name. Whole or not at all."""
    content = {**context, "metrics": {result.metric: result.to_dict() for result in results}}
    write_json(path, content)


def format_table(results: list[Result]) -> str:
    """The results as lines of text: value, 95 % interval, protocol; notes below."""
    rows = [("metric", "value", "95 % interval", "protocol")]
    for result in results:
        interval = result.interval
        reach = f"{interval.low:.4f} … {interval.high:.4f}" if interval else "–"
        rows.append((result.metric, f"{result.value:.4f}", reach, result.protocol))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}"
        for row in rows
    ]
    notes = [f"{result.metric}: {result.note}" for result in results if result.note]
    return "\n".join(lines + notes)
