"""Whether a cache fits a pretrained pipeline."""

from pathlib import Path

from mhla_gen.config import AutoencoderConfig, ImageEncoderConfig
from mhla_gen.data.autoencoder import load_autoencoder
from mhla_gen.data.caching.cached import CachedLatents
from mhla_gen.data.image_encoder import load_image_encoder
from mhla_gen.errors import UserError
from mhla_gen.hub import pipeline_index


def require_pipeline(cache: CachedLatents, path: str) -> None:
    """Raise unless a pretrained pipeline's autoencoder and image encoder made a cache.

    Args:
        cache: What a model is to be trained on.
        path: The pretrained model, by folder or hub name; one that is no pipeline, or has none of
            them, fits any cache.

    Raises:
        ValueError: If others made it, or the pipeline's cannot be loaded.
    """
    parts = pipeline_index(path)
    if not parts:
        return
    place = str(Path(path).resolve()) if Path(path).exists() else path
    settings, sources = cache.index.settings, cache.index.sources
    try:
        if place != sources["vae"] and any(parts.get("vae") or ()):
            dtype = settings["vae"]["dtype"]
            cache.require_autoencoder(load_autoencoder(AutoencoderConfig(path=path, dtype=dtype)))
        embeds = cache.has_image_embeds and any(parts.get("image_encoder") or ())
        if embeds and place != sources["image_encoder"]:
            config = ImageEncoderConfig(path=path, dtype=settings["image_encoder"]["dtype"])
            cache.require_image_encoder(load_image_encoder(config))
    except ValueError as error:
        raise UserError(f"model.pretrained {path} does not fit data.path: {error}") from error
