"""The loss of a micro-batch: data, chance, objective and conditioning put together."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mhla_gen.data import Batch
from mhla_gen.training.conditioning import Conditioning
from mhla_gen.training.draws import Draws
from mhla_gen.training.objectives import Objective, like


def samples_of(batch: Batch, draws: Draws) -> Tensor:
    """The samples of a batch, mirrored or drawn from their distribution as the draws say.

    Args:
        batch: `samples`, or `mean` and `std` of latents; where there are `mean_flipped` and
            `std_flipped`, these are the latents of the mirrored images, which are not the mirrored
            latents.
        draws: The chance of this step, for these samples.

    Returns:
        `[batch, channels, (frames,) height, width]`, float32.
    """
    if "samples" in batch:
        samples = batch["samples"]
        return torch.where(like(draws.flipped, samples), samples.flip(-1), samples)
    mean, std = batch["mean"], batch["std"]
    if "mean_flipped" in batch:
        flipped = like(draws.flipped, mean)
        mean = torch.where(flipped, batch["mean_flipped"], mean)
        std = torch.where(flipped, batch["std_flipped"], std)
    return mean + std * draws.latent_noise(mean.shape[1:])


def training_losses(
    model: Callable[..., Any],
    batch: Batch,
    draws: Draws,
    objective: Objective,
    conditioning: Conditioning,
) -> Tensor:
    """The loss of each sample, `[batch]`, float32.

    Args:
        model: The transformer.
        batch: What the data gave, on the model's device.
        draws: The chance of this step, for these samples.
        objective: What to predict.
        conditioning: How to call the model.
    """
    samples = samples_of(batch, draws)
    noise = draws.noise(samples.shape[1:])
    noisy = objective.noisy(samples, noise, draws.times)
    timesteps = objective.timesteps(draws.times)
    prediction = conditioning.predict(model, noisy, timesteps, batch, draws.dropped)
    return objective.losses(prediction, samples, noise, draws.times)
