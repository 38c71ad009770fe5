"""The evaluation command: samples and a reference → numbers with protocols and intervals."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from mhla_gen.config import EvaluateConfig
from mhla_gen.evaluation.errors import EvaluationError
from mhla_gen.evaluation.feature_files import FeatureSet
from mhla_gen.evaluation.measurer import Measurer
from mhla_gen.evaluation.protocol import EvaluationProtocol
from mhla_gen.evaluation.reference import Reference
from mhla_gen.evaluation.results import (
    FRECHET,
    Result,
    compute_metrics,
    features_of,
    format_table,
    need_images,
    write_report,
)
from mhla_gen.evaluation.sources import MANIFEST_NAME
from mhla_gen.files.saved import read_json
from mhla_gen.outputs.folders import check_writable
from mhla_gen.version import __version__

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
    if config.samples is None:
        raise EvaluationError("samples=PATH is required: the images to measure")
    check_metrics(config)
    check_writable(Path(config.out).parent, "out")
    measurer = Measurer.start(config.features, config.size, config.skip_corrupt)
    source = measurer.open(config.samples)
    scoring = Scoring.prepare(config, measurer, measurer.protocol(source), len(source))
    if dry_run:
        print(f"would measure {len(source)} images of {source.name}: {scoring.protocol}")
        return []
    return scoring.score(measurer.features(source, scoring.feature_names))


@dataclass(frozen=True)
class Scoring:
    """A comparison that is known to be possible before anything is measured."""

    config: EvaluateConfig
    measurer: Measurer
    protocol: EvaluationProtocol
    reference: Reference | None

    @classmethod
    def prepare(
        cls, config: EvaluateConfig, measurer: Measurer, protocol: EvaluationProtocol, count: int
    ) -> "Scoring":
        """Open the reference, and compare what has to be equal.

        Args:
            config: What to measure.
            measurer: With the extractor.
            protocol: How the samples are measured.
            count: How many samples there are, or will be.

        Raises:
            EvaluationError: If something is missing, unusable or not comparable.
        """
        reference = _open_reference(config, measurer)
        if reference:
            protocol.require_same(reference.protocol)
        _require_enough(config, count, "samples")
        if reference and reference.source is not None:
            _require_enough(config, len(reference.source), "reference")
        return cls(config, measurer, protocol, reference)

    @property
    def feature_names(self) -> list[str]:
        """The features that the metrics need."""
        return sorted(features_of(self.config.metrics))

    def score(self, samples: FeatureSet) -> list[Result]:
        """Print a table of the numbers and write `config.out`; all processes call this.

        Returns:
            The results, on the main process; nothing on the others.
        """
        config, reference = self.config, self.reference
        if reference is not None:
            needed = _statistics_of(config), need_images(config.metrics)
            reference = reference.measured(self.measurer, *needed)
        if not PartialState().is_main_process:
            return []
        device = str(PartialState().device)
        results = compute_metrics(config, self.protocol, samples, reference, device)
        write_report(Path(config.out), results, _context(config, samples, reference))
        print(format_table(results))
        return results


def check_metrics(config: EvaluateConfig) -> None:
    """Raise if the metrics do not go with the extractor, or need a reference that is not given.

    Raises:
        EvaluationError: Naming what to change.
    """
    if config.reference is None and set(config.metrics) != {"is"}:
        raise EvaluationError("reference=PATH is required for every metric but is")
    extractor = config.features.extractor
    wrong = [name for name in config.metrics if not _fits(name, extractor)]
    if wrong:
        remedy = {"inception": "metrics=[fid]", "i3d": "metrics=[fvd]"}.get(
            extractor, "metrics=[fd,precision,recall,kid]"
        )
        raise EvaluationError(
            f"{', '.join(wrong)} cannot be measured with features.extractor={extractor}: fid, sfid "
            "and is mean inception, fvd means i3d, fd is the same distance on any other network; "
            f"give {remedy}, for example"
        )


def _fits(metric: str, extractor: str) -> bool:
    if metric in _OF_INCEPTION:
        return extractor == "inception"
    if metric == "fvd":
        return extractor == "i3d"
    return metric != "fd" or extractor not in ("inception", "i3d")


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


def _open_reference(config: EvaluateConfig, measurer: Measurer) -> Reference | None:
    if config.reference is None:
        return None
    reference = Reference.open(config.reference, measurer)
    reference.require(_statistics_of(config), need_images(config.metrics))
    return reference


def _statistics_of(config: EvaluateConfig) -> set[str]:
    """Features of the reference that are compared with those of the samples."""
    return features_of(config.metrics) - {"logits"}


def _context(
    config: EvaluateConfig, samples: FeatureSet, reference: Reference | None
) -> dict[str, Any]:
    described: dict[str, Any] = {
        "paths": list(config.samples),
        "count": samples.count,
        "unreadable": list(samples.unreadable),
        "sha256": samples.digest,
        "manifests": [
            read_json(path, "draw the set again, or remove it")
            for path in _manifests(config.samples)
        ],
    }
    context: dict[str, Any] = {"samples": described}
    if reference:
        context["reference"] = {
            "paths": list(config.reference),
            "count": reference.count,
            "image_count": reference.image_count,
            "unreadable": list(reference.images.unreadable) if reference.images else [],
            "protocol": str(reference.protocol),
        }
    context["versions"] = {"mhla_gen": __version__, "torch": torch.__version__}
    return context


def _manifests(paths: tuple[str, ...]) -> list[Path]:
    return [Path(path, MANIFEST_NAME) for path in paths if Path(path, MANIFEST_NAME).is_file()]
