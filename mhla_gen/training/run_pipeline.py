"""The pipeline of a run on disk: at its end, and in each of its checkpoints."""

import os
import shutil
from functools import partial
from pathlib import Path

from mhla_gen.files import write_json
from mhla_gen.files.saved import problem_of_file
from mhla_gen.hub import ADAPTER_FOLDER, EXAMPLES_NAME, SAMPLING_NAME
from mhla_gen.models.adapters import save_adapter
from mhla_gen.training.training_run import Run


def write_pipeline(run: Run, folder: Path, before: Path | None) -> None:
    """Write the pipeline with the EMA weights; every process must call it, one writes.

    Where nothing but MHLA and LoRA is trained, `adapter` in its folder has both of them alone, with
    the settings to sample with.

    Args:
        run: What is trained.
        folder: Where; it is not there yet.
        before: A pipeline of this run that was written before. Its parts that are not trained, such
            as the autoencoder, are the same files again where the file system has hard links.

    Raises:
        OSError: If it cannot be written.
    """
    with run.averaged_model() as model:
        if run.accelerator.is_main_process:
            finished = model if run.task.finished is None else run.task.finished(model)
            pipeline = run.task.pipeline(finished)
            parts = {
                name: partial(part.save_pretrained, folder / name)
                for name, part in pipeline.components.items()
                if part is not None
            }
            if run.task.examples is not None:
                parts[EXAMPLES_NAME] = partial(run.task.examples, pipeline, folder / EXAMPLES_NAME)
            for name, write in parts.items():
                trained = pipeline.components.get(name) is finished
                known = None if before is None or trained else before / name
                if known is not None and _is_whole(known):
                    shutil.copytree(known, folder / name, copy_function=_link)
                else:
                    write()
            pipeline.save_config(folder)
            if run.config.model.trainable != "all":
                save_adapter(run.task.pipeline(model), folder / ADAPTER_FOLDER)
                write_json(folder / ADAPTER_FOLDER / SAMPLING_NAME, dict(run.task.sampling))
            write_json(folder / SAMPLING_NAME, dict(run.task.sampling))


def _is_whole(part: Path) -> bool:
    """Whether a saved part has weights, which are worth a link, and no file of it is damaged."""
    files = [path for path in part.rglob("*") if path.is_file()]
    has_weights = any(path.suffix == ".safetensors" for path in files)
    has_settings = (part / "config.json").is_file()
    return has_weights and has_settings and not any(map(problem_of_file, files))


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
