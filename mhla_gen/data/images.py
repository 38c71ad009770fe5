"""Images to train on that are files, decoded on demand."""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from mhla_gen.data.arrays import to_model_range
from mhla_gen.data.broken import FAILED, BrokenImages
from mhla_gen.data.protocol import Batch, OneShape
from mhla_gen.data.stores import ImageStore
from mhla_gen.errors import UserError
from mhla_gen.media.patience import ReadFailedError, read_patiently, read_rgb_patiently
from mhla_gen.media.pictures import UnreadableImageError

# Pillow decodes without holding the interpreter lock.
_READERS = 8


@dataclass(frozen=True, eq=False)
class EncodedImages(OneShape):
    """Image files, also inside other files, decoded on demand."""

    store: ImageStore
    """Where the files are."""
    image_size: int
    """Side in pixels after ADM's centre crop."""
    failed_reads: Literal["stop", "quarantine"] = "stop"
    """What becomes of an image whose file cannot be read; see `DataConfig`."""
    broken: BrokenImages = field(default_factory=BrokenImages, init=False, repr=False)
    """What `read` found that it could not read."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """See `TrainingData`."""
        return self.store.class_names

    @property
    def labels(self) -> np.ndarray | None:
        """Class numbers, if there are any."""
        return self.store.labels

    @property
    def captions(self) -> tuple[str, ...] | None:
        """One per image, if there are any."""
        return self.store.captions

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(channels, height, width)`: always three channels."""
        return 3, self.image_size, self.image_size

    def __len__(self) -> int:
        return len(self.store)

    def read(self, indices: Sequence[int]) -> Batch:
        """See `TrainingData`.

        In place of an image that is damaged comes the next one of its class that is not, which is
        said. So a long run does not end with it, and what sample i is stays a function of the
        files. A read that fails is none of that: it is tried again, and then ends the run, unless
        `failed_reads` says otherwise.

        Raises:
            ReadFailedError: If a file cannot be read.
            ValueError: If no image of a class can be read, also of one that is not asked for: a run
                fails when it starts, not when it comes to that class.
        """
        classes = [self._classes[self._label(index)] for index in indices]
        images = list(self._each_readable(indices, classes))
        batch = {"samples": to_model_range(np.stack(images))}
        if self.labels is not None:
            batch["labels"] = torch.from_numpy(self.labels[np.asarray(indices)]).long()
        return batch

    def describe(self, index: int) -> str:
        """See `TrainingData`."""
        return self.store.describe(index)

    def pixels(self, index: int) -> np.ndarray:
        """See `Examples`."""
        name = self.describe(index)
        try:
            return read_rgb_patiently(lambda: self.store.content(index), name, self.image_size)
        except ReadFailedError as error:
            if self.failed_reads == "stop":
                raise
            raise UnreadableImageError(f"{FAILED} ({error.__cause__})") from error

    def digest(self, index: int) -> str:
        """See `Examples`."""
        try:
            content = read_patiently(lambda: self.store.content(index), self.describe(index))
        except UnreadableImageError:
            return "unreadable"
        except ReadFailedError:
            if self.failed_reads == "stop":
                raise
            return "unreadable"
        return hashlib.sha256(content).hexdigest()

    def leave_out(self, listing: Path) -> None:
        """List broken images in a file; those that an earlier run could not read stay out.

        So what sample i is does not change with each start.
        """
        failed = self.broken.failed_in(listing)
        if failed:
            # A list may name a file more than once.
            for index, name in enumerate(map(self.describe, range(len(self)))):
                if name in failed:
                    self.broken.add(index, name, failed[name])
        self.broken.list_in(listing)

    def _label(self, index: int) -> int:
        return 0 if self.labels is None else int(self.labels[index])

    @cached_property
    def _classes(self) -> dict[int, np.ndarray]:
        """The images of each class, of which at least one can be read; one class without labels."""
        labels = np.zeros(len(self), int) if self.labels is None else self.labels
        order = np.argsort(labels, kind="stable")
        numbers, starts = np.unique(labels[order], return_index=True)
        classes = dict(zip(numbers.tolist(), np.split(order, starts[1:]), strict=True))
        for _ in self._each_readable([int(c[0]) for c in classes.values()], list(classes.values())):
            # Not kept: there may be thousands of classes.
            pass
        return classes

    def _each_readable(
        self, indices: Sequence[int], classes: Sequence[np.ndarray]
    ) -> Iterator[np.ndarray]:
        return self._readers.map(self._readable, indices, classes)

    @cached_property
    def _readers(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(_READERS)

    def _readable(self, index: int, images: np.ndarray) -> np.ndarray:
        """An image, or else the next readable one of its class, cyclically."""
        start, broken = int(np.searchsorted(images, index)), {}
        for other in map(int, chain(images[start:], images[:start])):
            if other in self.broken:
                continue
            try:
                pixels = self.pixels(other)
            except UnreadableImageError as error:
                broken[other] = str(error)
                continue
            for number, reason in broken.items():
                self.broken.add(number, self.describe(number), reason)
            return pixels
        if not broken:
            # Other threads have found them.
            broken = {int(images[0]): self.broken.reason(int(images[0]))}
        first, reason = next(iter(broken.items()))
        names = self.class_names
        whose = "" if names is None else f" of class {names[self._label(index)]}"
        raise UserError(
            f"no image{whose} can be read ({len(images)} in all): {self.describe(first)} {reason}; "
            "fix them, or remove the class from the data"
        )
