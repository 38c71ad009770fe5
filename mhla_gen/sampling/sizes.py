"""Sizes of a pipeline's samples: those that it makes by itself, and those that it can make."""

import inspect
from collections.abc import Mapping
from typing import Any

from mhla_gen.errors import UserError


def resolved_sizes(pipeline: Any, sizes: Mapping[str, int | None]) -> dict[str, int]:
    """The arguments that ask a pipeline for samples of some size.

    Args:
        pipeline: Of diffusers, for images or videos from prompts.
        sizes: height, width and num_frames; None takes the pipeline's own.

    Raises:
        ValueError: If it takes no such argument, makes no such size, or does not say its own.
    """
    known = inspect.signature(pipeline.__call__).parameters
    name, found = type(pipeline).__name__, {}
    for key, value in sizes.items():
        key = "frames" if key == "num_frames" and "frames" in known else key
        if key not in known:
            if value is not None:
                raise UserError(f"{name} takes no {key}; leave it out")
            continue
        found[key] = value or known[key].default or _own_size(pipeline, key)
    _check_multiples(pipeline, found)
    return found


def shape_of(sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a sample of `resolved_sizes`: (frames,) height, width, channels."""
    frames = [sizes[key] for key in ("num_frames", "frames") if key in sizes]
    return (*frames, sizes["height"], sizes["width"], 3)


def _own_size(pipeline: Any, key: str) -> int:
    """What the pipeline takes by itself where its signature has None."""
    config = pipeline.transformer.config
    if key in ("height", "width"):
        places = [
            (pipeline, f"default_{key}", None),  # Mochi, in pixels
            (pipeline, "default_sample_size", "vae_scale_factor"),  # Flux, Qwen-Image, …
            (config, "sample_size", "vae_scale_factor"),  # PixArt
            (config, f"sample_{key}", "vae_scale_factor_spatial"),  # CogVideoX
        ]
    else:
        places = [(config, "sample_frames", None)]  # CogVideoX
    for owner, name, scale in places:
        if size := getattr(owner, name, None):
            return size * (getattr(pipeline, scale) if scale else 1)
    raise UserError(f"{type(pipeline).__name__} does not say its own {key}; set {key}")


def _check_multiples(pipeline: Any, sizes: Mapping[str, int]) -> None:
    # Pipelines round with a warning; here the number asked for is the number made.
    spatial = getattr(pipeline, "vae_scale_factor_spatial", None)
    patch = getattr(pipeline.transformer.config, "patch_size", 1)
    multiple = (spatial or 1) * (patch if isinstance(patch, int) else patch[-1])
    temporal = getattr(pipeline, "vae_scale_factor_temporal", 1)
    for key, value in sizes.items():
        if "frames" not in key and value % multiple:
            raise UserError(f"{key} must be a multiple of {multiple}, found {value}")
        if "frames" in key and (value - 1) % temporal:
            raise UserError(f"{key} must be 1 + a multiple of {temporal}, found {value}")
