"""Autoencoders of diffusers: load one by its folder or name, encode, normalise latents."""

from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor

from mhla_gen.config import AutoencoderConfig
from mhla_gen.errors import UserError
from mhla_gen.files.digests import settings_digest, weights_digest
from mhla_gen.files.saved import naming_damage
from mhla_gen.hub import locate_part

IMAGE_AUTOENCODERS = (
    "AutoencoderKL",
    "AutoencoderDC",
    "AutoencoderTiny",
    "AutoencoderKLFlux2",
    "AutoencoderKLQwenImage",
)
VIDEO_AUTOENCODERS = (
    "AutoencoderKLWan",
    "AutoencoderKLLTXVideo",
    "AutoencoderKLLTX2Video",
    "AutoencoderKLCogVideoX",
    "AutoencoderKLHunyuanVideo",
    "AutoencoderKLHunyuanVideo15",
    "AutoencoderKLMochi",
)


class Normalisation(NamedTuple):
    """What makes latents nearly standard: `(latents - mean) / std`, channel by channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def apply(self, mean: Tensor, std: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Normalise a posterior `[batch, channels, …]`; its std has no offset."""
        shape = (1, -1) + (1,) * (mean.ndim - 2)
        offset, scale = (torch.tensor(v, device=mean.device).view(shape) for v in self)
        return (mean - offset) / scale, None if std is None else std / scale


def load_autoencoder(config: AutoencoderConfig) -> Any:
    """An autoencoder of one of the classes above, in evaluation mode.

    Args:
        config: `path` is the folder or hub name of an autoencoder, or of a pipeline that has one,
            or a run with such a pipeline.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: If it is no autoencoder, or of another class.
    """
    path, subfolder = locate_part(str(config.path), "vae")
    try:
        values: Any = diffusers.AutoencoderKL.load_config(path, **subfolder)
    except OSError as error:
        line = str(error).splitlines()[0]
        raise UserError(
            f"vae.path {path} is not a diffusers autoencoder, or cannot be reached: {line}"
        ) from error
    name = values.get("_class_name")
    known = IMAGE_AUTOENCODERS + VIDEO_AUTOENCODERS
    if name not in known:
        raise UserError(f"vae.path {path} is a {name}; supported are {', '.join(known)}")
    dtype = getattr(torch, config.dtype)
    with naming_damage(path):
        vae = getattr(diffusers, name).from_pretrained(path, torch_dtype=dtype, **subfolder)
    if config.tiling:
        if not hasattr(vae, "enable_tiling"):
            raise UserError(f"vae.tiling=true, but {name} has no tiling")
        vae.enable_tiling()
    return vae.eval().requires_grad_(False)


def identity(vae: Any, config: AutoencoderConfig) -> dict[str, Any]:
    """What determines the latents of an autoencoder; plain values for a fingerprint."""
    plain = {k: v for k, v in vae.config.items() if not k.startswith("_")}
    return {
        "class": type(vae).__name__,
        "config": settings_digest(plain)[:16],
        "weights": weights_digest(vae, getattr(torch, config.dtype))[:32],
        "dtype": config.dtype,
        "tiling": config.tiling,
    }


def is_video(vae: Any) -> bool:
    """Whether it takes `[batch, channels, frames, height, width]`."""
    return type(vae).__name__ in VIDEO_AUTOENCODERS


def compression(vae: Any) -> tuple[int, int]:
    """Frames and pixels per latent along time and along each side."""
    if hasattr(vae, "spatial_compression_ratio"):
        temporal = vae.config.get("scale_factor_temporal") if is_video(vae) else 1
        return temporal or vae.temporal_compression_ratio, vae.spatial_compression_ratio
    blocks = vae.config.get("block_out_channels") or vae.config.encoder_block_out_channels
    # Flux 2 takes squares of four latents as one.
    spatial = 2 ** (len(blocks) - 1 + (type(vae).__name__ == "AutoencoderKLFlux2"))
    return vae.config.get("temporal_compression_ratio") or 1, spatial


def latent_shape(vae: Any, frames: int, height: int, width: int) -> tuple[int, ...]:
    """Shape of the latents of one image or clip, `[channels, (frames,) height, width]`.

    Raises:
        ValueError: If the autoencoder does not take this size.
    """
    temporal, spatial = compression(vae)
    if height % spatial or width % spatial:
        raise UserError(
            f"{type(vae).__name__} takes sizes that are multiples of {spatial}, "
            f"found {height} × {width}"
        )
    if (frames - 1) % temporal:
        raise UserError(
            f"{type(vae).__name__} takes 1 + a multiple of {temporal} frames, found {frames}"
        )
    if frames > 1 and not is_video(vae):
        raise UserError(f"{type(vae).__name__} encodes images, found clips of {frames} frames")
    time = ((frames - 1) // temporal + 1,) if is_video(vae) else ()
    return num_channels(vae), *time, height // spatial, width // spatial


def num_channels(vae: Any) -> int:
    """Channels of the latents."""
    if type(vae).__name__ == "AutoencoderKLFlux2":
        return 4 * vae.config.latent_channels
    return vae.config.get("z_dim") or vae.config.latent_channels


def latent_normalisation(vae: Any) -> Normalisation:
    """How the pipelines of a class normalise its latents.

    AutoencoderKL: `(z - shift_factor) * scaling_factor`, or by `latents_mean` and `latents_std`
    where its config has them; AutoencoderDC: `z * scaling_factor`; AutoencoderTiny: not at all;
    AutoencoderKLWan and QwenImage: `(z - latents_mean) / latents_std`; AutoencoderKLLTXVideo and
    LTX2Video: by the buffers of these names, times `scaling_factor`; AutoencoderKLFlux2: by its
    batch norm. The others: as AutoencoderKL.

    Source:
        diffusers 0.42, `encode` and `decode` sides of the pipelines that use each class.
    """
    config, channels = vae.config, num_channels(vae)
    if type(vae).__name__ == "AutoencoderTiny":
        return Normalisation((0.0,) * channels, (1.0,) * channels)
    if type(vae).__name__ == "AutoencoderKLFlux2":
        std = (vae.bn.running_var.float() + config.batch_norm_eps).sqrt()
        return Normalisation(tuple(vae.bn.running_mean.tolist()), tuple(std.tolist()))
    if type(vae).__name__ in ("AutoencoderKLWan", "AutoencoderKLQwenImage"):
        return Normalisation(tuple(config.latents_mean), tuple(config.latents_std))
    if type(vae).__name__ in ("AutoencoderKLLTXVideo", "AutoencoderKLLTX2Video"):
        means, stds = vae.latents_mean.float().tolist(), vae.latents_std.float().tolist()
    else:
        means = config.get("latents_mean") or [config.get("shift_factor") or 0.0] * channels
        stds = config.get("latents_std") or [1.0] * channels
    return Normalisation(tuple(means), tuple(s / config.scaling_factor for s in stds))


@torch.inference_mode()
def encode(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
    """Mean and standard deviation of the posterior, float32, not normalised.

    Args:
        vae: The autoencoder.
        pixels: In [-1, 1], `[batch, 3, (frames,) height, width]`, on its device.

    Returns:
        `[batch, channels, (frames,) height, width]`, twice; no std where encoding is deterministic.
    """
    name = type(vae).__name__
    # Qwen-Image's is one of videos, and pictures are of one frame.
    frames = name == "AutoencoderKLQwenImage"
    found = vae.encode((pixels.unsqueeze(2) if frames else pixels).to(vae.dtype))
    if not hasattr(found, "latent_dist"):
        return (found.latents if hasattr(found, "latents") else found.latent).float(), None
    both = found.latent_dist.mean.float(), found.latent_dist.std.float()
    if frames:
        return both[0].squeeze(2), both[1].squeeze(2)
    if name == "AutoencoderKLFlux2":
        return _patchified(both[0]), _patchified(both[1])
    return both


def _patchified(latents: Tensor) -> Tensor:
    from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline

    return Flux2Pipeline._patchify_latents(latents)
