"""Conditioning of any text-to-image or text-to-video transformer, through its family's `Call`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mhla_gen.calls import Call
from mhla_gen.data import Batch


@dataclass(frozen=True, eq=False)
class TransformerConditions:
    """Embedded captions, and the other tensors of a batch that a family reads."""

    call: Call
    empty: Mapping[str, Tensor]
    """The embedded empty caption, without a batch axis, which replaces dropped captions."""

    def predict(
        self,
        model: Callable[..., Any],
        noisy: Tensor,
        timesteps: Tensor,
        batch: Batch,
        dropped: Tensor,
    ) -> Tensor:
        """See `mhla_gen.training.conditioning.Conditioning`."""
        text = {
            name: _without(batch[name], self.empty.get(name), dropped)
            for name in names_of(self.call)
        }
        arguments = self.call.arguments(noisy, timesteps, text)
        return self.call.prediction(model(**arguments, return_dict=False), noisy)


def names_of(call: Call) -> tuple[str, ...]:
    """Names of the tensors of a batch that a call reads besides latents."""
    rows = type(call).embedded(call.config).values()
    return (*(row.name for row in rows), *call.beside)


def _without(values: Tensor, empty: Tensor | None, dropped: Tensor) -> Tensor:
    """A tensor of the captions, padded with zeros, with the empty one for dropped captions."""
    if empty is None:
        found = values
    elif (values.ndim == 2 and not values.is_floating_point()) or values.ndim == 3:
        length = max(values.shape[1], empty.shape[0])
        shape = (-1,) + (1,) * (values.ndim - 1)
        found = torch.where(
            dropped.view(shape), _padded(empty[None].to(values), length), _padded(values, length)
        )
    else:
        found = torch.where(dropped[:, None], empty.to(values), values)
    return found.float() if found.is_floating_point() else found


def _padded(values: Tensor, length: int) -> Tensor:
    missing = length - values.shape[1]
    if not missing:
        return values
    return torch.cat((values, values.new_zeros(len(values), missing, *values.shape[2:])), dim=1)
