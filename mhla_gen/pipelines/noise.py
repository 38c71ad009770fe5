"""Noise of samples that have a source each, without waiting for the device."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mhla_gen.devices import send


class SampleNoise(TorchFunctionMode):
    """Inside, `torch.randn` with `source` as its generator draws each row from its own generator.

    These are the numbers that diffusers draws of a list of generators. But diffusers copies noise
    from the CPU in the plain way, for which the host waits until the device has done all steps so
    far; in every step of a stochastic scheduler the device would then wait for the host.

    Args:
        generators: One for each row, on the CPU.
        device: Where noise is needed.
    """

    def __init__(self, generators: Sequence[torch.Generator], device: torch.device):
        super().__init__()
        self.generators, self.device = list(generators), device
        self.source = torch.Generator(device)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Noise of the rows; all other functions are called as they are."""
        kwargs = kwargs or {}
        if func is torch.randn and kwargs.get("generator") is self.source:
            return self._normal(args[0], kwargs.get("dtype"))
        return func(*args, **kwargs)

    def _normal(self, shape: Sequence[int], dtype: torch.dtype | None) -> Tensor:
        noise = torch.empty(tuple(shape), dtype=dtype)
        for row, generator in zip(noise, self.generators, strict=True):
            torch.randn(row.shape, generator=generator, dtype=dtype, out=row)
        return send(noise, self.device)


def noise_of(generator: Any, count: int, device: torch.device) -> tuple[Any, Any]:
    """How `count` samples get their noise on a device.

    Args:
        generator: What a pipeline of diffusers takes: none, one, or a list.
        count: Rows.
        device: Where noise is needed.

    Returns:
        What to enter around diffusers' functions that draw noise, and what to give them as their
        generator.
    """
    many = isinstance(generator, Sequence) and len(generator) == count
    if not many or any(each.device.type != "cpu" for each in generator):
        return nullcontext(), generator
    noise = SampleNoise(generator, device)
    return noise, noise.source
