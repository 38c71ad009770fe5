"""`mhla-gen quickstart`: see `mhla_gen.quickstart`."""

from mhla_gen.config import QuickstartConfig
from mhla_gen.quickstart import quickstart


def run(config: QuickstartConfig, dry_run: bool) -> None:
    """Run the quickstart."""
    quickstart(config, dry_run=dry_run)
