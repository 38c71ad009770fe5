"""The objective that DiT was trained with: noise, and a variance learned by variational bound."""

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

from mhla_gen.training.objectives import NUM_TRAIN_TIMESTEPS, like, mean_flat

# Of the linear schedule of Ho et al. 2020, arXiv:2006.11239, Sec. 4.
_FIRST_BETA, _LAST_BETA = 1e-4, 0.02
# λ of the hybrid loss L_simple + λ L_vlb; L_vlb is a sum over the timesteps.
_BOUND_WEIGHT = 0.001
# Half the distance of two of the 256 values of a pixel in [-1, 1].
_HALF_BIN = 1 / 255


@dataclass(frozen=True)
class DDPM:
    """ε or v at one of 1000 timesteps with linear betas; with a learned variance the hybrid loss.

    The model's second half of channels says where the log variance of a step lies between its
    bounds, log β̃ (−1) and log β (1). It is trained by the variational bound, in bits per dimension,
    through which the mean gets no gradient.

    Source:
        Ho et al. 2020, arXiv:2006.11239. Learned variance: Nichol and Dhariwal 2021,
        arXiv:2102.09672, Eq. (15) and (16), with λ = 0.001. As each step draws one of the 1000
        terms of L_vlb, λ L_vlb is estimated by that term itself, as in DiT's code.
    """

    prediction: Literal["epsilon", "v_prediction"] = "epsilon"
    """epsilon, or v_prediction: v = α ε − σ x."""
    learned_variance: bool = True
    """Add the second half of channels and its loss."""
    min_snr_gamma: float | None = None
    """Weight min(SNR, γ) of the predicted sample's error: Hang et al. 2023, arXiv:2303.09556,
    Eq. (8) and Sec. 3.4. The variational bound is not weighed."""

    @property
    def prediction_type(self) -> str:
        """The name in diffusers."""
        return self.prediction

    def out_channels(self, in_channels: int) -> int:
        """Twice those of the samples, where a variance is learned."""
        return in_channels * (2 if self.learned_variance else 1)

    def draw_times(self, num: int, generator: torch.Generator) -> Tensor:
        """`[num]` timesteps, int64 in 0…999."""
        return torch.randint(
            NUM_TRAIN_TIMESTEPS, (num,), generator=generator, device=generator.device
        )

    def noisy(self, samples: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """α x + σ ε, with α² = ᾱ and σ² = 1 − ᾱ."""
        alphas, sigmas = self._scales(samples, times)
        return alphas * samples + sigmas * noise

    def timesteps(self, times: Tensor) -> Tensor:
        """The same."""
        return times

    def losses(self, prediction: Tensor, samples: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Squared error of ε or v, mean over a sample, plus the bound: `[batch]`, float32."""
        prediction = prediction.float()
        if not self.learned_variance:
            return self._weights(times) * mean_flat(
                (prediction - self.target(samples, noise, times)).square()
            )
        predicted, variance = prediction.chunk(2, dim=1)
        squares = (predicted - self.target(samples, noise, times)).square()
        scale = _BOUND_WEIGHT * NUM_TRAIN_TIMESTEPS
        bound = self.bound(predicted.detach(), variance, samples, noise, times)
        return self._weights(times) * mean_flat(squares) + scale * bound

    def target(self, samples: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What the model should predict."""
        if self.prediction == "epsilon":
            return noise
        alphas, sigmas = self._scales(samples, times)
        return alphas * noise - sigmas * samples

    def bound(
        self, predicted: Tensor, variance: Tensor, samples: Tensor, noise: Tensor, times: Tensor
    ) -> Tensor:
        """One term of the variational bound per sample, `[batch]`, bits per dimension.

        For t > 0 the divergence of the model's step from the true posterior of x_{t−1}, else the
        negative log-likelihood of the sample's pixel values.

        Args:
            predicted: Predicted ε or v.
            variance: −1 for log β̃, 1 for log β, and linear between and beyond.
            samples: x₀, taken for pixels in [−1, 1] in 255 steps, as DiT's code does with latents.
            noise: ε.
            times: Timesteps `[batch]`.
        """
        noisy = self.noisy(samples, noise, times)
        tables = schedule(times.device)
        least = like(tables.log_posterior_variances[times], samples)
        most = like(tables.log_betas[times], samples)
        log_variance = least + (variance + 1) / 2 * (most - least)
        true_mean = self._posterior_mean(samples, noisy, times)
        mean = self._posterior_mean(self._sample(predicted, noisy, times), noisy, times)
        divergence = mean_flat(gaussian_divergence(true_mean, least, mean, log_variance))
        likelihood = mean_flat(discretised_log_likelihood(samples, mean, log_variance))
        return torch.where(times == 0, -likelihood, divergence) / math.log(2)

    def scheduler(self) -> DDIMScheduler:
        """Deterministic steps, as in the pipelines of DiT on the hub."""
        return DDIMScheduler(
            num_train_timesteps=NUM_TRAIN_TIMESTEPS,
            beta_start=_FIRST_BETA,
            beta_end=_LAST_BETA,
            beta_schedule="linear",
            prediction_type=self.prediction,
            clip_sample=False,
        )

    def _sample(self, predicted: Tensor, noisy: Tensor, times: Tensor) -> Tensor:
        """The x₀ that a prediction means."""
        alphas, sigmas = self._scales(noisy, times)
        if self.prediction == "epsilon":
            return (noisy - sigmas * predicted) / alphas
        return alphas * noisy - sigmas * predicted

    def _posterior_mean(self, samples: Tensor, noisy: Tensor, times: Tensor) -> Tensor:
        """Mean of q(x_{t−1} | x_t, x₀): Ho et al. 2020, Eq. (7)."""
        tables = schedule(times.device)
        of_sample = like(tables.posterior_sample[times], noisy)
        of_noisy = like(tables.posterior_noisy[times], noisy)
        return of_sample * samples + of_noisy * noisy

    def _weights(self, times: Tensor) -> Tensor:
        """Of the squared error, `[batch]`."""
        if self.min_snr_gamma is None:
            return torch.ones_like(times, dtype=torch.float32)
        tables = schedule(times.device)
        sigmas = tables.sigmas[times]
        snr = (tables.alphas[times] / sigmas).square()
        # The error of x₀ is that of ε times σ / α, and that of v times σ.
        per_prediction = 1 / snr if self.prediction == "epsilon" else sigmas.square()
        return per_prediction * snr.clamp(max=self.min_snr_gamma)

    def _scales(self, samples: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """α and σ of each sample, to be multiplied with it."""
        tables = schedule(times.device)
        return like(tables.alphas[times], samples), like(tables.sigmas[times], samples)


@dataclass(frozen=True)
class Schedule:
    """Functions of the timestep, each float32 `[timesteps]`."""

    alphas: Tensor
    """√ᾱ."""
    sigmas: Tensor
    """√(1 − ᾱ)."""
    log_betas: Tensor
    """Upper bound of the log variance of a step."""
    log_posterior_variances: Tensor
    """log β̃, its lower bound."""
    posterior_sample: Tensor
    """Weight of x₀ in the mean of q(x_{t−1} | x_t, x₀)."""
    posterior_noisy: Tensor
    """Weight of x_t in it."""


@functools.cache
def schedule(device: torch.device) -> Schedule:
    """The linear schedule, computed in float64."""
    betas = torch.linspace(_FIRST_BETA, _LAST_BETA, NUM_TRAIN_TIMESTEPS, dtype=torch.float64)
    products = torch.cumprod(1 - betas, 0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), products[:-1]])
    variances = betas * (1 - before) / (1 - products)
    # The last step has no variance; that of the one before it keeps the logarithm finite.
    variances[0] = variances[1]
    tables = (
        products.sqrt(),
        (1 - products).sqrt(),
        betas.log(),
        variances.log(),
        betas * before.sqrt() / (1 - products),
        (1 - before) * (1 - betas).sqrt() / (1 - products),
    )
    return Schedule(*(table.float().to(device) for table in tables))


def gaussian_divergence(
    mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor
) -> Tensor:
    """KL(N(mean, exp log_variance) ‖ N(other_mean, exp other_log_variance)), element by element."""
    difference = log_variance - other_log_variance
    squares = (mean - other_mean).square() * torch.exp(-other_log_variance)
    return 0.5 * (-1 - difference + difference.exp() + squares)


def discretised_log_likelihood(samples: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log probability of the bin of 256 that a pixel in [−1, 1] lies in, element by element.

    The outer bins are open.

    Source:
        Ho et al. 2020, arXiv:2006.11239, Eq. (13).
    """
    scale = torch.exp(-0.5 * log_variance)
    above = (samples + _HALF_BIN - mean) * scale
    below = (samples - _HALF_BIN - mean) * scale
    probability = torch.special.ndtr(above) - torch.special.ndtr(below)
    # The smallest value keeps the gradient finite where a bin is far away.
    inner = probability.clamp_min(1e-12).log()
    lowest = torch.special.log_ndtr(above)
    highest = torch.special.log_ndtr(-below)
    return torch.where(samples < -0.999, lowest, torch.where(samples > 0.999, highest, inner))
