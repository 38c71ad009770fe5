"""Which images training step k reads: a pure function, so that a resumed run reads on exactly."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mhla_gen.data.datasets import LabelledImages


def derived_seed(*numbers: int) -> int:
    """A seed that depends on all of these non-negative numbers.

    torch's CPU generator reads 32 bits of a seed, so numbers cannot be packed side by side.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@dataclass(eq=False)
class BatchOrder:
    """An endless sequence of image numbers: every epoch in a new order, none left out.

    Batch k is a function of the seed and of k alone. Epochs follow each other without a gap, so a
    batch may hold the end of one and the start of the next.
    """

    num_images: int
    batch_size: int
    seed: int
    _epochs: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def batch(self, number: int) -> list[int]:
        """The image numbers of one batch."""
        first, chosen = number * self.batch_size, []
        while len(chosen) < self.batch_size:
            epoch, position = divmod(first + len(chosen), self.num_images)
            missing = self.batch_size - len(chosen)
            chosen += self._order(epoch)[position : position + missing].tolist()
        return chosen

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._epochs:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, 0, epoch))
            # Two epochs can meet in one batch; older ones are not needed again.
            self._epochs = {k: v for k, v in self._epochs.items() if k == epoch - 1}
            self._epochs[epoch] = torch.randperm(self.num_images, generator=generator)
        return self._epochs[epoch]


def batches(
    images: LabelledImages, order: BatchOrder, start: int, stop: int, part: slice = slice(None)
) -> Iterator[tuple[Tensor, Tensor]]:
    """Read batches `start` to `stop`, one ahead of their use.

    Args:
        images: The data set.
        order: Which images a batch has.
        start: First batch.
        stop: One past the last batch.
        part: Which images of each batch to read; a process reads its own share.

    Yields:
        Images and labels as `LabelledImages.read` returns them.
    """
    if start >= stop:
        return
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(images.read, order.batch(start)[part])
        for number in range(start + 1, stop):
            ready, ahead = ahead, reader.submit(images.read, order.batch(number)[part])
            yield ready.result()
        yield ahead.result()
