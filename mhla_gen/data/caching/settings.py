"""What determines the content of a cache: stored beside it, and refused if it differs."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mhla_gen.config import CacheConfig, TextEncoderConfig, save_config
from mhla_gen.data import autoencoder, captions, image_encoder, text
from mhla_gen.data.arrays import ArrayImages
from mhla_gen.data.caching.index import SETTINGS_NAME
from mhla_gen.data.clip_files import ClipFiles
from mhla_gen.data.images import EncodedImages
from mhla_gen.errors import OccupiedError
from mhla_gen.files import write_json
from mhla_gen.files.digests import settings_digest
from mhla_gen.files.saved import read_json
from mhla_gen.media.pictures import READING
from mhla_gen.outputs.folders import CONFIG_NAME, differing_values

_REMEDY = "build the cache again in another output_dir"
_CHUNK_SIZES = {"clips": 8}
_IMAGES_PER_CHUNK = 512

Files = ArrayImages | EncodedImages | ClipFiles


def chunk_size(config: CacheConfig) -> int:
    """Samples per file."""
    return config.chunk_size or _CHUNK_SIZES.get(config.data.source, _IMAGES_PER_CHUNK)


def content_settings(
    config: CacheConfig,
    files: Files,
    digests: Sequence[str],
    vae: Any,
    encoder: Any,
    frame_encoder: Any,
) -> dict[str, Any]:
    """Plain values that determine a cache, except for rounding by device and batch size.

    Args:
        config: Settings.
        files: What is encoded.
        digests: Of the content of each.
        vae: Encodes them.
        encoder: Embeds their captions, or None.
        frame_encoder: Embeds first frames, or None.
    """
    data: dict[str, Any] = {"files": len(files), "content": _digest(digests)}
    if not isinstance(files, ArrayImages):
        data["reading_rules"] = READING
    if not isinstance(files, ClipFiles):
        labels = None if files.labels is None else files.labels.tolist()
        data |= {"shape": files.image_shape, "class_names": files.class_names}
        data["labels"] = _digest(labels)
    if encoder is not None:
        data["captions"] = _digest(files.captions)
    clips = asdict(config.clips) if isinstance(files, ClipFiles) else {}
    settings = {
        "data": data,
        "clips": {key: value for key, value in clips.items() if key != "timeout"},
        "vae": autoencoder.identity(vae, config.vae),
        "normalisation": autoencoder.latent_normalisation(vae)._asdict(),
        "text": None if encoder is None else _identity(encoder, config.text),
        "image_encoder": None
        if frame_encoder is None
        else image_encoder.identity(frame_encoder, config.image_encoder),
        "dtype": config.dtype,
        "flips": config.data.horizontal_flip,
        "chunk_size": chunk_size(config),
    }
    return json.loads(json.dumps(settings))


def _identity(encoder: Any, config: TextEncoderConfig) -> dict[str, Any]:
    if isinstance(encoder, captions.CaptionEncoder):
        return captions.identity(encoder, config)
    return text.identity(encoder, config)


def check_settings(config: CacheConfig, settings: dict[str, Any]) -> None:
    """Compare with the settings of an earlier run, if there was one.

    Raises:
        FileExistsError: If the folder was made of other data or by other models, named.
    """
    folder = Path(config.output_dir)
    path = folder / SETTINGS_NAME
    changes = differing_values(read_json(path, _REMEDY), settings) if path.is_file() else []
    if changes:
        raise OccupiedError(
            f"output_dir {folder} was made from other data or by other models "
            f"({'; '.join(changes)}); choose another output_dir or move it away"
        )


def keep_settings(config: CacheConfig, settings: dict[str, Any]) -> None:
    """Write the settings, unless an earlier run did."""
    folder = Path(config.output_dir)
    if not (folder / SETTINGS_NAME).is_file():
        save_config(config, folder / CONFIG_NAME)
        write_json(folder / SETTINGS_NAME, settings, indent=1)


def _digest(values: Any) -> str | None:
    return None if values is None else settings_digest({"values": list(values)})[:32]
