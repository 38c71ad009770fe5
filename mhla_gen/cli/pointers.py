"""The next command, for the last line of one that made something for it."""

import shlex
from pathlib import Path
from typing import Literal

from mhla_gen.config import CacheConfig, ConvertConfig
from mhla_gen.hub import example_settings, pipeline_index

Kind = Literal["labels", "wan", "transformer"]
# Of a clone of the repository; elsewhere the settings that matter most are written out.
_CONFIGS = {"wan": "configs/train_wan.yaml", "transformer": "configs/train_text.yaml"}
_TUNING = ("learning_rate=2e-5", "batch_size=8")
_WAN = ("WanTransformer3DModel", "MHLAWanTransformer3DModel")


def after_training(pipeline: Path) -> str:
    """A command that samples from the pipeline of a run, into a folder beside the run."""
    beside = f"output_dir={pipeline.parent}-samples"
    return _command("sample", str(pipeline), beside, *example_settings(pipeline))


def after_caching(config: CacheConfig) -> str | None:
    """A command that trains on a cache; None for one without labels and embedded captions."""
    from mhla_gen.data.caching.index import Index

    folder, text = Path(config.output_dir), config.text.path
    index = Index.read(folder)
    data = f"data.path={folder}"
    if not index.prompts or text is None:
        images = index.class_names and len(index.buckets[0].latents) == 3
        return _command("train", "data.source=cache", data) if images else None
    library, name = pipeline_index(text).get("transformer") or (None, None)
    if library is None:
        return None
    kind: Kind = "wan" if name in _WAN else "transformer"
    condition = ["wan.first_frame=true"] if config.clips.condition else []
    return _command("train", *_settings(kind), data, f"model.pretrained={text}", *condition)


def after_importing(config: ConvertConfig) -> str | None:
    """A command that tunes an imported model on a cache; None for one of another trainer."""
    if config.format == "mhla_deit":
        return None
    kind: Kind = "wan" if config.format == "mhla_wan" else "labels"
    # A DiT learned another objective than the default, and other classes; the original has no MHLA.
    dit = ["objective.name=ddpm", "model.new_classes=true"] if kind == "labels" else []
    dit += ["model.mhla.exact=0.125"] if config.format == "dit" else []
    model = f"model.pretrained={config.output_dir}"
    return _command("train", *_bare(kind), "data.path=CACHE", model, *dit, *_TUNING)


def _settings(kind: Kind) -> list[str]:
    file = _CONFIGS[kind]
    return [file] if Path(file).is_file() else [*_bare(kind), *_TUNING]


def _bare(kind: Kind) -> list[str]:
    return ["data.source=cache", *([] if kind == "labels" else [f"{kind}={{}}"])]


def _command(name: str, *arguments: str) -> str:
    return shlex.join(["mhla-gen", name, *arguments])
