"""All the randomness of a training step: a function of the seed and the step number."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mhla_gen.data import derived_seed
from mhla_gen.runtime.devices import send
from mhla_gen.training.objectives import Objective


@dataclass(frozen=True)
class Randomness:
    """The randomness of one step for some samples of its batch, one row per sample.

    Every sample has its own seeds of noise, so a run can be resumed at any step, does not depend on
    the number of processes or micro-batches, and may mix samples of several shapes.
    """

    times: Tensor
    """What the objective drew, `[batch, …]`."""
    dropped: Tensor
    """Whose condition is left out, bool `[batch]`."""
    flipped: Tensor
    """Who is mirrored, bool `[batch]`."""
    seeds: Tensor
    """Seeds of the noise of diffusion and of the latents' distribution, int64 `[batch, 2]`, CPU."""

    def part(self, rows: slice) -> "Randomness":
        """The randomness of some of these samples."""
        return Randomness(
            self.times[rows], self.dropped[rows], self.flipped[rows], self.seeds[rows]
        )

    def to(self, device: torch.device) -> "Randomness":
        """The same, with everything that a model sees moved from the CPU to a device."""
        times, dropped, flipped = (
            send(x, device) for x in (self.times, self.dropped, self.flipped)
        )
        return Randomness(times, dropped, flipped, self.seeds)

    def noise(self, shape: Sequence[int]) -> Tensor:
        """Noise of diffusion: standard normal, float32 `[batch, *shape]`."""
        return self._normal(shape, 0)

    def latent_noise(self, shape: Sequence[int]) -> Tensor:
        """Noise for sampling latents from their posterior: standard normal, like `noise`."""
        return self._normal(shape, 1)

    def _normal(self, shape: Sequence[int], use: int) -> Tensor:
        # On the samples' device: kinds of devices differ in what they draw.
        device = self.times.device
        generator = torch.Generator(device)
        noise = torch.empty(len(self.seeds), *shape, device=device)
        for row, seed in zip(noise, self.seeds[:, use].tolist(), strict=True):
            torch.randn(tuple(shape), generator=generator.manual_seed(seed), out=row)
        return noise


def step_randomness(
    objective: Objective,
    *,
    seed: int,
    step: int,
    batch_size: int,
    dropout: float = 0.0,
    flip: bool = False,
) -> Randomness:
    """The randomness of one step, for the whole batch, of which a process takes its rows.

    Args:
        objective: Draws the times.
        seed: Of the run.
        step: Optimizer steps done before.
        batch_size: Samples of the step, over all processes and micro-batches.
        dropout: Share of conditions that are left out.
        flip: Mirror half of the samples.
    """
    generator = torch.Generator().manual_seed(derived_seed(seed, 1, step))
    times = objective.draw_times(batch_size, generator)
    dropped = torch.rand(batch_size, generator=generator) < dropout
    flipped = torch.rand(batch_size, generator=generator) < (0.5 if flip else 0.0)
    seeds = torch.randint(2**32, (batch_size, 2), generator=generator)
    return Randomness(times, dropped, flipped, seeds)
