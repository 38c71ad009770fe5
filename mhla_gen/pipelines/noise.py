"""Noise for samples with a generator each, without waiting for the device."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mhla_gen.data import derived_seed
from mhla_gen.runtime.devices import send

# torch's generators on the CPU read no more of a seed.
_SEED_BITS = 32


def sample_seed(seed: int, number: int) -> int:
    """The seed of sample `number` in a set of seed `seed`.

    `seed` plus the bits of `number` in reverse order: sample 0 has the set's seed, and of 2^m
    samples each has a seed of its own, 2^(32 - m) or more away from the others. So sets of 50,000
    samples share no noise where their seeds are less than 65,536 apart, which `seed + number` would
    not give: it makes nearly the same set of seed 1 as of seed 0.

    Args:
        seed: Of the set.
        number: Of the sample, counted from 0.

    Returns:
        A number below 2^32, as `torch.Generator.manual_seed` takes it.
    """
    reversed_bits = int(f"{number % 2**_SEED_BITS:0{_SEED_BITS}b}"[::-1], 2)
    return (seed + reversed_bits) % 2**_SEED_BITS


def chunk_seed(seed: int, number: int) -> int:
    """The seed of chunk `number` of a clip that is made chunk by chunk.

    `sample_seed(sample_seed(seed, i), number)` would not do: it adds bits in reverse order twice,
    so that chunk c of sample i would have the noise of chunk i of sample c.

    Args:
        seed: Of the clip, which is that of its first chunk.
        number: Of the chunk, counted from 0.

    Returns:
        A number below 2^32.
    """
    return derived_seed(seed, number) if number else seed


def generator_of(seed: int) -> torch.Generator:
    """The generator of a sample, on the CPU, so that every device gets the same numbers."""
    return torch.Generator().manual_seed(seed)


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
