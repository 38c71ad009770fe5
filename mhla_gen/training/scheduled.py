"""Noise as a scheduler of diffusers adds it, for models that were not made for flow matching."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mhla_gen.errors import UserError
from mhla_gen.training.objectives import mean_flat

_TARGETS = ("epsilon", "v_prediction")


@dataclass(frozen=True, eq=False)
class ScheduledNoise:
    """ε or v at one of a scheduler's noise levels; see `mhla_gen.training.objectives.Objective`.

    Raises:
        ValueError: If its models predict something else.
    """

    noises: Any
    """The scheduler: its `add_noise`, and `get_velocity` where v is predicted."""

    def __post_init__(self):
        if self.prediction_type not in _TARGETS:
            raise UserError(
                f"{type(self.noises).__name__} is for models that predict {self.prediction_type}; "
                f"trained are {', '.join(_TARGETS)} and flow_prediction"
            )

    @property
    def prediction_type(self) -> str:
        """What the model predicts, by diffusers' name."""
        return self.noises.config.prediction_type

    def out_channels(self, in_channels: int) -> int:
        """As many as the samples have; a variance beside them is not trained."""
        return in_channels

    def draw_times(self, num: int, generator: torch.Generator) -> Tensor:
        """`[num]` timesteps, int64, all alike."""
        highest = self.noises.config.num_train_timesteps
        return torch.randint(highest, (num,), generator=generator, device=generator.device)

    def noisy(self, samples: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Samples with the noise of their timesteps."""
        return self.noises.add_noise(samples, noise, times)

    def timesteps(self, times: Tensor) -> Tensor:
        """The same."""
        return times

    def losses(self, prediction: Tensor, samples: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Squared error of ε or v, mean over a sample: `[batch]`, float32."""
        target = noise
        if self.prediction_type == "v_prediction":
            target = self.noises.get_velocity(samples, noise, times)
        return mean_flat((prediction.float() - target.float()).square())

    def scheduler(self) -> Any:
        """The scheduler."""
        return self.noises
