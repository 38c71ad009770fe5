"""What a model learns to predict: pure functions of tensors of any rank and sampled times."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

# diffusers' flow-matching schedulers give the model 1000 σ.
NUM_TRAIN_TIMESTEPS = 1000


class Objective(Protocol):
    """Times, noisy samples and losses. A time is the noise level of a sample."""

    @property
    def prediction_type(self) -> str:
        """What the model predicts, by diffusers' name."""
        ...

    def out_channels(self, in_channels: int) -> int:
        """Channels that the model must predict for samples of `in_channels`."""
        ...

    def draw_times(self, num: int, generator: torch.Generator) -> Tensor:
        """`[num]` times, on the generator's device."""
        ...

    def noisy(self, samples: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Samples with the noise of their times; `[batch, channels, …]` like both."""
        ...

    def timesteps(self, times: Tensor) -> Tensor:
        """The times as the model takes them: `[batch]` in [0, 1000]."""
        ...

    def losses(self, prediction: Tensor, samples: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """The loss of each sample, `[batch]`, float32."""
        ...

    def scheduler(self) -> Any:
        """A diffusers scheduler to sample from a model trained this way."""
        ...


@dataclass(frozen=True)
class FlowMatching:
    """The velocity on the straight path from a sample (σ = 0) to noise (σ = 1).

    The times are noise levels σ whose logit is normal: most training goes to the middle.

    Source:
        Liu et al. 2022, arXiv:2209.03003; Lipman et al. 2023, arXiv:2210.02747. Times: Esser et al.
        2024, arXiv:2403.03206, Eq. (19), shift Eq. (23).
    """

    logit_mean: float = 0.0
    """Mean of the logit."""
    logit_std: float = 1.0
    """Standard deviation of the logit."""
    shift: float = 1.0
    """Moves σ to s σ / (1 + (s − 1) σ)."""
    min_snr_gamma: float | None = None
    """See `min_snr_weights`."""

    @property
    def prediction_type(self) -> str:
        """The velocity."""
        return "flow_prediction"

    def out_channels(self, in_channels: int) -> int:
        """As many as the samples have."""
        return in_channels

    def draw_times(self, num: int, generator: torch.Generator) -> Tensor:
        """`[num]` noise levels, float32 in (0, 1)."""
        normal = torch.randn(num, generator=generator, device=generator.device)
        sigmas = torch.sigmoid(normal * self.logit_std + self.logit_mean)
        return self.shift * sigmas / (1 + (self.shift - 1) * sigmas)

    def noisy(self, samples: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """(1 − σ) x + σ ε."""
        sigmas = like(times, samples)
        return (1 - sigmas) * samples + sigmas * noise

    def timesteps(self, times: Tensor) -> Tensor:
        """1000 σ."""
        return times * NUM_TRAIN_TIMESTEPS

    def velocity(self, samples: Tensor, noise: Tensor) -> Tensor:
        """The derivative of the path by σ, ε − x.

        The sign is that of diffusers' flow-matching schedulers, which step by (σ' − σ) · velocity.
        """
        return noise - samples

    def losses(self, prediction: Tensor, samples: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Squared error of the velocity, mean over a sample: `[batch]`, float32."""
        losses = mean_flat((prediction.float() - self.velocity(samples, noise)).square())
        if self.min_snr_gamma is None:
            return losses
        # x = x_σ − σ v: an error of the velocity is one of the sample, times σ.
        sigmas = times.float()
        snr = ((1 - sigmas) / sigmas).square()
        return losses * sigmas.square() * snr.clamp(max=self.min_snr_gamma)

    def scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        """Euler steps along the path."""
        return FlowMatchEulerDiscreteScheduler(shift=self.shift)


def like(times: Tensor, samples: Tensor) -> Tensor:
    """`[batch]` as `[batch, 1, …]`, to be multiplied with samples."""
    return times.view(-1, *[1] * (samples.ndim - 1))


def mean_flat(values: Tensor) -> Tensor:
    """Mean over all axes but the first."""
    return values.flatten(1).mean(1)
