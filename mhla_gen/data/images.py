"""Images to train on: arrays in memory, or encoded images that are read when they are needed."""

import hashlib
import io
import sys
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mhla_gen.data.protocol import Batch
from mhla_gen.data.stores import ImageStore
from mhla_gen.pictures import UnreadableImageError, read_rgb

# Broken images in turn that are data of another kind, not a few that are broken.
_TRIES = 10


@dataclass(frozen=True, eq=False)
class ArrayImages:
    """Images held in memory, with one class label each.

    Raises:
        ValueError: If the arrays are not square uint8 images with one class number each.
    """

    images: np.ndarray
    """uint8 `[images, height, width, channels]`."""
    labels: np.ndarray
    """int64 `[images]`, from 0 on."""
    class_names: tuple[str, ...]
    captions: None = None

    def __post_init__(self):
        shape, dtype = self.images.shape, self.images.dtype
        if dtype != np.uint8 or len(shape) != 4 or shape[1] != shape[2] or not len(self.images):
            raise ValueError(
                "images must be square, uint8 [images, height, width, channels]; "
                f"found {dtype} {list(shape)}"
            )
        if self.labels.shape != shape[:1] or not np.issubdtype(self.labels.dtype, np.integer):
            raise ValueError(
                f"labels must be one integer per image, {shape[0]} in all; "
                f"found {self.labels.dtype} {list(self.labels.shape)}"
            )
        if self.labels.min() < 0 or self.labels.max() >= len(self.class_names):
            raise ValueError(
                f"labels must be in 0…{len(self.class_names) - 1}; "
                f"found {self.labels.min()}…{self.labels.max()}"
            )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(channels, height, width)`."""
        height, width, channels = self.images.shape[1:]
        return channels, height, width

    def __len__(self) -> int:
        return len(self.images)

    @property
    def buckets(self) -> tuple[range]:
        """One: all images have one shape."""
        return (range(len(self)),)

    @property
    def sample_shapes(self) -> tuple[tuple[int, int, int]]:
        """See `TrainingData`."""
        return (self.image_shape,)

    def read(self, indices: Sequence[int]) -> Batch:
        """See `TrainingData`."""
        chosen = np.asarray(indices)
        labels = torch.from_numpy(self.labels[chosen]).long()
        return {"samples": to_model_range(self.images[chosen]), "labels": labels}

    def describe(self, index: int) -> str:
        """See `TrainingData`."""
        return f"image {index}"

    def pixels(self, index: int) -> np.ndarray:
        """See `Examples`."""
        return self.images[index]

    def digest(self, index: int) -> str:
        """See `Examples`."""
        return hashlib.sha256(np.ascontiguousarray(self.images[index]).data).hexdigest()


@dataclass(frozen=True, eq=False)
class EncodedImages:
    """Image files, also inside of other files, decoded when they are needed."""

    store: ImageStore
    """Where the files are."""
    image_size: int
    """Side in pixels after ADM's centre crop."""
    _said: set[int] = field(default_factory=set, init=False, repr=False)

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

    @property
    def buckets(self) -> tuple[range]:
        """One: all images have one shape."""
        return (range(len(self)),)

    @property
    def sample_shapes(self) -> tuple[tuple[int, int, int]]:
        """See `TrainingData`."""
        return (self.image_shape,)

    def read(self, indices: Sequence[int]) -> Batch:
        """See `TrainingData`.

        In place of an image that cannot be read comes the next one of its class, which is said. So
        a long run does not end with it, and what sample i is stays a function of the files.

        Raises:
            ValueError: If many of a class in turn cannot be read.
        """
        # Pillow decodes without holding the interpreter lock.
        with ThreadPoolExecutor(8) as readers:
            images = list(readers.map(self._readable, indices))
        batch = {"samples": to_model_range(np.stack(images))}
        if self.labels is not None:
            batch["labels"] = torch.from_numpy(self.labels[np.asarray(indices)]).long()
        return batch

    def describe(self, index: int) -> str:
        """See `TrainingData`."""
        return self.store.describe(index)

    def pixels(self, index: int) -> np.ndarray:
        """See `Examples`."""
        try:
            content = self.store.content(index)
        except OSError as error:
            raise UnreadableImageError(f"cannot be read ({error.strerror or error})") from error
        return read_rgb(io.BytesIO(content), self.image_size)

    def digest(self, index: int) -> str:
        """See `Examples`."""
        try:
            return hashlib.sha256(self.store.content(index)).hexdigest()
        except OSError:
            return "unreadable"

    def _readable(self, index: int) -> np.ndarray:
        broken: dict[int, str] = {}
        for other in islice(self._class_from(index), _TRIES):
            try:
                pixels = self.pixels(other)
            except UnreadableImageError as error:
                broken[other] = f"{self.describe(other)} {error}"
                continue
            for number in broken.keys() - self._said:
                self._said.add(number)
                message = f"{broken[number]}; the next image of its class takes its place"
                tqdm.write(message, file=sys.stderr)
            return pixels
        raise ValueError(f"{broken[index]}, and no image near it in its class can be read")

    def _class_from(self, index: int) -> Iterator[int]:
        """This image, and those of its class after it, in a circle."""
        for other in chain(range(index, len(self)), range(index)):
            if self.labels is None or self.labels[other] == self.labels[index]:
                yield other


def digits() -> ArrayImages:
    """Handwritten digits, `[1797, 8, 8, 1]`, their 17 grey levels spread over 0…255.

    Source:
        Alpaydin and Kaynak 1998, "Optical Recognition of Handwritten Digits", test part, as
        scikit-learn ships it.
    """
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    pixels = np.round(data["images"] * (255 / 16)).astype(np.uint8)[..., None]
    return ArrayImages(pixels, data["target"].astype(np.int64), tuple("0123456789"))


def load_npz(path: Path, num_classes: int | None = None) -> ArrayImages:
    """Images and labels of a file with `arr_0` and `labels`, the layout of ADM's sample sets.

    Args:
        path: The file.
        num_classes: How many classes there are; None: the largest label plus one.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no npz file, or lacks an array.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"data.path {path} is not a file, which data.source=npz takes; "
            "a folder of class folders is data.source=folder"
        )
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = arrays["arr_0"], arrays["labels"]
    except KeyError as error:
        raise ValueError(f"{path} must hold arr_0 and labels: {error.args[0]}") from error
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not an npz file of plain arrays: {error}") from error
    if num_classes is None:
        whole = np.issubdtype(labels.dtype, np.integer)
        num_classes = int(labels.max(initial=0)) + 1 if whole else 1
    return ArrayImages(images, labels, tuple(map(str, range(num_classes))))


def to_model_range(pixels: np.ndarray) -> Tensor:
    """uint8 `[batch, (frames,) height, width, channels]` to float32 in [-1, 1], channels second."""
    return torch.from_numpy(pixels).movedim(-1, 1).float().div_(127.5).sub_(1)
