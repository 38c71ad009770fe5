"""Clips of any length, sampled chunk by chunk from a Wan with a frame-causal transformer."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, unpatchify
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from mhla_gen.errors import UserError
from mhla_gen.models import ClipState, FrameCausalMHLA
from mhla_gen.pipelines.noise import chunk_seed, generator_of
from mhla_gen.runtime.devices import send, without_onednn


class Chunk(NamedTuple):
    """A finished chunk of a clip."""

    latents: Tensor
    """Clean, normalised latents, float32 `[1, channels, frames, height, width]`."""
    frames: Tensor
    """Pixels in [0, 1], float32 `[frames, 3, height, width]`."""


@torch.no_grad()
def stream_clip(
    pipeline: Any,
    *,
    prompt: str | None = None,
    negative_prompt: str | None = None,
    prompt_embeds: Tensor | None = None,
    negative_prompt_embeds: Tensor | None = None,
    height: int = 480,
    width: int = 832,
    num_frames: int = 81,
    num_inference_steps: int = 50,
    guidance_scale: float = 5.0,
    seed: int = 0,
    max_sequence_length: int = 512,
    finished: Sequence[Tensor] = (),
    on_step: Callable[[int], None] | None = None,
) -> Iterator[Chunk]:
    """Sample a clip, one chunk of latent frames after the other.

    While a chunk is denoised, it attends to the finished chunks, which the model has read without
    noise and keeps as summaries. So every chunk takes the same time and memory, whatever the length
    of the clip. The noise of a chunk depends only on the seed and the chunk's index.

    Args:
        pipeline: A `WanPipeline` with a transformer converted with `MHLAConfig(causal_frames=…)`.
        prompt: What to show.
        negative_prompt: What not to show, with guidance.
        prompt_embeds: `[1, tokens, text_dim]`, instead of a text encoder.
        negative_prompt_embeds: Like `prompt_embeds`.
        height: Height in pixels.
        width: Width in pixels.
        num_frames: 1 + any multiple of 4, the autoencoder's temporal compression.
        num_inference_steps: Denoising steps per chunk.
        guidance_scale: Classifier-free guidance; 1 disables it.
        seed: Seed of all noise.
        max_sequence_length: Number of tokens that prompts are padded to.
        finished: Latents of the first chunks of a clip with this seed, from an earlier call; they
            are read and decoded but not denoised again.
        on_step: Called with the number of denoising steps done so far in all chunks.

    Yields:
        The chunks, as they are finished.

    Raises:
        ValueError: If pipeline and sizes do not fit; raised when the first chunk is requested.
    """
    lengths = chunk_lengths(pipeline, num_frames)
    model, device = pipeline.transformer, pipeline._execution_device
    guided = guidance_scale > 1
    asked = {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "prompt_embeds": prompt_embeds,
        "negative_prompt_embeds": negative_prompt_embeds,
    }
    _check_one_clip(pipeline, asked, height, width, num_inference_steps)
    texts = pipeline.encode_prompt(
        **asked,
        do_classifier_free_guidance=guided,
        max_sequence_length=max_sequence_length,
        device=device,
    )
    texts = [text.to(device, model.dtype) for text in texts[: 1 + guided]]
    predict = _Prediction(model, texts, guidance_scale)
    decode = FrameDecoder(pipeline)
    sides = (side // pipeline.vae_scale_factor_spatial for side in (height, width))
    shape = (1, model.config.in_channels, *sides)
    steps = itertools.count(1)

    def count_step() -> None:
        if on_step is not None:
            on_step(next(steps))

    for number, frames in enumerate(lengths):
        if number < len(finished):
            latents = finished[number].to(device)
        else:
            noise = generator_of(chunk_seed(seed, number))
            latents = torch.randn(*shape[:2], frames, *shape[2:], generator=noise)
            latents = send(latents, device)
            latents = _denoised(pipeline, predict, latents, num_inference_steps, count_step)
        if number + 1 < len(lengths):
            predict(latents, torch.zeros(1, device=device), append=True)
        yield Chunk(latents, decode(latents))
    pipeline.maybe_free_model_hooks()


def _check_one_clip(
    pipeline: Any, asked: dict[str, Any], height: int, width: int, num_inference_steps: int
) -> None:
    """Raise unless texts are those of one clip, and its size is made by latents and patches."""
    multiple = pipeline.vae_scale_factor_spatial * pipeline.transformer.config.patch_size[-1]
    for name, side in (("height", height), ("width", width)):
        if side < 1 or side % multiple:
            raise UserError(f"{name} must be a multiple of {multiple}, found {side}")
    if num_inference_steps < 1:
        raise UserError(f"num_inference_steps must be at least 1, found {num_inference_steps}")
    pipeline.check_inputs(**asked, height=height, width=width)
    for name, value in asked.items():
        if value is not None and not isinstance(value, str) and len(value) != 1:
            raise UserError(f"{name} must be of one clip, found {len(value)}; call once for each")


class _Prediction:
    """What the model predicts of a clip's next chunk, guided unless there is only one text.

    Text changes what the model remembers of finished chunks, so that each branch of guidance
    remembers for itself.

    Args:
        model: A frame-causal transformer.
        texts: Embeddings `[1, tokens, text_dim]` of the prompt, and with guidance of the negative
            prompt, on the model's device.
        guidance_scale: Of classifier-free guidance.
    """

    def __init__(self, model: Any, texts: Sequence[Tensor], guidance_scale: float):
        self.dtype, self.guidance_scale = model.dtype, guidance_scale
        self._branches = [(ClipState(model), text) for text in texts]

    def __call__(self, latents: Tensor, timestep: Tensor, append: bool = False) -> Tensor:
        """The prediction, like `latents`; with `append`, the chunk is remembered as finished."""
        found = [
            state(latents.to(self.dtype), timestep, encoder_hidden_states=text, append=append)
            for state, text in self._branches
        ]
        with_text, without = found[0], found[-1]
        if len(found) == 1:
            return with_text
        return without + self.guidance_scale * (with_text - without)


def _denoised(
    pipeline: Any,
    predict: _Prediction,
    latents: Tensor,
    num_inference_steps: int,
    on_step: Callable[[], None],
) -> Tensor:
    """The chunk that noise `[1, channels, frames, height, width]` becomes."""
    scheduler = pipeline.scheduler
    # Also forgets what a multistep scheduler kept of the chunk before.
    scheduler.set_timesteps(num_inference_steps, device=latents.device)
    scheduler.set_begin_index(0)
    for timestep in scheduler.timesteps:
        velocity = predict(latents, timestep.expand(1))
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        on_step()
    return latents


def streams(pipeline: Any) -> bool:
    """Whether a pipeline has a frame-causal transformer."""
    models = (getattr(pipeline, name, None) for name in ("transformer", "transformer_2"))
    return any(isinstance(m, FrameCausalMHLA) for model in models if model for m in model.modules())


def chunk_lengths(pipeline: Any, num_frames: int) -> list[int]:
    """Number of latent frames in each chunk of a clip.

    Raises:
        ValueError: If the pipeline cannot sample chunk by chunk, or not this number of frames.
    """
    name = type(pipeline).__name__
    if not isinstance(pipeline, WanPipeline) or not isinstance(pipeline.vae, AutoencoderKLWan):
        raise UserError(
            "chunk by chunk needs a WanPipeline with an AutoencoderKLWan, found "
            f"{name} with {type(getattr(pipeline, 'vae', None)).__name__}"
        )
    if pipeline.transformer is None or pipeline.transformer_2 is not None:
        raise UserError(
            f"chunk by chunk needs a {name} with one transformer: finished chunks are read clean, "
            "which experts for parts of the noise levels have not learned"
        )
    if pipeline.vae.use_tiling:
        raise UserError("tiles of frames are decoded as whole clips; set vae_tiling=false")
    if not streams(pipeline):
        raise UserError("the transformer is not causal over frames; see MHLAConfig.causal_frames")
    temporal = pipeline.vae_scale_factor_temporal
    if num_frames < 1 or (num_frames - 1) % temporal:
        raise UserError(f"num_frames must be 1 + a multiple of {temporal}, found {num_frames}")
    chunk = pipeline.transformer.mhla_config.causal_frames
    latent_frames = 1 + (num_frames - 1) // temporal
    return [min(chunk, latent_frames - first) for first in range(0, latent_frames, chunk)]


class FrameDecoder:
    """Wan's decoder for latents that arrive in parts.

    It decodes one latent frame at a time and caches the last frames for its causal convolutions,
    like diffusers within a call; here the cache is kept between calls.

    Args:
        pipeline: Pipeline with the autoencoder.
    """

    def __init__(self, pipeline: Any):
        self.pipeline = pipeline
        self._cache: list[Any] | None = None

    def __call__(self, latents: Tensor) -> Tensor:
        """Pixels in [0, 1], `[frames, 3, height, width]`, of the next normalised latents."""
        vae = self.pipeline.vae
        mean, std = (
            torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        pixels = self._decoded(vae, latents * std + mean)
        return self.pipeline.video_processor.postprocess_video(pixels, output_type="pt")[0].float()

    def _decoded(self, vae: Any, latents: Tensor) -> Tensor:
        first = self._cache is None
        if self._cache is None:
            vae.clear_cache()
            self._cache = list(vae._feat_map)
        with without_onednn():
            pixels = _decode(vae, latents, self._cache, first)
        if vae.config.patch_size is not None:
            pixels = unpatchify(pixels, patch_size=vae.config.patch_size)
        return pixels.clamp(-1, 1)


# What an offloaded autoencoder needs around calls of its parts.
@apply_forward_hook
def _decode(vae: Any, latents: Tensor, cache: list[Any], first: bool) -> Tensor:
    hidden = vae.post_quant_conv(latents.to(vae.dtype))
    parts = []
    for number, frame in enumerate(hidden.split(1, dim=2)):
        begins = first and number == 0
        parts.append(vae.decoder(frame, feat_cache=cache, feat_idx=[0], first_chunk=begins))
    return torch.cat(parts, dim=2)
