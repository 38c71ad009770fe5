"""`mhla-gen train`: see `mhla_gen.training`."""

from mhla_gen.config import TrainConfig
from mhla_gen.training import rehearse, train


def run(config: TrainConfig, dry_run: bool) -> None:
    """Train, or build everything and do one step without writing."""
    if dry_run:
        print(rehearse(config))
    else:
        train(config)
