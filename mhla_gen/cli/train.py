"""`mhla-gen train`: see `mhla_gen.training`."""

import shlex

from accelerate import PartialState

from mhla_gen.config import TrainConfig
from mhla_gen.distillation import distill, rehearse_distillation
from mhla_gen.hub import example_settings
from mhla_gen.training import rehearse, train


def run(config: TrainConfig, dry_run: bool) -> None:
    """Train or distill, or build everything and do one step without writing."""
    if dry_run:
        said = rehearse(config) if config.distill is None else rehearse_distillation(config)
    else:
        pipeline = train(config) if config.distill is None else distill(config)
        command = ["mhla-gen", "sample", str(pipeline), *example_settings(pipeline)]
        said = f"trained pipeline: {pipeline}; to draw from it: {shlex.join(command)}"
    if PartialState().is_main_process:
        print(said)
