"""The losses of each kind of stage; the training loop calls these."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mhla_gen.data import Batch
from mhla_gen.distillation.layers import LayerErrors
from mhla_gen.training.conditioning import Conditioning
from mhla_gen.training.objectives import Objective, mean_flat
from mhla_gen.training.randomness import Randomness
from mhla_gen.training.step import noised


@dataclass(frozen=True, eq=False)
class LayerLosses:
    """The mean over layers of their relative errors on the teacher's activations."""

    objective: Objective
    """Says how noisy the inputs are."""
    conditioning: Conditioning
    layers: LayerErrors
    """Of the student, under whatever wraps it."""

    def __call__(
        self, model: Callable[..., Any], batch: Batch, randomness: Randomness
    ) -> dict[str, Tensor]:
        """`loss`, and the error of each layer by its name; see `mhla_gen.training.step.Losses`."""
        x = noised(batch, randomness, self.objective)
        errors = self.layers.during(
            lambda: self.conditioning.predict(
                model, x.noisy, x.timesteps, batch, randomness.dropped
            )
        )
        # Each weight is in one term, so Adam's steps do not depend on the number of layers.
        return {"loss": torch.stack(list(errors.values())).mean(0), **errors}


@dataclass(frozen=True, eq=False)
class OutputLosses:
    """The objective's loss, and the distance to the teacher's prediction for the same input."""

    objective: Objective
    conditioning: Conditioning
    teacher: Any
    """The softmax model, frozen, on the student's device."""
    teacher_weight: float
    """Weight of the distance."""
    autocast: Callable[[], AbstractContextManager[Any]]
    """The arithmetic that the student runs in."""

    def __call__(
        self, model: Callable[..., Any], batch: Batch, randomness: Randomness
    ) -> dict[str, Tensor]:
        """`loss` and its two parts; see `mhla_gen.training.step.Losses`."""
        x = noised(batch, randomness, self.objective)
        inputs = (x.noisy, x.timesteps, batch, randomness.dropped)
        with torch.no_grad(), self.autocast():
            target = self.conditioning.predict(self.teacher, *inputs)
        prediction = self.conditioning.predict(model, *inputs)
        objective = self.objective.losses(prediction, x.samples, x.noise, randomness.times)
        distance = mean_flat((prediction.float() - target.float()).square())
        return {
            "loss": objective + self.teacher_weight * distance,
            "objective_loss": objective,
            "teacher_distance": distance,
        }
