"""`mhla-gen convert`: see `mhla_gen.conversion`."""

from mhla_gen.config import ConvertConfig
from mhla_gen.conversion import convert


def run(config: ConvertConfig, dry_run: bool) -> None:
    """Convert a checkpoint, or check that it can be and write nothing."""
    convert(config, dry_run=dry_run)
