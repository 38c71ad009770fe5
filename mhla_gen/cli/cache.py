"""`mhla-gen cache`: see `mhla_gen.data.caching`."""

from accelerate import PartialState

from mhla_gen.config import CacheConfig
from mhla_gen.data.caching.build import build_cache


def run(config: CacheConfig, dry_run: bool) -> None:
    """Build a cache, go on with one, or verify it."""
    line = build_cache(config, dry_run=dry_run)
    if PartialState().is_main_process:
        print(line)
