"""Which samples training step k reads: a pure function, the same in a resumed run.

Read ahead by a thread, not by processes of a DataLoader: images decode without Python's lock, and
what cannot be read is known to all readers, and reported once.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mhla_gen.data.protocol import Batch, TrainingData


def derived_seed(*numbers: int) -> int:
    """A seed that depends on all of these non-negative numbers.

    torch's CPU generator reads 32 bits of a seed, so numbers cannot be packed side by side. Zeros
    at the end do not count: (1, 2) and (1, 2, 0) have one seed.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@dataclass(eq=False)
class BatchOrder:
    """An endless sequence of micro-batches, each of samples of one bucket.

    Micro-batch n is a function of the seed and of n alone. Every bucket is read epoch after epoch,
    each in a new order, without a gap: a micro-batch may hold the end of one epoch and the start of
    the next, and no sample is left out. Buckets take turns by their sizes, in a new order every
    epoch; one that is smaller than a micro-batch has its turn once in several epochs.

    Args:
        buckets: Sample numbers, those of one shape together.
        size: Samples of a micro-batch.
        seed: Fixes every order.
    """

    buckets: Sequence[Sequence[int]]
    size: int
    seed: int
    _orders: dict[tuple[int, int], Tensor] = field(default_factory=dict, init=False, repr=False)

    def micro_batch(self, number: int) -> list[int]:
        """The sample numbers of one micro-batch."""
        bucket, turn = self._turn(number)
        samples = self.buckets[bucket]
        first, chosen = turn * self.size, []
        while len(chosen) < self.size:
            epoch, position = divmod(first + len(chosen), len(samples))
            missing = self.size - len(chosen)
            chosen += self._order(bucket, epoch)[position : position + missing].tolist()
        return [samples[i] for i in chosen]

    def _turn(self, number: int) -> tuple[int, int]:
        """The bucket of a micro-batch, and how many of this bucket came before."""
        if len(self.buckets) == 1:
            return 0, number
        # In epochs of at most all samples, rounding down: the guess is not too late.
        epoch = number * self.size // sum(map(len, self.buckets))
        while self._turns_before(epoch + 1).sum() <= number:
            epoch += 1
        first, last = self._turns_before(epoch), self._turns_before(epoch + 1)
        turns = [(b, t) for b in range(len(first)) for t in range(first[b], last[b])]
        generator = np.random.default_rng(derived_seed(self.seed, 2, epoch))
        return turns[generator.permutation(len(turns))[number - first.sum()]]

    def _turns_before(self, epoch: int) -> np.ndarray:
        """How many turns each bucket has had when an epoch starts."""
        return np.array([epoch * len(samples) // self.size for samples in self.buckets])

    def _order(self, bucket: int, epoch: int) -> Tensor:
        if (bucket, epoch) not in self._orders:
            # The only bucket has the seeds that it had before there were several.
            path = (epoch,) if len(self.buckets) == 1 else (epoch, bucket)
            generator = torch.Generator().manual_seed(derived_seed(self.seed, 0, *path))
            # Two epochs can meet in one micro-batch; older ones are not needed again.
            self._orders = {
                (b, e): order
                for (b, e), order in self._orders.items()
                if b != bucket or e == epoch - 1
            }
            self._orders[bucket, epoch] = torch.randperm(
                len(self.buckets[bucket]), generator=generator
            )
        return self._orders[bucket, epoch]


def batches(
    data: TrainingData,
    order: BatchOrder,
    start: int,
    stop: int,
    *,
    parts: int = 1,
    rows: slice = slice(None),
) -> Iterator[list[Batch]]:
    """Read what steps `start` to `stop` need, one step ahead of its use.

    Args:
        data: The data set.
        order: Which samples a micro-batch has.
        start: First step.
        stop: One past the last step.
        parts: Micro-batches of a step.
        rows: Which samples of every micro-batch to read; a process reads its own share.

    Yields:
        The micro-batches of a step.
    """

    def read(step: int) -> list[Batch]:
        numbers = range(step * parts, (step + 1) * parts)
        return [data.read(order.micro_batch(number)[rows]) for number in numbers]

    if start >= stop:
        return
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(read, start)
        for step in range(start + 1, stop):
            ready, ahead = ahead, reader.submit(read, step)
            yield ready.result()
        yield ahead.result()
