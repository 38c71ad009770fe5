"""The part of docs/evidence.md about clips: a small class-conditional Wan, and its judge.

The training loop and the loss see a clip as an image, the mosaic of its frames (see
moving_emoji.py); the model sees frames.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, WanTransformer3DModel
from evidence_data import Real
from evidence_scores import distance_of_halves, distance_to, kept_features
from moving_emoji import COLUMNS
from torch import Tensor, nn

from mhla_gen import inject
from mhla_gen.config import FeaturesConfig, TrainConfig
from mhla_gen.data import Batch, TrainingData
from mhla_gen.evaluation import FeatureStatistics, build_extractor
from mhla_gen.hub import PIPELINE_NAME
from mhla_gen.outputs.locks import claimed
from mhla_gen.training.dit import build_objective
from mhla_gen.training.loop import run_to_end
from mhla_gen.training.objectives import FlowMatching
from mhla_gen.training.pretrained import attention_settings
from mhla_gen.training.run_folder import check_output_dir, pipeline_steps
from mhla_gen.training.task import Task
from mhla_gen.training.training_run import build_run

_CLASS_DIM = 64
_FEATURES = 256
_BATCH = 256


def class_embeddings(num_classes: int) -> Tensor:
    """The embedding of each class, in place of a caption; the last one is for "no class".

    Returns:
        Float32 `[num_classes + 1, 64]`, the same for every model.
    """
    return torch.randn(num_classes + 1, _CLASS_DIM, generator=torch.Generator().manual_seed(0))


def frames_of(mosaics: Tensor) -> Tensor:
    """`[batch, channels, height, width]` → `[batch, channels, frames, side, side]`."""
    tiles = mosaics.unflatten(3, (COLUMNS, -1)).unflatten(2, (COLUMNS, -1))
    return tiles.transpose(3, 4).flatten(2, 3)


def mosaic_of(frames: Tensor) -> Tensor:
    """Inverse of `frames_of`."""
    tiles = frames.unflatten(2, (COLUMNS, COLUMNS)).transpose(3, 4)
    return tiles.flatten(4, 5).flatten(2, 3)


@dataclass(frozen=True, eq=False)
class ClipClasses:
    """Class numbers for a Wan, which takes embedded captions."""

    embeddings: Tensor
    """Of `class_embeddings`."""

    def predict(
        self, model: Any, noisy: Tensor, timesteps: Tensor, batch: Batch, dropped: Tensor
    ) -> Tensor:
        """See `mhla_gen.training.conditioning.Conditioning`."""
        no_class = len(self.embeddings) - 1
        labels = torch.where(dropped, no_class, batch["labels"])
        return self.velocity(model, noisy, timesteps, labels)

    def velocity(self, model: Any, noisy: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        """A model's prediction for mosaics `[batch, channels, height, width]`."""
        clips = frames_of(noisy)
        captions = self.embeddings.to(noisy)[labels][:, None]
        found = model(clips, timestep=timesteps, encoder_hidden_states=captions, return_dict=False)
        return mosaic_of(found[0])


@dataclass(frozen=True, eq=False)
class AsImages:
    """A Wan called as a DiT is, with mosaics and class numbers."""

    model: nn.Module
    classes: ClipClasses

    def __call__(
        self, noisy: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        """The velocity, like `noisy`."""
        return (self.classes.velocity(self.model, noisy, timestep, class_labels),)


class ClipPipeline(DiffusionPipeline):
    """The pipeline that a run saves, with only a transformer; `draw_clips` samples from it."""

    def __init__(self, transformer: Any):
        super().__init__()
        self.register_modules(transformer=transformer)


def train_clips(config: TrainConfig, title: str) -> Path:
    """`mhla_gen.training.train` for clips of classes."""
    folder = Path(config.output_dir)
    with claimed(folder):
        check_output_dir(config)
        if pipeline_steps(folder) == config.max_steps:
            return folder / PIPELINE_NAME
        return run_to_end(build_run(config, clip_task), title)


def clip_task(config: TrainConfig, data: TrainingData) -> Task:
    """A small Wan for clips of classes; see `mhla_gen.training.build.build_task`."""
    assert data.class_names is not None
    sizes = config.model.sizes
    channels = data.sample_shapes[0][0]
    model: Any = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=sizes.num_attention_heads,
        attention_head_dim=sizes.attention_head_dim,
        in_channels=channels,
        out_channels=channels,
        text_dim=_CLASS_DIM,
        ffn_dim=4 * sizes.num_attention_heads * sizes.attention_head_dim,
        num_layers=sizes.num_layers,
    )
    if config.model.attention != "softmax":
        inject(model, attention_settings(config.model, rank=3))
    return Task(
        model=model,
        objective=build_objective(config.objective),
        conditioning=ClipClasses(class_embeddings(len(data.class_names))),
        pipeline=ClipPipeline,
        summary=f"{len(data)} clips of {len(data.class_names)} classes",
    )


@torch.no_grad()
def draw_clips(
    model: AsImages, labels: np.ndarray, shape: tuple[int, ...], steps: int, device: torch.device
) -> np.ndarray:
    """Clips from noise by Euler steps, without guidance, the same noise for every model.

    Args:
        model: In evaluation mode, on the device.
        labels: int64 `[clips]`.
        shape: Of one mosaic, `(channels, height, width)`.
        steps: Denoising steps.
        device: Where the model is.

    Returns:
        Mosaics, uint8 `[clips, height, width, channels]`.
    """
    generator, drawn, batch_size = torch.Generator().manual_seed(0), [], 64
    for start in range(0, len(labels), batch_size):
        classes = torch.from_numpy(labels[start : start + batch_size]).to(device)
        clips = torch.randn(len(classes), *shape, generator=generator).to(device)
        scheduler: Any = FlowMatching().scheduler()
        scheduler.set_timesteps(steps, device=device)
        for timestep in scheduler.timesteps:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                (velocity,) = model(clips, timestep.expand(len(classes)), classes)
            clips = scheduler.step(velocity.float(), timestep, clips).prev_sample
        pixels = ((clips.clamp(-1, 1) + 1) * 127.5).round().byte()
        drawn.append(pixels.movedim(1, -1).cpu().numpy())
    return np.concatenate(drawn)


class ClipJudge:
    """Fréchet distance of clips, on EfficientNet-Lite0 features of their frames.

    A clip's features are the mean of its frames' features, for content, and the mean absolute
    change from each frame to the next, for motion. These 2,560 numbers are projected to 256 by a
    fixed random matrix, so that a few hundred clips are enough.

    Args:
        real: The real clips.
        device: Where features are computed.
        kept: File of their features, which is written if missing.
    """

    def __init__(self, real: Real, device: torch.device, kept: Path):
        self.device = device
        self.extractor = build_extractor(FeaturesConfig(extractor="efficientnet-lite0")).to(device)
        self.features = kept_features(kept, lambda: self.extract(real.images))
        self.statistics = FeatureStatistics.from_features(self.features)

    @torch.no_grad()
    def extract(self, clips: np.ndarray) -> Tensor:
        """Features `[clips, 256]` of mosaics, uint8 `[clips, height, width, 3]`, on the CPU."""
        frames = frames_of(torch.from_numpy(clips).movedim(-1, 1))
        images = frames.transpose(1, 2).flatten(0, 1)
        parts = [self.extractor(part.to(self.device))["pool"] for part in images.split(_BATCH)]
        found = torch.cat(parts).unflatten(0, (len(clips), -1))
        both = torch.cat([found.mean(dim=1), found.diff(dim=1).abs().mean(dim=1)], dim=1)
        generator = torch.Generator().manual_seed(0)
        matrix = torch.randn(both.shape[1], _FEATURES, generator=generator, dtype=torch.float64)
        return both.cpu().double() @ torch.linalg.qr(matrix).Q

    def score(self, clips: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """The distance to all real clips, and its interval."""
        return {"samples": len(clips)} | distance_to(self.statistics, self.extract(clips))

    def score_real(self) -> dict[str, Any]:
        """The same distance between two halves of the real clips."""
        halves = distance_of_halves(self.features)
        return {"images": len(self.features), "frechet_halves": halves}
