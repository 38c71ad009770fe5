"""Finding saved models and pipelines: in folders, in training runs, on the Hugging Face hub."""

from pathlib import Path
from typing import Any

from mhla_gen.config.fields import expand_home
from mhla_gen.errors import MissingError, UserError
from mhla_gen.files.saved import read_json, require_utf8

INDEX_NAME = "model_index.json"
PIPELINE_NAME = "pipeline"
"""Folder of a finished run, and of a checkpoint, that holds its pipeline."""
SAMPLING_NAME = "sampling.json"
"""File beside `INDEX_NAME` with settings of `mhla-gen sample` for this pipeline."""
ADAPTER_FOLDER, ADAPTER_NAME = "adapter", "mhla_adapter.safetensors"
"""Folder inside a trained pipeline that holds what was added to its base, and its file."""
EXAMPLES_NAME = "examples"
"""Folder beside `INDEX_NAME` with prompts for `mhla-gen sample`, and what belongs to them."""
PROMPTS_NAME, EMBEDS_NAME = "prompts.jsonl", "prompt_embeds.safetensors"
_SAVED = (INDEX_NAME, "config.json")


def find(path: str, newest: bool = False) -> str | None:
    """What `from_pretrained` takes for a path or name.

    Args:
        path: A folder written by `save_pretrained`, of a pipeline or a part of one; a training run
            or one of its checkpoints; or a name on the hub, which is not contacted here.
        newest: For an unfinished run, return its newest checkpoint.

    Returns:
        The folder, that of the run's pipeline, or the name; None for a folder without a model, such
        as an unfinished run.

    Raises:
        FileNotFoundError: If it is neither a folder nor can be a name on the hub.
    """
    path = expand_home("the model", path)
    require_utf8("the model", path)
    folder = Path(path)
    if folder.is_dir():
        places = [folder, folder / PIPELINE_NAME]
        if newest and not places[1].is_dir():
            # Never an older one instead of the newest: it would silently be another model.
            found = [
                p for p in folder.glob("checkpoint-*") if _step_of(p) >= 0 and any(p.iterdir())
            ]
            places += [max(found, key=_step_of) / PIPELINE_NAME] if found else []
        return next((str(p) for p in places if any((p / n).is_file() for n in _SAVED)), None)
    if folder.exists() or not _is_name(path):
        raise MissingError(
            f"{path}: there is no such folder, and it cannot be a name on the hub (owner/name, "
            "with no folder called owner here)"
        )
    return path


def locate(path: str, newest: bool = False) -> str:
    """As `find`, where something must be there.

    Raises:
        FileNotFoundError: If there is nothing.
    """
    place = find(path, newest)
    if place is None:
        run = "with a pipeline or a checkpoint" if newest else "that has finished"
        raise MissingError(
            f"{path} is neither a saved pipeline ({INDEX_NAME}), nor a saved model (config.json), "
            f"nor a training run {run}"
        )
    return place


def adapter_file(path: str | Path, subfolder: str = "") -> Path | None:
    """The file of an adapter in a file, folder or training run; None for a name on the hub.

    Args:
        path: A file or folder that `save_adapter` wrote, a run, finished or not, or a name.
        subfolder: Where in the folder.

    Raises:
        FileNotFoundError: If there is none, and the path cannot be a name on the hub.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return path
    place = find(str(path), newest=True)
    if not path.is_dir():
        return None
    folder = path / subfolder
    places = [folder, folder / ADAPTER_FOLDER, *([Path(place) / ADAPTER_FOLDER] if place else [])]
    found = [each / ADAPTER_NAME for each in places if (each / ADAPTER_NAME).is_file()]
    if not found:
        raise MissingError(
            f"{path} has no {ADAPTER_NAME}; a run has one where model.trainable is mhla or lora"
        )
    return found[0]


def _step_of(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def example_settings(pipeline: str | Path) -> list[str]:
    """Settings with which `mhla-gen sample` makes an example; none for class-conditional models.

    Args:
        pipeline: Folder of a pipeline that a training run saved.
    """
    folder = Path(pipeline) / EXAMPLES_NAME
    files = {"prompts": folder / PROMPTS_NAME, "prompt_embeds": folder / EMBEDS_NAME}
    return [f"{name}={path}" for name, path in files.items() if path.is_file()]


def pipeline_index(path: str) -> dict[str, Any]:
    """The content of a pipeline's model_index.json: its settings, and the class of every part.

    Without a network, repositories that were downloaded before are found.

    Returns:
        Empty if the path or name is something else, or the hub has no pipeline of this name.

    Raises:
        FileNotFoundError: As `locate`.
    """
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    place = locate(path)
    if Path(place).is_dir():
        if not (Path(place) / INDEX_NAME).is_file():
            return {}
        read_json(Path(place) / INDEX_NAME, "save or download the pipeline again")
    try:
        index: Any = DiffusionPipeline.load_config(place)
    except OSError:
        return {}
    return dict(index)


def locate_part(path: str, name: str) -> tuple[str, dict[str, Any]]:
    """Arguments of `from_pretrained` for a part of a pipeline, or a model saved on its own.

    Args:
        path: As in `find`.
        name: Of the part, if it is a pipeline.

    Returns:
        The place, and its `subfolder`.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: If the pipeline has no such part.
    """
    place = locate(path)
    index = pipeline_index(place)
    if not index:
        return place, {}
    parts = [key for key, value in index.items() if _is_part(value)]
    if name not in parts:
        raise UserError(f"the pipeline {place} has no {name}; it has {', '.join(parts)}")
    return place, {"subfolder": name}


def _is_part(value: Any) -> bool:
    # A part that was saved as missing is [null, null].
    return isinstance(value, list) and len(value) == 2 and value[0] is not None


def _is_name(path: str) -> bool:
    """Whether to ask the hub, where looking for a misspelt path would take a long time."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return "/" in path and not Path(path).parent.exists()
