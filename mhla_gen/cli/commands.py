"""Commands that do more than one call. What they need is imported when they run."""

from mhla_gen.cli import pointers
from mhla_gen.config import CacheConfig, ConvertConfig, DoctorConfig, TrainConfig
from mhla_gen.errors import UserError


def train(config: TrainConfig, dry_run: bool) -> None:
    """Train or distill, or build everything and do one step without writing."""
    from accelerate import PartialState

    from mhla_gen.distillation import distill, rehearse_distillation
    from mhla_gen.training import rehearse, train

    if dry_run:
        said = rehearse(config) if config.distill is None else rehearse_distillation(config)
    else:
        pipeline = train(config) if config.distill is None else distill(config)
        following = pointers.after_training(pipeline)
        said = f"trained pipeline: {pipeline}; to sample from it: {following}"
    if PartialState().is_main_process:
        print(said)


def cache(config: CacheConfig, dry_run: bool) -> None:
    """Build a cache, resume one, or verify it."""
    from accelerate import PartialState

    from mhla_gen.data.caching.build import build_cache

    line = build_cache(config, dry_run=dry_run)
    if PartialState().is_main_process:
        print(line)
        following = None if dry_run or config.verify else pointers.after_caching(config)
        if following is not None:
            print(f"to train on it: {following}")


def convert(config: ConvertConfig, dry_run: bool) -> None:
    """Import or export a checkpoint, or say that this was done."""
    from mhla_gen.conversion.conversion import convert

    convert(config, dry_run)
    following = pointers.after_importing(config) if config.direction == "import" else None
    if following is not None and not dry_run:
        print(f"to tune it on what `mhla-gen cache` made: {following}")


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
