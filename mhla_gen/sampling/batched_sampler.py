"""Sample the units of a set in batches that fit into memory, without changing the samples."""

import gc
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor
from tqdm import tqdm

from mhla_gen.runtime.devices import repeatable_convolutions
from mhla_gen.sampling.repeatable import InParts, in_parts
from mhla_gen.sampling.samplers import OnStep, Sampler
from mhla_gen.sampling.units import Units

# A VAE needs many times the memory of a DiT for the same image.
_VAE_ROWS = 8
_CPU_BATCH = 32


class BatchedSampler:
    """Makes units of samples; a context manager.

    With `reproducible`, every call of a model has the shape of one unit, and each sample its place
    in it: the samples do not depend on the batch size, on the processes, or on restarts. Batches
    are then whole units. Without it, a call has the shape of the batch.
    """

    def __init__(
        self, sampler: Sampler, units: Units, steps: int, batch_size: int, reproducible: bool
    ):
        self.sampler, self.units, self.steps = sampler, units, steps
        self.reproducible = reproducible
        whole_units = max(1, batch_size // units.rows) * units.rows
        self.rows = whole_units if reproducible else batch_size
        if sampler.one_call and reproducible:
            self.rows = units.rows
        self.notes: list[str] = []
        self._parts: list[InParts] = []
        self._stack = ExitStack()

    def __enter__(self) -> "BatchedSampler":
        if self.reproducible:
            self._stack.enter_context(repeatable_convolutions())
            pipeline, rows, calls = self.sampler.pipeline, self.units.rows, []
            if not self.sampler.one_call:
                calls.append((pipeline.transformer, "forward", rows))
            if getattr(pipeline, "vae", None) is not None:
                calls.append((pipeline.vae, "decode", min(rows, _VAE_ROWS)))
            self._parts = [self._stack.enter_context(in_parts(*call)) for call in calls]
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def draw(
        self, wanted: Sequence[int], on_step: OnStep | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Draw units.

        Args:
            wanted: Their numbers.
            on_step: Called with the samples that are in work, counted by the steps done.

        Yields:
            Number and samples of a unit, uint8 `[samples, …]` on the pipeline's device.

        Raises:
            torch.OutOfMemoryError: If a single sample does not fit.
        """
        waiting = deque(wanted)
        while waiting:
            group = list(waiting)[: max(1, self.rows // self.units.rows)]
            samples = self._attempt(group, on_step)
            if samples is None:
                self._halve()
                continue
            for unit in group:
                waiting.popleft()
                yield unit, samples[: len(self.units.numbers(unit))]
                samples = samples[self._size(unit) :]

    def _size(self, unit: int) -> int:
        return self.units.rows if self.reproducible else len(self.units.numbers(unit))

    def _attempt(self, group: Sequence[int], on_step: OnStep | None) -> Tensor | None:
        """The samples of a group of units, or None if they do not fit into memory."""
        chosen = self.units.filled if self.reproducible else self.units.numbers
        numbers = [number for unit in group for number in chosen(unit)]
        pieces = [numbers[i : i + self.rows] for i in range(0, len(numbers), self.rows)]
        try:
            done, drawn = 0, []
            for piece in pieces:
                drawn.append(
                    self.sampler.draw(piece, self.steps, self._counted(on_step, done, piece))
                )
                done += len(piece)
            return torch.cat(drawn)
        except torch.OutOfMemoryError:
            if self.rows == 1:
                raise
            return None

    def _counted(self, on_step: OnStep | None, done: int, piece: Sequence[int]) -> OnStep | None:
        if on_step is None:
            return None
        return lambda step: on_step(done + len(piece) * step / self.steps)

    def _halve(self) -> None:
        # The failed call's tensors are free only now, without the error that held its frames.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        before, self.rows = self.rows, max(1, self.rows // 2)
        text = f"out of memory with {before} samples at a time; continuing with {self.rows}"
        if self.reproducible and self.rows < self.units.rows:
            for parts in self._parts:
                parts.rows = min(parts.rows, self.rows)
            text += (
                f", fewer than model_batch_size {self.units.rows}: pixels may differ by rounding"
            )
            self.notes.append(text)
        tqdm.write(text)


def largest_batch(
    sampler: Sampler, limit: int, on_cuda: bool, draw: Callable[[int], object] | None = None
) -> int:
    """The batch size that `auto` means: the largest power of two that fits.

    Args:
        sampler: Of the set.
        limit: No larger than needed for this many samples.
        on_cuda: Try it out; on a CPU, where memory does not run out at once, it is 32.
        draw: Draws a batch of some size; for tests.
    """
    if not on_cuda:
        return min(limit, _CPU_BATCH)
    draw = draw or (lambda size: sampler.draw([i % len(sampler) for i in range(size)], steps=2))
    size = fits = 1
    while True:
        try:
            draw(size)
        except torch.OutOfMemoryError:
            break
        fits = size
        if size >= limit:
            break
        size *= 2
    gc.collect()
    torch.cuda.empty_cache()
    return min(fits, limit)
