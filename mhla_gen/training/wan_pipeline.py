"""Pipelines that sample from a Wan in training, and the clips of previews."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from diffusers.pipelines.wan.pipeline_wan_i2v import WanImageToVideoPipeline
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from PIL import Image
from torch import Tensor

from mhla_gen.config import PreviewConfig, TextEncoderConfig, TrainConfig, WanConfig
from mhla_gen.data import TrainingData
from mhla_gen.data.caching.cached import CachedLatents
from mhla_gen.data.text import load_text_encoder
from mhla_gen.files import write_lines, write_tensors
from mhla_gen.hub import EMBEDS_NAME, PROMPTS_NAME, pipeline_index
from mhla_gen.models.frame_causal import causal_frames
from mhla_gen.models.saved_transformer import load_transformer
from mhla_gen.pipelines.clip_stream import stream_clip, streams
from mhla_gen.pipelines.noise import generator_of, sample_seed
from mhla_gen.training.task import largest_bucket, preview_pixels

_FRAME_NAME = "first_frame.png"


@dataclass(frozen=True, eq=False)
class WanParts:
    """The other parts of a pipeline than the trained transformer; loaded on demand."""

    config: TrainConfig
    wan: WanConfig
    data: TrainingData

    @cached_property
    def index(self) -> dict[str, Any]:
        """Settings of the pretrained pipeline, if there is one."""
        path = self.config.model.pretrained
        return {} if path is None else pipeline_index(path)

    @property
    def times_of_tokens(self) -> bool:
        """Whether the model is told a time for each token."""
        given = self.wan.times_of_tokens
        return bool(self.index.get("expand_timesteps")) if given is None else given

    @property
    def boundary(self) -> float | None:
        """Noise level between the two experts, if known."""
        return self.wan.boundary or self.index.get("boundary_ratio")

    def pipeline(self, model: Any) -> DiffusionPipeline:
        """The pipeline of a trained transformer, with the other expert of the pretrained one."""
        kind: Any = WanImageToVideoPipeline if self.wan.first_frame else WanPipeline
        parts = {"transformer": model}
        if self._other_expert is not None:
            parts = {self.wan.subfolder: model, other_subfolder(self.wan): self._other_expert}
        if model.config.image_dim is not None:
            encoder, processor = self._image_encoder
            parts |= {"image_encoder": encoder, "image_processor": processor}
        found = kind(
            tokenizer=self._text[0],
            text_encoder=self._text[1],
            vae=self._vae,
            scheduler=self._scheduler,
            boundary_ratio=None if self._other_expert is None else self.boundary,
            expand_timesteps=self.times_of_tokens or causal_frames(model) is not None,
            **parts,
        )
        found.set_progress_bar_config(disable=True)
        return found

    @property
    def _scheduler(self) -> UniPCMultistepScheduler:
        settings: dict[str, Any] = {
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "num_train_timesteps": 1000,
            "flow_shift": self.config.objective.shift,
        }
        return UniPCMultistepScheduler(**settings)

    @property
    def has_autoencoder(self) -> bool:
        """Whether the data have one."""
        return isinstance(self.data, CachedLatents)

    @cached_property
    def _vae(self) -> Any:
        return self.data.autoencoder() if isinstance(self.data, CachedLatents) else None

    @cached_property
    def _image_encoder(self) -> tuple[Any, Any]:
        return self.data.image_encoder() if isinstance(self.data, CachedLatents) else (None, None)

    @cached_property
    def _text(self) -> tuple[Any, Any]:
        if not (self.wan.save_text_encoder and isinstance(self.data, CachedLatents)):
            return None, None
        path = self.data.index.sources["text"]
        encoder = load_text_encoder(TextEncoderConfig(path=path))
        return encoder.tokenizer, encoder.model

    @cached_property
    def _other_expert(self) -> Any:
        if self.wan.expert is None or self.index.get("transformer_2", [None])[0] is None:
            return None
        path = str(self.config.model.pretrained)
        return load_transformer(path, other_subfolder(self.wan), torch.bfloat16)


def other_subfolder(wan: WanConfig) -> str:
    """Where the expert lies in a pipeline that is not trained."""
    return "transformer" if wan.subfolder == "transformer_2" else "transformer_2"


def sampling_of(config: TrainConfig, data: TrainingData, fps: float) -> dict[str, Any]:
    """Settings of `mhla-gen sample` for clips as most of the data are; see `Task.sampling`."""
    found = {**config.samples.of_pipeline, "fps": fps}
    if isinstance(data, CachedLatents):
        # The buckets of a cache know their pixels.
        frames, height, width = data.index.buckets[largest_bucket(data)].pixels[1:]
        found |= {"num_frames": frames, "height": height, "width": width}
    if config.mixed_precision == "bf16" and torch.cuda.is_available():
        found["dtype"] = "bfloat16"
    return found


@dataclass(frozen=True, eq=False)
class ClipSamples:
    """Makes clips with the captions, and first frames, of clips of the data; see `Task.sampler`."""

    data: Any
    empty: Tensor
    wan: WanConfig

    def __call__(self, pipeline: Any, numbers: Sequence[int], config: PreviewConfig) -> np.ndarray:
        """Clips of the size that most clips have, uint8 `[clips, frames, height, width, 3]`."""
        experts = [pipeline.transformer, pipeline.transformer_2]
        others = [e for e in experts if e is not None and e is not self._trained(pipeline)]
        device = self._trained(pipeline).device
        pipeline.vae.to(device)
        # They have no part in training, so that they stay on the CPU otherwise.
        try:
            for expert in others:
                expert.to(device)
            return np.stack([self._clip(pipeline, number, config, device) for number in numbers])
        finally:
            for expert in others:
                expert.to("cpu")

    def _trained(self, pipeline: Any) -> Any:
        return getattr(pipeline, self.wan.subfolder) or pipeline.transformer

    def _clip(
        self, pipeline: Any, number: int, config: PreviewConfig, device: torch.device
    ) -> np.ndarray:
        buckets = self.data.buckets
        largest = largest_bucket(self.data)
        item = self.data.read([buckets[largest][number % len(buckets[largest])]])
        frames, height, width = self.data.sample_shapes[largest][1:]
        options: dict[str, Any] = {
            "height": height * pipeline.vae_scale_factor_spatial,
            "width": width * pipeline.vae_scale_factor_spatial,
            "num_frames": (frames - 1) * pipeline.vae_scale_factor_temporal + 1,
        }
        options |= {
            "prompt_embeds": item["prompt_embeds"].to(device).float(),
            "negative_prompt_embeds": self.empty[None].to(device).float(),
            **config.of_pipeline,
        }
        seed = sample_seed(config.seed, number)
        if self.wan.first_frame:
            options["image"] = decoded_frame(pipeline.vae, item["mean"][:, :, :1].to(device))
        # The other expert is in bfloat16.
        mixed = device.type == "cuda" or self.wan.expert is not None
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            if streams(pipeline):
                chunks = [chunk.frames for chunk in stream_clip(pipeline, seed=seed, **options)]
                found = torch.cat(chunks).movedim(1, -1)[None].cpu().numpy()
            else:
                noise = generator_of(seed)
                given = {"generator": noise, "output_type": "np", "return_dict": False}
                found = pipeline(**options, **given)[0]
        return preview_pixels([number], found)[0]


@dataclass(frozen=True, eq=False)
class ClipExamples:
    """The caption, and first frame, of a clip of the data; see `Task.examples`."""

    data: CachedLatents
    empty: Tensor
    wan: WanConfig

    def write(self, pipeline: Any, folder: Path) -> None:
        """Write a prompt, its embedding if the pipeline has no text encoder, and its image."""
        number = self.data.buckets[largest_bucket(self.data)][0]
        item = self.data.read([number])
        example = {"prompt": self.data.caption(number) or ""}
        folder.mkdir(parents=True)
        if pipeline.text_encoder is None:
            embeds = {"prompt_embeds": item["prompt_embeds"].float()}
            embeds["negative_prompt_embeds"] = self.empty[None].float()
            write_tensors(folder / EMBEDS_NAME, embeds)
        if self.wan.first_frame:
            example["image"] = _FRAME_NAME
            latents = item["mean"][:, :, :1].to(pipeline.vae.device)
            decoded_frame(pipeline.vae, latents).save(folder / _FRAME_NAME)
        write_lines(folder / PROMPTS_NAME, [example])


@torch.no_grad()
def decoded_frame(vae: Any, latents: Tensor) -> Image.Image:
    """The picture that one normalised latent frame `[1, channels, 1, height, width]` stands for."""
    mean, std = (
        torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    pixels = vae.decode((latents * std + mean).to(vae.dtype)).sample[0, :, 0].float()
    array = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
    return Image.fromarray(array.cpu().numpy())
