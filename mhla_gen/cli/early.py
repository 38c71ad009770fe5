"""Checks that do not need torch, which takes seconds to load, so they run first.

The commands repeat them, in one process on behalf of all.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mhla_gen.config import (
    CacheConfig,
    DataConfig,
    EvaluateConfig,
    ReferenceConfig,
    SampleConfig,
    TrainConfig,
)
from mhla_gen.errors import MissingError, UserError
from mhla_gen.hub import INDEX_NAME, find
from mhla_gen.outputs.folders import check_writable, made_with

# The pipelines of classes; all others take prompts.
_OF_CLASSES = ("ClassConditionalPipeline", "DiTPipeline")


def check_early(config: Any) -> None:
    """Raise for what is wrong with the files and folders that a config names.

    Raises:
        UserError: In one sentence.
    """
    check = _CHECKS.get(type(config))
    if check is not None:
        check(config)


def _train(config: TrainConfig) -> None:
    from mhla_gen.training.run_folder import check_output_dir, pipeline_steps

    check_output_dir(config)
    if pipeline_steps(Path(config.output_dir)) == config.max_steps:
        # A finished run does not need its data to say that it is finished.
        return
    _data(config.data)
    if config.evaluate_every:
        _exist("evaluation.reference", config.evaluation.reference)


def _cache(config: CacheConfig) -> None:
    if config.verify:
        return
    check_writable(config.output_dir)
    if config.data.source == "clips":
        from mhla_gen.data.clip_files import with_captions

        with_captions(config.data, config.clips.missing_caption)
    else:
        _data(config.data)


def _sample(config: SampleConfig) -> None:
    from mhla_gen.sampling.own_settings import free_of
    from mhla_gen.sampling.prompts import missing_prompts, read_prompts

    made_with(config.output_dir, config, free_of(config))
    check_writable(config.output_dir)
    prompts = [] if config.prompts is None else read_prompts(config.prompts)
    _exist("prompt_embeds", config.prompt_embeds)
    _exist("image", config.image)
    for number, prompt in enumerate(prompts):
        if prompt.image is not None and not Path(prompt.image).is_file():
            raise MissingError(f"image {prompt.image} of prompt {number} does not exist")
    place = find(config.pipeline, newest=True)
    if config.adapter is not None and not Path(config.adapter).exists():
        find(config.adapter)
    index = None if place is None else Path(place) / INDEX_NAME
    if index is not None and index.is_file() and not prompts and config.prompt_embeds is None:
        name = _class_in(index)
        if name is not None and name not in _OF_CLASSES:
            raise UserError(missing_prompts(name, config.pipeline))
    if config.evaluate is not None:
        _exist("evaluate.reference", config.evaluate.reference)


def _class_in(index: Path) -> str | None:
    # A damaged file is named when it is loaded.
    try:
        return json.loads(index.read_bytes()).get("_class_name")
    except (ValueError, AttributeError):
        return None


def _evaluate(config: EvaluateConfig) -> None:
    _exist("samples", config.samples)
    _exist("reference", config.reference)


def _reference(config: ReferenceConfig) -> None:
    _exist("data", config.data)


def _data(config: DataConfig) -> None:
    # Shards are named by a pattern.
    if config.source != "webdataset":
        _exist("data.path", config.path)


def _exist(name: str, paths: Any) -> None:
    """Raise unless a path, or each of several, is there; None names nothing."""
    for path in [paths] if isinstance(paths, str) else paths or ():
        if not Path(path).exists():
            raise MissingError(f"{name} {path} does not exist")


_CHECKS: dict[type, Callable[[Any], None]] = {
    TrainConfig: _train,
    CacheConfig: _cache,
    SampleConfig: _sample,
    EvaluateConfig: _evaluate,
    ReferenceConfig: _reference,
}
