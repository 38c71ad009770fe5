"""Classifier-free guidance: of which channels, and at which noise levels."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mhla_gen.errors import UserError


@dataclass(frozen=True)
class Guidance:
    """How far a prediction is moved away from the unconditional one.

    Raises:
        ValueError: If a value is out of its range.
    """

    scale: float = 1.5
    """w in "no class" + w (class − "no class"); 1 is none."""
    interval: Sequence[float] = (0.0, 1.0)
    """Noise levels at which guidance is applied, as shares of the training timesteps: 0 is the
    image, 1 is noise. Flow matching calls this number σ."""
    channels: int | None = None
    """How many of the first channels are guided; None guides all. DiT's published numbers guide
    the first three of four."""

    def __post_init__(self):
        if self.scale < 1:
            raise UserError(f"guidance_scale must be at least 1, found {self.scale}")
        if len(self.interval) != 2 or not 0 <= self.interval[0] <= self.interval[1] <= 1:
            raise UserError(
                "guidance_interval must be two noise levels in [0, 1], the lower one first, found "
                f"{list(self.interval)}"
            )
        if self.channels is not None and self.channels < 1:
            raise UserError(f"guidance_channels must be at least 1, found {self.channels}")

    def check_channels(self, num_channels: int) -> None:
        """Raise if more channels are to be guided than the image or latent has."""
        if self.channels is not None and self.channels > num_channels:
            raise UserError(
                f"guidance_channels must be at most {num_channels}, the channels that the model "
                f"denoises, found {self.channels}"
            )

    def applies(self, noise_level: float) -> bool:
        """Whether to guide at this noise level, in [0, 1].

        Source:
            Kynkäänniemi et al. 2024, arXiv:2404.07724, Eq. (6).
        """
        return self.scale > 1 and self.interval[0] <= noise_level <= self.interval[1]

    def combine(self, with_class: Tensor, without: Tensor, num_channels: int) -> Tensor:
        """The guided prediction.

        Args:
            with_class: Prediction for the class, `[batch, channels, height, width]`.
            without: Prediction for "no class", of that shape.
            num_channels: Channels of the image or latent. Further ones, a learned variance, and
                those that are not guided are the class's.

        Raises:
            ValueError: If `channels` is more than that.

        Source:
            Ho and Salimans 2022, arXiv:2207.12598, Eq. (6), with w counted from 1.
        """
        self.check_channels(num_channels)
        guided = num_channels if self.channels is None else self.channels
        far = without[:, :guided] + self.scale * (with_class[:, :guided] - without[:, :guided])
        return torch.cat([far, with_class[:, guided:]], dim=1)
