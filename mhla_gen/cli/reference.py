"""`mhla-gen reference`: statistics of the user's own images, to evaluate against."""

from mhla_gen.config import ReferenceConfig
from mhla_gen.evaluation.reference import build_reference


def run(config: ReferenceConfig, dry_run: bool) -> None:
    """Measure the images and write the file."""
    build_reference(config, dry_run)
