"""Checks that do not need torch, which takes seconds to load, so they run first.

The commands repeat them, in one process on behalf of all.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mhla_gen.config import (
    BenchConfig,
    CacheConfig,
    ConvertConfig,
    DataConfig,
    EvaluateConfig,
    FeaturesConfig,
    InspectConfig,
    QuickstartConfig,
    ReferenceConfig,
    SampleConfig,
    SensitivityConfig,
    TrainConfig,
)
from mhla_gen.config.fields import in_group
from mhla_gen.config.inspection import FREE_OF_SCAN
from mhla_gen.errors import MissingError, UserError
from mhla_gen.hub import INDEX_NAME, PIPELINE_NAME, adapter_file, find, locate
from mhla_gen.outputs.folders import (
    CONFIG_NAME,
    check_replaceable,
    check_writable,
    made_with,
)

# The pipelines of classes; all others take prompts.
_OF_CLASSES = ("ClassConditionalPipeline", "DiTPipeline")
_Checks = Iterator[Callable[[], Any]]


def check_early(config: Any) -> None:
    """Raise for all that is wrong with the files and folders that a config names.

    Raises:
        UserError: In one sentence a mistake.
    """
    mistakes: list[UserError] = []
    for check in _CHECKS.get(type(config), _nothing)(config):
        try:
            check()
        except UserError as error:
            mistakes.append(error)
    if len(mistakes) == 1:
        raise mistakes[0]
    if mistakes:
        raise UserError("; also: ".join(map(str, mistakes)))


def _nothing(config: Any) -> _Checks:
    yield from ()


def _train(config: TrainConfig) -> _Checks:
    from mhla_gen.training.run_folder import check_output_dir, pipeline_steps

    folder = Path(config.output_dir)
    yield partial(check_output_dir, config)
    if config.distill is None:
        finished = pipeline_steps(folder) == config.max_steps
    else:
        finished = (folder / PIPELINE_NAME).is_dir()
    if finished:
        # A finished run does not need its data to say that it is finished.
        return
    yield partial(_data, config.data)
    if config.distill is None:
        yield partial(_model, "model.pretrained", config.model.pretrained)
    else:
        yield partial(_model, "distill.teacher", config.distill.teacher)
        yield partial(_model, "distill.start", config.distill.start)
    if config.evaluate_every:
        yield partial(_comparison, "evaluation.", config.evaluation.settings, config.output_dir)
        yield partial(_exist, "evaluation.reference", config.evaluation.reference)
        yield partial(_weights, "evaluation.features", config.evaluation.features)


def _cache(config: CacheConfig) -> _Checks:
    from mhla_gen.data.caching.folder import check_output_dir

    if config.verify:
        yield partial(_exist, "output_dir", config.output_dir)
        return
    yield config.require_autoencoder
    yield partial(check_output_dir, config)
    if config.data.source == "clips":
        from mhla_gen.data.clip_files import with_captions

        yield partial(with_captions, config.data, config.clips.missing_caption)
    else:
        yield partial(_data, config.data)
    for part in ("vae", "text", "image_encoder"):
        yield partial(_model, f"{part}.path", getattr(config, part).path)


def _sample(config: SampleConfig) -> _Checks:
    from mhla_gen.sampling.own_settings import free_of
    from mhla_gen.sampling.prompts import read_prompts

    yield lambda: _output(config, free_of(config))
    yield partial(_model, "pipeline", config.pipeline, newest=True)
    if config.adapter is not None:
        yield partial(_named, "adapter", config.adapter, adapter_file)
    if config.prompts is not None:
        yield lambda: _images_of(read_prompts(config.prompts))
    elif config.prompt_embeds is None:
        yield partial(_prompts, config)
    yield partial(_exist, "prompt_embeds", config.prompt_embeds)
    yield partial(_exist, "image", config.image)
    if config.evaluate is not None:
        yield partial(_comparison, "evaluate.", config.evaluate, config.output_dir)
        yield partial(_exist, "evaluate.reference", config.evaluate.reference)
        yield partial(_weights, "evaluate.features", config.evaluate.features)


def _comparison(group: str, config: EvaluateConfig, samples: str) -> None:
    with in_group(group):
        replace(config, samples=samples).check_comparison()


def _images_of(prompts: Any) -> None:
    for number, prompt in enumerate(prompts):
        if prompt.image is not None and not Path(prompt.image).is_file():
            raise MissingError(f"image {prompt.image} of prompt {number} does not exist")


def _prompts(config: SampleConfig) -> None:
    """Raise if a pipeline here takes prompts, and there are none."""
    from mhla_gen.sampling.prompts import missing_prompts

    place = find(config.pipeline, newest=True) if Path(config.pipeline).is_dir() else None
    index = None if place is None else Path(place) / INDEX_NAME
    if index is not None and index.is_file():
        name = _class_in(index)
        if name is not None and name not in _OF_CLASSES:
            raise UserError(missing_prompts(name, config.pipeline))


def _class_in(index: Path) -> str | None:
    # A damaged file is named when it is loaded.
    try:
        return json.loads(index.read_bytes()).get("_class_name")
    except (ValueError, AttributeError):
        return None


def _evaluate(config: EvaluateConfig) -> _Checks:
    from mhla_gen.evaluation.outs import check_report

    yield config.check_comparison
    yield partial(check_report, config.out)
    yield partial(_exist, "samples", config.samples)
    yield partial(_exist, "reference", config.reference)
    yield partial(_weights, "features", config.features)


def _reference(config: ReferenceConfig) -> _Checks:
    from mhla_gen.evaluation.outs import check_statistics

    yield config.check_files
    yield partial(check_statistics, config.out)
    yield partial(_exist, "data", config.data)
    yield partial(_weights, "features", config.features)


def _inspect(config: InspectConfig) -> _Checks:
    yield config.require_model
    yield partial(made_with, config.output_dir, config)
    yield partial(check_replaceable, config.output_dir)
    yield partial(_model, "model", config.model, newest=True)
    yield partial(_model, "teacher", config.teacher, newest=True)
    if config.data is not None:
        yield partial(_data, config.data)


def _sensitivity(config: SensitivityConfig) -> _Checks:
    yield config.require_model
    yield partial(_output, config, FREE_OF_SCAN)
    yield partial(_model, "model", config.model, newest=True)
    if config.data is not None:
        yield partial(_data, config.data)


def _convert(config: ConvertConfig) -> _Checks:
    yield partial(made_with, config.output_dir, config)
    if not (Path(config.output_dir) / CONFIG_NAME).is_file():
        yield partial(check_replaceable, config.output_dir)
        yield config.require_source


def _bench(config: BenchConfig) -> _Checks:
    from mhla_gen.bench.folder import check_output_dir

    yield partial(check_output_dir, config)


def _quickstart(config: QuickstartConfig) -> _Checks:
    yield partial(_output, config, is_done=True)


def _output(config: Any, ignore: Sequence[str] = ("output_dir",), is_done: bool = False) -> None:
    """Raise unless the output folder is free, or has these settings, and can be written.

    `is_done`: where it has these settings, nothing more will be written.
    """
    ours = made_with(config.output_dir, config, ignore)
    if not (ours and is_done):
        check_writable(config.output_dir)


def _data(config: DataConfig) -> None:
    # Shards are named by a pattern.
    if config.source != "webdataset":
        _exist("data.path", config.path)


def _model(name: str, path: str | None, newest: bool = False) -> None:
    """Raise unless a saved model or run is there, or the path can be a name on the hub."""
    if path is not None:
        _named(name, path, partial(locate, newest=newest))


def _named(name: str, path: str, look: Callable[[str], Any]) -> None:
    try:
        look(path)
    except MissingError as error:
        # Its message begins with the path.
        raise MissingError(f"{name}={error}") from error


def _weights(name: str, features: FeaturesConfig) -> None:
    check_writable(features.cache_dir, f"{name}.cache_dir")
    # DINOv2 also has a name on the hub.
    if features.extractor != "dinov2":
        _exist(f"{name}.weights", features.weights)


def _exist(name: str, paths: Any) -> None:
    """Raise unless a path, or each of several, is there; None names nothing."""
    for path in [paths] if isinstance(paths, str) else paths or ():
        if not Path(path).exists():
            raise MissingError(f"{name} {path} does not exist")


_CHECKS: dict[type, Callable[[Any], _Checks]] = {
    TrainConfig: _train,
    CacheConfig: _cache,
    SampleConfig: _sample,
    EvaluateConfig: _evaluate,
    ReferenceConfig: _reference,
    InspectConfig: _inspect,
    SensitivityConfig: _sensitivity,
    ConvertConfig: _convert,
    BenchConfig: _bench,
    QuickstartConfig: _quickstart,
}
