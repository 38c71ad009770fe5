"""Pipelines that sample from a transformer in training, and what previews show."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from mhla_gen.calls import Call
from mhla_gen.config import PreviewConfig, TrainConfig, TransformerConfig
from mhla_gen.data.caching.cached import CachedLatents
from mhla_gen.data.captions import load_text_parts
from mhla_gen.files import write_lines, write_tensors
from mhla_gen.hub import EMBEDS_NAME, PROMPTS_NAME, pipeline_index
from mhla_gen.pipelines.noise import generator_of, sample_seed
from mhla_gen.training.task import largest_bucket, preview_pixels
from mhla_gen.training.transformer_conditions import names_of


@dataclass(frozen=True, eq=False)
class TransformerParts:
    """The other parts of a pipeline than the trained transformer; loaded on demand."""

    config: TrainConfig
    given: TransformerConfig
    data: Any
    """What it learns from; a cache knows its autoencoder."""
    kind: type[Call]
    """How the transformer is called."""

    def call(self, model: Any) -> Call:
        """The call of the transformer in training."""
        parts = {"vae": self.vae, "scheduler": self.scheduler}
        return self.kind(self.kind.assemble(model, **parts), self.given.guidance, self.fps)

    def pipeline(self, model: Any) -> DiffusionPipeline:
        """The pipeline of a trained transformer."""
        parts = {"vae": self.vae, "scheduler": self.scheduler, **self._text}
        found = self.kind.assemble(model, **parts)
        found.set_progress_bar_config(disable=True)
        return found

    @property
    def has_autoencoder(self) -> bool:
        """Whether the data have one."""
        return hasattr(self.data, "autoencoder")

    @property
    def fps(self) -> float | None:
        """Frames per second of clips, if the data know."""
        return getattr(self.data, "fps", None)

    @cached_property
    def scheduler(self) -> Any:
        """That of the pretrained pipeline, or one with the shift of the objective."""
        path = self.config.model.pretrained
        _, name = (pipeline_index(path) if path else {}).get("scheduler") or (None, None)
        if name is not None:
            return getattr(diffusers, name).from_pretrained(path, subfolder="scheduler")
        made, settings = self.kind.scheduler
        shift = {
            "FlowMatchEulerDiscreteScheduler": "shift",
            "UniPCMultistepScheduler": "flow_shift",
        }
        key = shift.get(made.__name__)
        return made(**settings, **({key: self.config.objective.shift} if key else {}))

    @cached_property
    def vae(self) -> Any:
        """The autoencoder of the data."""
        return self.data.autoencoder() if self.has_autoencoder else None

    @cached_property
    def _text(self) -> dict[str, Any]:
        if not (self.given.save_text_encoder and isinstance(self.data, CachedLatents)):
            return {}
        return load_text_parts(self.data.index.sources["text"])

    def sampling(self, call: Call) -> dict[str, Any]:
        """Settings of `mhla-gen sample` for samples as most of the data are."""
        shape = self.data.sample_shapes[largest_bucket(self.data)]
        found = self.options(call, self.config.samples, shape)
        if call.rank == 3:
            found["fps"] = self.fps or 16.0
        found.pop("use_resolution_binning", None)
        if "frames" in found:
            found["num_frames"] = found.pop("frames")
        if self.config.mixed_precision == "bf16" and torch.cuda.is_available():
            found["dtype"] = "bfloat16"
        return found

    @staticmethod
    def options(call: Call, config: PreviewConfig, shape: Sequence[int]) -> dict[str, Any]:
        """What a pipeline is called with besides texts, for latents of this shape."""
        names = ("height", "width") if call.rank == 2 else ("num_frames", "height", "width")
        sizes = dict(zip(names, call.sizes(torch.empty(1, *shape, device="meta")), strict=True))
        # Some pipelines draw at the nearest of a list of sizes, and scale what they drew.
        asked = {**sizes, **config.of_pipeline, "use_resolution_binning": False}
        if call.takes("frames"):
            asked["frames"] = sizes["num_frames"]
        return {name: value for name, value in asked.items() if call.takes(name)}


@dataclass(frozen=True, eq=False)
class CaptionSamples:
    """Makes images or clips with the captions of the data; see `Task.sampler`."""

    data: Any
    empty: Mapping[str, Tensor]
    parts: TransformerParts

    def __call__(self, pipeline: Any, numbers: Sequence[int], config: PreviewConfig) -> np.ndarray:
        """Samples of the size that most of the data have, uint8, channels last."""
        # Without text encoders, which would say on which device it runs.
        call = self.parts.call(pipeline.transformer)
        call.pipe.set_progress_bar_config(disable=True)
        device = pipeline.transformer.device
        call.pipe.vae.to(device)
        return np.stack([self._sample(call, number, config, device) for number in numbers])

    def _sample(
        self, call: Call, number: int, config: PreviewConfig, device: torch.device
    ) -> np.ndarray:
        largest = largest_bucket(self.data)
        bucket, shape = self.data.buckets[largest], self.data.sample_shapes[largest]
        item = self.data.read([bucket[number % len(bucket)]])
        texts = texts_of(call, item, self.empty, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            found = call.pipe(
                **texts,
                **self.parts.options(call, config, shape),
                generator=generator_of(sample_seed(config.seed, number)),
                output_type="np",
                return_dict=False,
            )[0]
        return preview_pixels([number], np.asarray(found))[0]


@dataclass(frozen=True, eq=False)
class CaptionExamples:
    """A caption of the data; see `Task.examples`."""

    data: Any
    empty: Mapping[str, Tensor]
    parts: TransformerParts

    def write(self, pipeline: Any, folder: Path) -> None:
        """Write a prompt, and its embedding if the pipeline has no text encoder."""
        number = self.data.buckets[largest_bucket(self.data)][0]
        folder.mkdir(parents=True)
        if pipeline.text_encoder is None:
            item = self.data.read([number])
            call = self.parts.kind(pipeline)
            embeds = {name: item[name] for name in names_of(call)}
            embeds |= {f"negative_{name}": self.empty[name][None] for name in embeds}
            write_tensors(folder / EMBEDS_NAME, embeds)
        write_lines(folder / PROMPTS_NAME, [{"prompt": self.data.caption(number) or ""}])


def texts_of(
    call: Call, item: Mapping[str, Tensor], empty: Mapping[str, Tensor], device: torch.device
) -> dict[str, Any]:
    """What a pipeline is called with for an embedded caption, and for none."""
    names = names_of(call)
    captions = {name: _ready(item[name], device) for name in names}
    return call.texts(captions, {name: _ready(empty[name][None], device) for name in names})


def _ready(value: Tensor, device: torch.device) -> Tensor:
    value = value.to(device)
    return value.float() if value.is_floating_point() else value
