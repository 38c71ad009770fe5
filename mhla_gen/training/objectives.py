"""What a model learns to predict, as pure functions of tensors and a random generator."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mhla_gen.config import TrainConfig
from mhla_gen.data import derived_seed

# diffusers' flow-matching schedulers give the model 1000 σ.
NUM_TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True)
class Draws:
    """All the chance in one optimizer step, for the images of its batch."""

    noise: Tensor
    """Standard normal, like the images."""
    sigmas: Tensor
    """Noise levels `[batch]` in (0, 1)."""
    dropped: Tensor
    """Whose label is replaced by the null class, bool `[batch]`."""
    flipped: Tensor
    """Who is mirrored, bool `[batch]`."""

    def part(self, rows: slice) -> "Draws":
        """The draws of some images of the batch."""
        return Draws(self.noise[rows], self.sigmas[rows], self.dropped[rows], self.flipped[rows])


def draw(config: TrainConfig, image_shape: Sequence[int], step: int, device: Any) -> Draws:
    """The chance of step number `step`: a function of the seed and the step alone.

    It is drawn for the whole batch, of which a process takes its rows: a run can be resumed at any
    step, and does not depend on the number of processes or micro-batches.

    Args:
        config: Seed, batch size and distributions.
        image_shape: `(channels, height, width)`.
        step: Optimizer steps done before.
        device: Where to draw; kinds of devices differ in what they draw.
    """
    generator = torch.Generator(device).manual_seed(derived_seed(config.seed, 1, step))
    size = config.batch_size

    def uniform() -> Tensor:
        return torch.rand(size, generator=generator, device=device)

    return Draws(
        noise=torch.randn(size, *image_shape, generator=generator, device=device),
        sigmas=logit_normal_sigmas(size, config.logit_mean, config.logit_std, generator),
        dropped=uniform() < config.label_dropout,
        flipped=uniform() < (0.5 if config.data.horizontal_flip else 0.0),
    )


def logit_normal_sigmas(num: int, mean: float, std: float, generator: torch.Generator) -> Tensor:
    """Noise levels σ whose logit is normal: most training goes to the middle of the path.

    Args:
        num: How many.
        mean: Mean of the logit; above 0 means more noise.
        std: Standard deviation of the logit.
        generator: Source of randomness; the result is on its device.

    Returns:
        `[num]`, float32, in (0, 1).

    Source:
        Esser et al. 2024, arXiv:2403.03206, Eq. (19).
    """
    normal = torch.randn(num, generator=generator, device=generator.device)
    return torch.sigmoid(normal * std + mean)


def interpolate(images: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """The straight path from images (σ = 0) to noise (σ = 1): (1 − σ) x + σ ε.

    Args:
        images: `[batch, channels, height, width]`.
        noise: Standard normal, like `images`.
        sigmas: Noise levels `[batch]`.

    Source:
        Liu et al. 2022, arXiv:2209.03003; Lipman et al. 2023, arXiv:2210.02747.
    """
    sigmas = sigmas.view(-1, 1, 1, 1)
    return (1 - sigmas) * images + sigmas * noise


def velocity(images: Tensor, noise: Tensor) -> Tensor:
    """The derivative of the path by σ, ε − x: what the model predicts in flow matching.

    The sign is that of diffusers' flow-matching schedulers, which step by (σ' − σ) · velocity.
    """
    return noise - images


def flow_matching_loss(prediction: Tensor, images: Tensor, noise: Tensor) -> Tensor:
    """Squared error of the predicted velocity, per image.

    Returns:
        `[batch]`, float32.
    """
    return (prediction.float() - velocity(images, noise)).square().flatten(1).mean(1)


def training_loss(
    model: Callable[..., Any], images: Tensor, labels: Tensor, draws: Draws, null_class: int
) -> Tensor:
    """Flow-matching loss of a class-conditional model, per image.

    Args:
        model: Called as a DiT of diffusers: noisy images, timesteps in [0, 1000], class labels.
        images: `[batch, channels, height, width]` in [-1, 1].
        labels: Class numbers `[batch]`.
        draws: The chance of this step, for these images.
        null_class: The label that stands for no class (Ho and Salimans 2022, arXiv:2207.12598).

    Returns:
        `[batch]`, float32.
    """
    images = torch.where(draws.flipped.view(-1, 1, 1, 1), images.flip(-1), images)
    labels = torch.where(draws.dropped, null_class, labels)
    noisy = interpolate(images, draws.noise, draws.sigmas)
    timesteps = draws.sigmas * NUM_TRAIN_TIMESTEPS
    prediction = model(noisy, timestep=timesteps, class_labels=labels).sample
    return flow_matching_loss(prediction, images, draws.noise)
