"""Commands that do more than one call. What they need is imported when they run."""

import shlex

from mhla_gen.config import BenchConfig, CacheConfig, DoctorConfig, TrainConfig
from mhla_gen.errors import UserError


def train(config: TrainConfig, dry_run: bool) -> None:
    """Train or distill, or build everything and do one step without writing."""
    from accelerate import PartialState

    from mhla_gen.distillation import distill, rehearse_distillation
    from mhla_gen.hub import example_settings
    from mhla_gen.training import rehearse, train

    if dry_run:
        said = rehearse(config) if config.distill is None else rehearse_distillation(config)
    else:
        pipeline = train(config) if config.distill is None else distill(config)
        command = ["mhla-gen", "sample", str(pipeline), *example_settings(pipeline)]
        said = f"trained pipeline: {pipeline}; to sample from it: {shlex.join(command)}"
    if PartialState().is_main_process:
        print(said)


def cache(config: CacheConfig, dry_run: bool) -> None:
    """Build a cache, resume one, or verify it."""
    from accelerate import PartialState

    from mhla_gen.data.caching.build import build_cache

    line = build_cache(config, dry_run=dry_run)
    if PartialState().is_main_process:
        print(line)


def bench(config: BenchConfig, dry_run: bool) -> None:
    """Measure, or print what would be measured."""
    if dry_run:
        methods = "auto" if config.methods == "auto" else ", ".join(config.methods)
        print(f"would measure {config.subject}: {methods} on {config.grids}")
        return
    from mhla_gen.bench.benchmark import bench

    bench(config)


def doctor(config: DoctorConfig, dry_run: bool) -> None:
    """Print what works; a broken part is an error.

    Raises:
        ValueError: If a part is broken.
    """
    from mhla_gen.doctor import CHECKS, examine, report

    if dry_run:
        print("would check: " + ", ".join(CHECKS))
        return
    findings = examine(config.checks)
    print(report(findings))
    broken = [finding.name for finding in findings if finding.state == "broken"]
    if broken:
        raise UserError(f"not working: {', '.join(broken)}; the table says what to do")
