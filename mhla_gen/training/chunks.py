"""Diffusion forcing: train a frame-causal Wan with a separate noise level for every chunk."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mhla_gen.config import MHLAConfig
from mhla_gen.training.prompts import ClipMatching, frame_times


@dataclass(frozen=True)
class ChunkMatching(ClipMatching):
    """Flow matching with a separate noise level for each chunk of a clip.

    Levels are drawn independently from the density of `FlowMatching`. Then a random number of
    chunks at the beginning of a clip, but never all, are replaced by clean ones without a loss. So
    the first noisy chunk attends to clean chunks with a level of 0, as in sampling, and later
    chunks attend to noisy ones, which makes them robust to imperfect samples.

    A time is a row of levels, one for each chunk of the longest clip. A shorter clip uses the last
    levels of the row; the very last chunk is never clean.

    Source:
        Independent levels: Chen et al. 2024, diffusion forcing, arXiv:2407.01392. Clean first
        chunks, as sampling reads them, are teacher forcing.
    """

    chunk_frames: int = 1
    """Latent frames per chunk."""
    num_chunks: int = 1
    """Number of chunks of the longest clip."""

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
    """Latent frames per chunk of a frame-causal model."""
    config = getattr(model, "mhla_config", None)
    return config.causal_frames if isinstance(config, MHLAConfig) else None
