"""Whether a cache fits a pretrained pipeline."""

from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from mhla_gen.config import AutoencoderConfig
from mhla_gen.data.autoencoder import load_autoencoder
from mhla_gen.data.caching.cached import CachedLatents
from mhla_gen.hub import is_pipeline


def require_pipeline(cache: CachedLatents, path: str) -> None:
    """Raise unless the autoencoder of a pretrained pipeline made the latents of a cache.

    Args:
        cache: What a model is to be trained on.
        path: The pretrained model, by folder or hub name; one that is no pipeline, or has no
            autoencoder, fits any cache.

    Raises:
        ValueError: If another autoencoder made them, or the pipeline's cannot be loaded.
    """
    place = str(Path(path).resolve()) if Path(path).exists() else path
    if place == cache.index.sources["vae"] or not is_pipeline(path):
        return
    parts: Any = DiffusionPipeline.load_config(path)
    if not any(parts.get("vae") or ()):
        return
    vae = load_autoencoder(AutoencoderConfig(path=path, dtype=cache.index.settings["vae"]["dtype"]))
    try:
        cache.require_autoencoder(vae)
    except ValueError as error:
        raise ValueError(f"model.pretrained {path} does not fit data.path: {error}") from error
