"""The interface of a data set for training, of images, clips or latents."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

Batch = dict[str, Tensor]
"""Tensors by name, the samples along the first axis of each.

- `samples`: float32 `[batch, channels, (frames,) height, width]`, pixels in [-1, 1] or normalised
  latents. A cache of latents gives `mean` and `std` of the same shape in their place, and
  `mean_flipped` and `std_flipped` where it holds mirrored images too.
- `labels`: int64 `[batch]`, for class-conditional models.
- `prompt_embeds`: `[batch, text_len, text_dim]`, for models of text.
- `condition`: latents like `mean` of the first frame and grey after it, for image to video.
- `image_embeds`: the first frame as CLIP sees it `[batch, tokens, image_dim]`, for Wan 2.1's image
  to video.
"""


class TrainingData(Protocol):
    """Samples with their conditions."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """One name per class number; None where samples have no labels."""
        ...

    @property
    def buckets(self) -> Sequence[Sequence[int]]:
        """Sample numbers, each in one bucket; the samples of a bucket have one shape."""
        ...

    @property
    def sample_shapes(self) -> Sequence[tuple[int, ...]]:
        """`(channels, (frames,) height, width)` of each bucket."""
        ...

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> Batch:
        """Samples of one bucket."""
        ...

    def describe(self, index: int) -> str:
        """The name of a sample in error messages: a file, or a place in one."""
        ...


class OneShape(ABC):
    """The single bucket of images that all have one shape."""

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """`(channels, height, width)`."""

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    def buckets(self) -> tuple[range]:
        """See `TrainingData`."""
        return (range(len(self)),)

    @property
    def sample_shapes(self) -> tuple[tuple[int, int, int]]:
        """See `TrainingData`."""
        return (self.image_shape,)


class Examples(Protocol):
    """Images or clips to make a cache from."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """See `TrainingData`."""
        ...

    @property
    def labels(self) -> np.ndarray | None:
        """Class numbers, int64 `[examples]`, if there are any."""
        ...

    @property
    def captions(self) -> Sequence[str] | None:
        """One per example, if there are any."""
        ...

    @property
    def buckets(self) -> Sequence[Sequence[int]]:
        """See `TrainingData`."""
        ...

    @property
    def sample_shapes(self) -> Sequence[tuple[int, ...]]:
        """`(channels, (frames,) height, width)` of each bucket, in pixels."""
        ...

    def __len__(self) -> int: ...

    def describe(self, index: int) -> str:
        """See `TrainingData`."""
        ...

    def pixels(self, index: int) -> np.ndarray:
        """uint8 `[(frames,) height, width, channels]`.

        Raises:
            UnreadableImageError: If this one cannot be used.
        """
        ...

    def digest(self, index: int) -> str:
        """SHA-256 of what is stored, whatever its name; "unreadable" if it cannot be read."""
        ...
