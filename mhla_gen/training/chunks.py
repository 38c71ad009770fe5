"""Diffusion forcing: a Wan that is causal over frames learns a noise level for every chunk."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mhla_gen.config import MHLAConfig
from mhla_gen.training.prompts import ClipMatching, frame_times


@dataclass(frozen=True)
class ChunkMatching(ClipMatching):
    """Flow matching where the chunks of a clip have noise levels of their own.

    Levels are drawn one by one from the density of `FlowMatching`; then the first chunks of a clip,
    any number but all, are made clean and have no loss. So the first noisy chunk stands beside
    clean ones and a level of 0, as chunks do in sampling, and the later ones beside noisy ones,
    which makes them robust to what was not made perfectly.

    A time is a row of levels, one for each chunk of the longest clip. A shorter clip has the last
    ones, of which the very last is never clean.

    Source:
        Independent levels: Chen et al. 2024, diffusion forcing, arXiv:2407.01392. Clean first
        chunks, as sampling reads them, are teacher forcing.
    """

    chunk_frames: int = 1
    """Latent frames of a chunk."""
    num_chunks: int = 1
    """Chunks of the longest clip."""

    def draw_times(self, num: int, generator: torch.Generator) -> Tensor:
        """`[num, num_chunks]` noise levels, float32 in [0, 1)."""
        levels = super().draw_times(num * self.num_chunks, generator)
        clean = torch.randint(
            self.num_chunks, (num, 1), generator=generator, device=generator.device
        )
        noisy = torch.arange(self.num_chunks, device=generator.device) >= clean
        return levels.view(num, self.num_chunks) * noisy

    def noisy(self, samples: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """(1 − σ) x + σ ε, with the σ of each frame."""
        sigmas = frame_times(times, samples.shape[2], self.chunk_frames)[:, None, :, None, None]
        return (1 - sigmas) * samples + sigmas * noise

    def losses(self, prediction: Tensor, samples: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Squared error of the velocity, mean over the frames that are not clean: `[batch]`."""
        sigmas = frame_times(times, samples.shape[2], self.chunk_frames).float()
        errors = (prediction.float() - self.velocity(samples, noise)).square().mean((1, 3, 4))
        noisy = sigmas > 0
        if self.min_snr_gamma is not None:
            snr = ((1 - sigmas) / sigmas.where(noisy, 1)).square()
            errors = errors * sigmas.square() * snr.clamp(max=self.min_snr_gamma)
        return (errors * noisy).sum(1) / noisy.sum(1)


def causal_frames(model: Any) -> int | None:
    """Latent frames of a chunk, for a model that is causal over them."""
    config = getattr(model, "mhla_config", None)
    return config.causal_frames if isinstance(config, MHLAConfig) else None
