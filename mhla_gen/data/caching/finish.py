"""The end of building a cache: check every file, list what was left out, write the index."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from mhla_gen.config import CacheConfig
from mhla_gen.data.caching.checking import (
    Facts,
    examine_all,
    require_digests,
    require_latents,
    require_prompts,
)
from mhla_gen.data.caching.chunks import Chunk
from mhla_gen.data.caching.index import CAPTIONS_NAME, QUARANTINE_NAME, BucketIndex, Index
from mhla_gen.data.protocol import Examples
from mhla_gen.errors import UserError
from mhla_gen.files import write_json, write_lines
from mhla_gen.runtime.processes import on_main


@dataclass(frozen=True, eq=False)
class Contents:
    """The intended content of a cache."""

    examples: Examples
    latents: list[Chunk]
    shapes: list[tuple[int, ...]]
    """Of a sample of each bucket."""
    captions: list[str] | None
    """Different captions, if they are embedded."""
    prompts: list[Chunk]
    unreadable: list[dict[str, str]]
    """`name` and `reason` of files that never got into a chunk."""


def finish(
    config: CacheConfig, settings: dict[str, Any], contents: Contents, known: dict[str, Facts]
) -> Index:
    """Check what is on disk, and write quarantine.jsonl and index.json.

    Args:
        config: Settings of the run.
        settings: What decided the content.
        contents: What there should be.
        known: Files of an earlier index that must not have changed.

    Raises:
        ValueError: If a file is broken or has changed, or nothing could be read.
    """
    folder = Path(config.output_dir)
    chunks = contents.latents + contents.prompts
    found = examine_all(folder, [chunk.name for chunk in chunks])
    require_digests(found.values(), known)
    for chunk in contents.latents:
        shape = contents.shapes[chunk.bucket]
        require_latents(found[chunk.name], chunk, shape, config.dtype, _extras(settings))
    for chunk in contents.prompts:
        require_prompts(found[chunk.name], chunk)
    return on_main(lambda: _write(config, settings, contents, found))


def _extras(settings: dict[str, Any]) -> set[str]:
    given = {
        "mean_flipped": settings["flips"],
        "condition": settings["clips"].get("condition"),
        "image_embeds": settings["image_encoder"],
    }
    return {name for name, value in given.items() if value}


def _write(
    config: CacheConfig, settings: dict[str, Any], contents: Contents, found: dict[str, Facts]
) -> Index:
    folder = Path(config.output_dir)
    quarantined = list(contents.unreadable)
    for chunk in contents.latents:
        quarantined += found[chunk.name]["record"]["quarantined"]
    write_lines(folder / QUARANTINE_NAME, quarantined)
    if contents.captions is not None:
        write_json(folder / CAPTIONS_NAME, contents.captions, indent=0)
    buckets = tuple(filter(lambda bucket: bucket.count, _buckets(contents, found)))
    if not buckets:
        first = quarantined[0]
        raise UserError(
            f"none of {len(quarantined)} files could be read; the first: {first['name']} "
            f"{first['reason']}"
        )
    index = Index(
        settings=settings,
        normalisation=settings["normalisation"],
        sources={
            "data": _place(config.data.path),
            "vae": _place(config.vae.path),
            "text": _place(config.text.path),
            "image_encoder": _place(config.image_encoder.path),
        },
        class_names=contents.examples.class_names,
        buckets=buckets,
        prompts=tuple((chunk.name, len(chunk.items)) for chunk in contents.prompts),
        files={n: {"bytes": f["bytes"], "sha256": f["sha256"]} for n, f in found.items()},
        quarantined=len(quarantined),
        empty_classes=_empty_classes(folder, contents) if quarantined else (),
    )
    index.write(folder)
    return index


def _empty_classes(folder: Path, contents: Contents) -> tuple[str, ...]:
    labels, names = contents.examples.labels, contents.examples.class_names
    if labels is None or names is None:
        return ()
    kept: set[int] = set()
    for chunk in contents.latents:
        with safe_open(folder / chunk.name, "pt") as file:
            kept |= {*file.get_tensor("label").tolist()}
    return tuple(names[label] for label in sorted({*labels.tolist()} - kept))


def _buckets(contents: Contents, found: dict[str, Facts]) -> list[BucketIndex]:
    return [
        BucketIndex(
            tuple(pixels),
            contents.shapes[number],
            tuple(
                (chunk.name, len(found[chunk.name]["record"]["names"]))
                for chunk in contents.latents
                if chunk.bucket == number
            ),
        )
        for number, pixels in enumerate(contents.examples.sample_shapes)
    ]


def _place(path: str | None) -> str | None:
    """A folder by its full path, so that it is found from elsewhere; a name on the hub as it is."""
    return str(Path(path).resolve()) if path is not None and Path(path).exists() else path
