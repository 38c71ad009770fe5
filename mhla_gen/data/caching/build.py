"""`mhla-gen cache`: from images or clips to a folder of latents and embeddings."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from mhla_gen.config import CacheConfig
from mhla_gen.data.arrays import ArrayImages
from mhla_gen.data.autoencoder import (
    is_video,
    latent_normalisation,
    latent_shape,
    load_autoencoder,
)
from mhla_gen.data.caching.checking import Facts, verify
from mhla_gen.data.caching.chunks import Chunk, chunks_of, is_complete, write_missing
from mhla_gen.data.caching.finish import Contents, finish
from mhla_gen.data.caching.folder import check_output_dir
from mhla_gen.data.caching.index import INDEX_NAME, Index
from mhla_gen.data.caching.latents import LatentChunks
from mhla_gen.data.caching.prompts import PromptChunks, distinct_captions
from mhla_gen.data.caching.settings import (
    Files,
    check_settings,
    chunk_size,
    content_settings,
    keep_settings,
)
from mhla_gen.data.captions import CaptionEncoder, has_call, load_caption_encoder
from mhla_gen.data.clip_files import ClipFiles, find_clips
from mhla_gen.data.clips import Clips, Placement, place, read_placements, report, write_placements
from mhla_gen.data.image_encoder import ImageEncoder, has_image_encoder, load_image_encoder
from mhla_gen.data.images import EncodedImages
from mhla_gen.data.opening import open_images
from mhla_gen.data.protocol import Examples
from mhla_gen.data.text import TextEncoder, load_text_encoder
from mhla_gen.errors import UserError
from mhla_gen.media import Decoder
from mhla_gen.outputs.locks import claimed
from mhla_gen.runtime.devices import resolve_device
from mhla_gen.runtime.processes import join_processes, on_main, shared_map

PLACEMENTS_NAME = "clips.json"
_CAPTIONS_PER_CHUNK = 256


def build_cache(config: CacheConfig, dry_run: bool = False) -> str:
    """Encode a data set, or resume where an interrupted run stopped.

    Any number of processes share the work, and the files do not depend on how many.

    Args:
        config: Settings; `output_dir` gets the cache.
        dry_run: Open everything and check that it fits together, but encode and write nothing.

    Returns:
        What was found, for the user.

    Raises:
        ValueError: If data, autoencoder and text encoder do not fit together, or a file is broken.
        OSError: If something is missing, or the folder holds another cache or other files.
    """
    resolve_device(config.device)
    state = join_processes(config.device)
    if config.verify:
        return verify(Path(config.output_dir))
    config.require_autoencoder()
    on_main(lambda: check_output_dir(config))
    files: Files = (
        find_clips(config.data, config.clips.missing_caption, config.clips.hdr == "tone_map")
        if config.data.source == "clips"
        else open_images(config.data)
    )
    # One process of a machine downloads; the others find the files.
    with state.local_main_process_first():
        vae = load_autoencoder(config.vae)
        encoder = _text_encoder(config, files)
        config, frame_encoder = _frame_encoder(config, files)
    _check_sizes(config, files, vae)
    with Decoder(config.clips.timeout, config.num_workers) as decoder:
        if dry_run:
            return _rehearse(config, files, vae, frame_encoder, decoder)
        with claimed(config.output_dir):
            on_main(lambda: check_output_dir(config))
            return _build(config, files, vae, encoder, frame_encoder, decoder)


def _build(
    config: CacheConfig,
    files: Files,
    vae: Any,
    encoder: TextEncoder | CaptionEncoder | None,
    frame_encoder: ImageEncoder | None,
    decoder: Decoder,
) -> str:
    folder, state = Path(config.output_dir), PartialState()
    digests = shared_map(files.digest, range(len(files)), "reading", "file", config.num_workers)
    settings = on_main(
        lambda: content_settings(config, files, digests, vae, encoder, frame_encoder)
    )
    on_main(lambda: check_settings(config, settings))
    examples, unreadable = _examples(config, files, decoder)
    on_main(lambda: _keep(config, settings, examples))
    captions = distinct_captions(examples.captions or ()) if encoder else None
    contents = Contents(
        examples=examples,
        latents=chunks_of("latents", examples.buckets, chunk_size(config)),
        shapes=[_latent_shape(vae, shape) for shape in examples.sample_shapes],
        captions=captions,
        prompts=chunks_of("prompts", [range(len(captions or ()))], _CAPTIONS_PER_CHUNK),
        unreadable=unreadable,
    )
    again = config.retry_quarantined
    known = on_main(lambda: _known(folder, contents.latents + contents.prompts, again))
    if encoder is not None and captions is not None:
        assert state.device is not None
        encoder.to(state.device)
        prompts = PromptChunks(captions, encoder, config.text.batch_size)
        write_missing(folder, contents.prompts, prompts.compute, "captions", "caption")
        encoder.to("cpu")
    if frame_encoder is not None:
        frame_encoder.model.to(state.device)
    with ThreadPoolExecutor(config.num_workers) as readers:
        latents = LatentChunks(
            examples=examples,
            caption_rows=_caption_rows(examples, captions),
            vae=vae.to(state.device),
            normalisation=latent_normalisation(vae),
            dtype=getattr(torch, config.dtype),
            flips=config.data.horizontal_flip,
            condition=config.clips.condition and isinstance(files, ClipFiles),
            image_encoder=frame_encoder,
            batch_size=config.batch_size,
            readers=readers,
            ahead=2 * config.num_workers,
        )
        unit = "clip" if isinstance(files, ClipFiles) else "image"
        write_missing(folder, contents.latents, latents.compute, "latents", unit, again)
    return _summary(folder, finish(config, settings, contents, known))


def _text_encoder(config: CacheConfig, files: Files) -> TextEncoder | CaptionEncoder | None:
    if config.text.path is None:
        return None
    if files.captions is None:
        raise UserError(
            "text.path is set, but the data have no column of captions called "
            f"{config.data.caption_column}"
        )
    if has_call(config.text.path):
        return load_caption_encoder(config.text)
    return load_text_encoder(config.text)


def _frame_encoder(config: CacheConfig, files: Files) -> tuple[CacheConfig, ImageEncoder | None]:
    """What embeds first frames, and the settings with its path."""
    if not (config.clips.condition and isinstance(files, ClipFiles)):
        return config, None
    if config.image_encoder.path is None:
        if not has_image_encoder(str(config.vae.path)):
            return config, None
        found = replace(config.image_encoder, path=config.vae.path)
        config = replace(config, image_encoder=found)
    return config, load_image_encoder(config.image_encoder)


def _check_sizes(config: CacheConfig, files: Files, vae: Any) -> None:
    if config.clips.condition and not is_video(vae):
        raise UserError(f"clips.condition needs a video autoencoder, found {type(vae).__name__}")
    if isinstance(files, ClipFiles):
        for bucket in config.clips.buckets:
            latent_shape(vae, *bucket)
    else:
        latent_shape(vae, 1, *files.image_shape[1:])


def _latent_shape(vae: Any, pixels: Sequence[int]) -> tuple[int, ...]:
    """Latents of `(channels, (frames,) height, width)` pixels."""
    frames = pixels[1] if len(pixels) == 4 else 1
    return latent_shape(vae, frames, *pixels[-2:])


def _examples(
    config: CacheConfig, files: Files, decoder: Decoder
) -> tuple[Examples, list[dict[str, str]]]:
    """Images as they are; videos cut into clips, as a first run has placed them."""
    if isinstance(files, ArrayImages | EncodedImages):
        return files, []
    path = Path(config.output_dir) / PLACEMENTS_NAME
    placements = on_main(lambda: read_placements(path) if path.is_file() else None)
    clips = Clips(
        files, config.clips, placements or tuple(_place_all(config, files, decoder)), decoder
    )
    if PartialState().is_main_process:
        print(report(config.clips, clips.placements))
    if not len(clips):
        raise UserError("no clip fits any bucket; see the table above")
    return clips, [{"name": p.name, "reason": p.left_out} for p in clips.placements if p.unreadable]


def _keep(config: CacheConfig, settings: dict[str, Any], examples: Examples) -> None:
    keep_settings(config, settings)
    if isinstance(examples, Clips):
        write_placements(Path(config.output_dir) / PLACEMENTS_NAME, examples.placements)


def _place_all(config: CacheConfig, files: ClipFiles, decoder: Decoder) -> list[Placement]:
    def one(index: int) -> Placement:
        return place(files, index, config.clips, decoder)

    return shared_map(one, range(len(files)), "probing", "file", config.num_workers)


def _known(folder: Path, chunks: Sequence[Chunk], again: bool) -> dict[str, Facts]:
    """Files of an earlier index that this run keeps."""
    if not (folder / INDEX_NAME).is_file():
        return {}
    files = Index.read(folder).files
    kept = [chunk.name for chunk in chunks if is_complete(folder / chunk.name, again)]
    return {name: files[name] for name in kept if name in files}


def _caption_rows(examples: Examples, captions: list[str] | None) -> list[int] | None:
    if captions is None:
        return None
    rows = {caption: row for row, caption in enumerate(captions)}
    return [rows[caption] for caption in examples.captions or ()]


def _rehearse(
    config: CacheConfig,
    files: Files,
    vae: Any,
    frame_encoder: ImageEncoder | None,
    decoder: Decoder,
) -> str:
    if isinstance(files, ClipFiles):
        table = report(config.clips, _place_all(config, files, decoder))
        frames = f", first frames by {type(frame_encoder.model).__name__}" if frame_encoder else ""
        return f"{len(files)} files\n{table}\nwould be encoded by {type(vae).__name__}{frames}"
    shape = _latent_shape(vae, files.image_shape)
    return (
        f"{len(files)} images of {len(files.class_names or ())} classes, "
        f"{list(files.image_shape)}, would be encoded by {type(vae).__name__} to latents "
        f"{list(shape)}"
    )


def _summary(folder: Path, index: Index) -> str:
    count = sum(bucket.count for bucket in index.buckets)
    size = sum(facts["bytes"] for facts in index.files.values()) / 2**30
    shapes = ", ".join(f"{bucket.count} of {list(bucket.latents)}" for bucket in index.buckets)
    line = f"{folder}: {count} samples ({shapes}), {len(index.files)} files, {size:.2f} GiB"
    if index.quarantined:
        line += f"; {index.quarantined} could not be read, see quarantine.jsonl"
    if index.warning:
        line += f"; {index.warning}"
    return line
