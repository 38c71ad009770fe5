"""The exponential moving average of a model's weights."""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from mhla_gen.training.shards import held


class WeightAverage(EMAModel):
    """diffusers' `EMAModel` of a model that processes may share: each averages its part.

    Args:
        model: On its device, shared or not.
        decay: Of the average; less in the first steps, (1 + step) / (10 + step).
        width: In place of `decay`, of EDM2's profile: the average reaches back over a fixed share
            of the training so far; see `profile_exponent`.
    """

    def __init__(self, model: nn.Module, decay: float, width: float | None = None):
        self._weights = list(model.parameters())
        self._exponent = None if width is None else profile_exponent(width)
        super().__init__(held(self._weights), decay=decay, foreach=True)

    def get_decay(self, optimization_step: int) -> float:
        """The decay of a step, the first of which is 1."""
        if self._exponent is None:
            return super().get_decay(optimization_step)
        return (1 - 1 / optimization_step) ** (self._exponent + 1)

    @torch.no_grad()
    def step(self, parameters: Iterable[nn.Parameter], done: Collection[int] = ()) -> None:
        """Average the parameters in; frozen ones are their own average.

        Computes what `EMAModel` does, which reads the memory twice and needs a third copy.

        Args:
            parameters: All, in the order in which they were given.
            done: The `id` of each whose average has its value already.
        """
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        trained = [
            pair
            for pair in zip(self.shadow_params, parameters, strict=True)
            if pair[1].requires_grad and id(pair[1]) not in done
        ]
        if trained:
            averages, weights = zip(*trained, strict=True)
            torch._foreach_lerp_(averages, held(weights), 1 - self.cur_decay_value)

    def copy_to(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give parameters their averages."""
        super().copy_to(held(parameters))

    def settings(self) -> dict[str, Any]:
        """All of its state but the averages, as plain values."""
        return {name: v for name, v in self.state_dict().items() if name != "shadow_params"}

    def load_settings(self, settings: dict[str, Any]) -> None:
        """Take what `settings` gave."""
        super().load_state_dict(settings)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take whole averages, as earlier checkpoints have them, each process its part."""
        super().load_state_dict(state_dict)
        pairs = zip(self.shadow_params, self._weights, strict=True)
        self.shadow_params = [_part(*pair) for pair in pairs]

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Give a model the averaged weights inside, and its own afterwards, bit for bit."""
        parameters = list(model.parameters())
        kept = [tensor.detach().clone() for tensor in held(parameters)]
        self.copy_to(parameters)
        try:
            yield
        finally:
            for parameter, old in zip(held(parameters), kept, strict=True):
                parameter.data.copy_(old)


def profile_exponent(width: float) -> float:
    r"""The exponent of the profile $t^\gamma$, over the share $t$ of training, of a given width.

    $\sigma = \sqrt{\gamma + 1} / ((\gamma + 2) \sqrt{\gamma + 3})$ solved for $\gamma$; the decay
    of step $n$ is $(1 - 1/n)^{\gamma + 1}$, so that a longer run is averaged over longer.

    Args:
        width: Standard deviation of the profile as a share of training, in [0.001, 0.28].

    Source:
        Karras et al. 2024, arXiv:2312.02696, Section 3 and Appendix C.
    """
    roots = np.roots([1, 7, 16 - width**-2, 12 - width**-2])
    return float(roots.real.max())


def _part(whole: Tensor, weight: Tensor) -> Tensor:
    """What this process has of a tensor that is shared as `weight` is, on its device."""
    whole = whole.to(weight.device)
    if not isinstance(weight, DTensor):
        return whole
    return distribute_tensor(whole, weight.device_mesh, weight.placements).to_local()
