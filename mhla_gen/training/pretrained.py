"""Start from a saved model: the right class, the chosen attention, the classes of the data."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import nn

from mhla_gen.config import (
    AttentionConfig,
    AutoencoderConfig,
    ImageEncoderConfig,
    LinformerConfig,
    ModelConfig,
)
from mhla_gen.data.autoencoder import load_autoencoder
from mhla_gen.data.caching.cached import CachedLatents
from mhla_gen.data.image_encoder import load_image_encoder
from mhla_gen.errors import UserError
from mhla_gen.hub import pipeline_index
from mhla_gen.models import inject
from mhla_gen.models.families import family_of
from mhla_gen.models.saved_transformer import load_transformer
from mhla_gen.models.short import unmentioned
from mhla_gen.models.transformer import MHLATransformerMixin
from mhla_gen.outputs.folders import differences


def load_pretrained(config: ModelConfig, subfolder: str = "transformer") -> Any:
    """The model of `config.pretrained`, float32, with the chosen attention.

    Args:
        config: What to load.
        subfolder: Which transformer of a pipeline.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it has other MHLA layers than the config says.
    """
    model = load_transformer(str(config.pretrained), subfolder)
    if config.attention == "softmax":
        if isinstance(model, MHLATransformerMixin):
            raise UserError(
                f"{config.pretrained} has MHLA layers; set model.attention=mhla, "
                "or save it once after mhla_gen.restore(model)"
            )
        return model
    asked = attention_settings(config, family_of(model).rank)
    if not isinstance(model, MHLATransformerMixin):
        with unmentioned():
            return inject(model, asked)
    found = model.mhla_config
    name = "linformer" if isinstance(found, LinformerConfig) else "mhla"
    if type(asked) is not type(found):
        raise UserError(
            f"{config.pretrained} has layers of {name}; set model.attention={name}, found "
            f"{config.attention}"
        )
    changes = differences(found, asked, ("implementation", "exact_start"))
    if asked not in (type(found)(), found) and changes:
        raise UserError(
            f"{config.pretrained} has {name} layers already, with other settings "
            f"(model.{name}: {'; '.join(changes)}); leave model.{name} out to keep them"
        )
    return model


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


def attention_settings(config: ModelConfig, rank: int = 2) -> AttentionConfig:
    """Settings of the layers; linear attention has one block along each of `rank` axes."""
    if config.attention == "linformer":
        return config.linformer
    if config.attention == "gated_softmax":
        return config.mhla.softmax()
    if config.attention == "linear":
        return replace(config.mhla, layout=(1,) * rank)
    return config.mhla


def pretrained_dit(
    config: ModelConfig, sample_shape: tuple[int, ...], num_classes: int, out_channels: int
) -> DiTTransformer2DModel:
    """A pretrained DiT, checked against the data.

    Args:
        config: What to load.
        sample_shape: `(channels, height, width)` of the data.
        num_classes: Classes of the data.
        out_channels: Channels that the objective needs.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is another model, or of other sizes; the differences are named.
    """
    model = load_pretrained(config)
    if not isinstance(model, DiTTransformer2DModel):
        raise UserError(
            f"{config.pretrained} is a {type(model).__name__}, but class labels need a DiT"
        )
    if config.new_classes:
        replace_classes(model, num_classes)
    found: Any = model.config
    wanted = {
        "in_channels": (sample_shape[0], "the channels of the data"),
        "sample_size": (sample_shape[-1], "the side of the data"),
        "out_channels": (out_channels, "the channels that the objective needs"),
        "num_embeds_ada_norm": (
            num_classes,
            "the classes of the data: train it with model.new_classes=true (a teacher beforehand, "
            "with model.attention=softmax)",
        ),
    }
    sizes = {**found, "out_channels": found.out_channels or found.in_channels}
    wrong = [
        f"{name} is {sizes[name]}, but {value} is {what}"
        for name, (value, what) in wanted.items()
        if sizes[name] != value
    ]
    if wrong:
        raise UserError(f"{config.pretrained} does not fit: {'; '.join(wrong)}")
    return model


@torch.no_grad()
def replace_classes(model: Any, num_classes: int) -> None:
    """Give a DiT labels for other classes, in place; each starts as the null class."""
    old_null = model.config.num_embeds_ada_norm
    for block in model.transformer_blocks:
        embedder = block.norm1.emb.class_embedder
        null = embedder.embedding_table.weight[old_null]
        table = nn.Embedding(num_classes + 1, len(null), device=null.device, dtype=null.dtype)
        table.weight.copy_(null.expand_as(table.weight))
        embedder.embedding_table, embedder.num_classes = table, num_classes
    model.register_to_config(num_embeds_ada_norm=num_classes)
