"""`mhla-gen inspect`: see `mhla_gen.inspection`."""

from mhla_gen.config import InspectConfig
from mhla_gen.inspection import inspect


def run(config: InspectConfig, dry_run: bool) -> None:
    """Draw the page, or load and check everything and say what would be drawn."""
    inspect(config, dry_run)
