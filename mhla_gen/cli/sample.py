"""`mhla-gen sample`: see `mhla_gen.sampling`."""

from mhla_gen.config import SampleConfig
from mhla_gen.sampling import sample


def run(config: SampleConfig, dry_run: bool) -> None:
    """Write a sample set, or check everything and say what would be made."""
    sample(config, dry_run=dry_run)
