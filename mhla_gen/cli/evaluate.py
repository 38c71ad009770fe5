"""`mhla-gen evaluate`: numbers for samples against a reference."""

from mhla_gen.config import EvaluateConfig
from mhla_gen.evaluation.evaluation import evaluate


def run(config: EvaluateConfig, dry_run: bool) -> None:
    """Measure, print a table and write metrics.json."""
    evaluate(config, dry_run)
