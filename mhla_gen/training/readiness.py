"""Opens what a run needs later before its first step, rather than failing hours later."""

from pathlib import Path
from typing import Any

import numpy as np

from mhla_gen.errors import UserError
from mhla_gen.runtime.processes import on_main
from mhla_gen.training.training_run import Run


def open_what_is_needed(run: Run) -> None:
    """Open the parts of the pipeline, and what evaluations need; every process must call it.

    Raises:
        UserError: If something is missing, or does not go together with the samples.
        ValueError: As `UserError`, for parts of the pipeline.
        OSError: If a file cannot be read.
    """
    model = run.accelerator.unwrap_model(run.model)
    # The autoencoder, text encoder and other expert, kept until a checkpoint or preview uses them.
    on_main(lambda: (run.task.pipeline(model), None)[1])
    config = run.config
    if config.evaluate_every and (run.task.sampler is None or not config.takes_labels):
        raise UserError("evaluate_every is for class-conditional models of images; leave it out")
    if config.sample_every or config.evaluate_every:
        pipeline = run.task.pipeline(model)
        if config.evaluate_every:
            _try_evaluation(run, pipeline)


def _try_evaluation(run: Run, pipeline: Any) -> None:
    """Load the extractor, open the reference, and compare what has to be equal."""
    # Training alone needs none of the packages that evaluation brings.
    from mhla_gen.sampling.samplers import ClassSampler
    from mhla_gen.sampling.scoring import Scorer

    count = run.config.evaluation.samples.num_images
    shape = ClassSampler(pipeline, np.zeros(1, np.int64), seed=0).shape
    folder = Path(run.config.output_dir)
    Scorer(run.config.evaluation.settings, folder, folder, shape, count)
