"""Objectives of clips: for one expert, for a known first frame, and with a noise level a chunk."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mhla_gen.training.objectives import FlowMatching


@dataclass(frozen=True)
class ClipMatching(FlowMatching):
    """Flow matching for clips: the noise levels of one expert, and a known first frame."""

    lowest: float = 0.0
    """Least σ."""
    highest: float = 1.0
    """Largest σ."""
    skips_first_frame: bool = False
    """The first latent frame of a clip is given, so the loss is that of the others."""

    def draw_times(self, num: int, generator: torch.Generator) -> Tensor:
        """Noise levels between `lowest` and `highest`: the same density there, and none outside."""
        if (self.lowest, self.highest) == (0.0, 1.0):
            return super().draw_times(num, generator)
        low, high = (self._quantile(sigma) for sigma in (self.lowest, self.highest))
        share = torch.rand(num, generator=generator, device=generator.device, dtype=torch.float64)
        normal = torch.special.ndtri(low + (high - low) * share)
        sigmas = torch.sigmoid(normal * self.logit_std + self.logit_mean)
        sigmas = self.shift * sigmas / (1 + (self.shift - 1) * sigmas)
        return sigmas.clamp(self.lowest, self.highest).float()

    def losses(self, prediction: Tensor, samples: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """See `FlowMatching`; a still image has no first frame that could be given."""
        if self.skips_first_frame and samples.shape[2] > 1:
            prediction, samples, noise = (x[:, :, 1:] for x in (prediction, samples, noise))
        return super().losses(prediction, samples, noise, times)

    def _quantile(self, sigma: float) -> float:
        """The share of all noise levels that lie below one."""
        sigma = sigma / (self.shift - (self.shift - 1) * sigma)
        logit = torch.tensor(sigma, dtype=torch.float64).logit()
        return torch.special.ndtr((logit - self.logit_mean) / self.logit_std).item()


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


def frame_times(times: Tensor, frames: int, chunk_frames: int) -> Tensor:
    """`[batch, frames]` from times of chunks `[batch, chunks]`, of which the last ones count.

    Times `[batch]` are those of all frames.
    """
    if times.ndim == 1:
        return times[:, None].expand(-1, frames)
    chunks = -(-frames // chunk_frames)
    return times[:, -chunks:].repeat_interleave(chunk_frames, dim=1)[:, :frames]
