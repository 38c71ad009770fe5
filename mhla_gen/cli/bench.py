"""`mhla-gen bench ops | model`: see `mhla_gen.bench.benchmark`."""

from mhla_gen.config import BenchConfig


def run(config: BenchConfig, dry_run: bool) -> None:
    """Measure, or say what would be measured."""
    if dry_run:
        print(f"would measure {config.subject}: {', '.join(config.methods)} on {config.grids}")
        return
    from mhla_gen.bench.benchmark import bench

    bench(config)
