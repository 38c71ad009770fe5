"""`mhla-gen inspect sensitivity`: see `mhla_gen.inspection.sensitivity`."""

from mhla_gen.config import SensitivityConfig
from mhla_gen.inspection.sensitivity import sensitivity


def run(config: SensitivityConfig, dry_run: bool) -> None:
    """Measure and plan, or load and check everything and say what would be measured."""
    sensitivity(config, dry_run)
