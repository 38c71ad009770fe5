"""Calling a model with the conditions of its samples."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mhla_gen.data import Batch


class Conditioning(Protocol):
    """One kind of condition. A text-conditional family adds a class with this method."""

    def predict(
        self,
        model: Callable[..., Any],
        noisy: Tensor,
        timesteps: Tensor,
        batch: Batch,
        dropped: Tensor,
    ) -> Tensor:
        """What the model predicts.

        Args:
            model: The transformer.
            noisy: Noisy samples `[batch, channels, (frames,) height, width]`.
            timesteps: `[batch]` in [0, 1000].
            batch: What the data gave; the condition is in it.
            dropped: Whose condition is replaced by none, bool `[batch]`: classifier-free guidance
                needs both (Ho and Salimans 2022, arXiv:2207.12598).
        """
        ...


@dataclass(frozen=True)
class ClassLabels:
    """Class numbers, as diffusers' DiT takes them."""

    null_class: int
    """The label that stands for no class."""

    def predict(
        self,
        model: Callable[..., Any],
        noisy: Tensor,
        timesteps: Tensor,
        batch: Batch,
        dropped: Tensor,
    ) -> Tensor:
        """See `Conditioning`."""
        labels = torch.where(dropped, self.null_class, batch["labels"])
        return model(noisy, timestep=timesteps, class_labels=labels, return_dict=False)[0]
