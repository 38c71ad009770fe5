"""The loss of a micro-batch: data, randomness, objective and conditioning put together."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mhla_gen.data import Batch
from mhla_gen.training.conditioning import Conditioning
from mhla_gen.training.objectives import Objective, like
from mhla_gen.training.randomness import Randomness


@dataclass(frozen=True, eq=False)
class Noised:
    """Samples and the noise that was added to them."""

    samples: Tensor
    """`[batch, channels, (frames,) height, width]`, float32."""
    noise: Tensor
    """Standard normal, like the samples."""
    noisy: Tensor
    """What the model sees, like the samples."""
    timesteps: Tensor
    """What the model is told of the noise, `[batch]`."""


def noised(batch: Batch, randomness: Randomness, objective: Objective) -> Noised:
    """The samples of a batch, mirrored or sampled from their posterior, with noise.

    Args:
        batch: `samples`, or `mean` and `std` of latents; where there are `mean_flipped` and
            `std_flipped`, these are the latents of the mirrored images, which are not the mirrored
            latents.
        randomness: That of this step, for these samples.
        objective: Says how noise is added.
    """
    if "samples" in batch:
        samples = batch["samples"]
        samples = torch.where(like(randomness.flipped, samples), samples.flip(-1), samples)
    else:
        mean, std = batch["mean"], batch["std"]
        if "mean_flipped" in batch:
            flipped = like(randomness.flipped, mean)
            mean = torch.where(flipped, batch["mean_flipped"], mean)
            std = torch.where(flipped, batch["std_flipped"], std)
        samples = mean + std * randomness.latent_noise(mean.shape[1:])
    noise = randomness.noise(samples.shape[1:])
    noisy = objective.noisy(samples, noise, randomness.times)
    return Noised(samples, noise, noisy, objective.timesteps(randomness.times))


@dataclass(frozen=True, eq=False)
class StepResult:
    """The results of one step, as tensors on their device: reading one waits for it."""

    losses: dict[str, Tensor]
    """`loss` and others by name, each `[samples]`, of this process's share, part after part."""
    timesteps: Tensor
    """Of the whole batch, `[batch]`, on the CPU; of clips whose chunks differ, the last chunk's."""
    grad_norm: Tensor
    """Norm of the gradient before it was clipped, a scalar."""


class Losses(Protocol):
    """The losses of a run, as a function of a micro-batch."""

    def __call__(
        self, model: Callable[..., Any], batch: Batch, randomness: Randomness
    ) -> dict[str, Tensor]:
        """Losses of each sample by name, `[batch]`, float32.

        Args:
            model: The transformer.
            batch: What the data gave, on the model's device.
            randomness: That of this step, for these samples.

        Returns:
            `loss`, which is minimised, and others that are logged beside it.
        """
        ...


@dataclass(frozen=True)
class ObjectiveLosses:
    """The loss of an objective: training on data alone."""

    objective: Objective
    """What to predict."""
    conditioning: Conditioning
    """How to call the model."""

    def __call__(
        self, model: Callable[..., Any], batch: Batch, randomness: Randomness
    ) -> dict[str, Tensor]:
        """See `Losses`."""
        x = noised(batch, randomness, self.objective)
        inputs = (x.noisy, x.timesteps, batch, randomness.dropped)
        prediction = self.conditioning.predict(model, *inputs)
        return {"loss": self.objective.losses(prediction, x.samples, x.noise, randomness.times)}
