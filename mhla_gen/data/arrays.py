"""Images to train on that are arrays in memory."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mhla_gen.data.lists import MOST_CLASSES
from mhla_gen.data.protocol import Batch, OneShape
from mhla_gen.errors import MissingError, UserError, one_line


@dataclass(frozen=True, eq=False)
class ArrayImages(OneShape):
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
            raise UserError(
                "images must be square, uint8 [images, height, width, channels]; "
                f"found {dtype} {list(shape)}"
            )
        if self.labels.shape != shape[:1] or not np.issubdtype(self.labels.dtype, np.integer):
            raise UserError(
                f"labels must be one integer per image, {shape[0]} in all; "
                f"found {self.labels.dtype} {list(self.labels.shape)}"
            )
        if self.labels.min() < 0 or self.labels.max() >= len(self.class_names):
            raise UserError(
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
        raise MissingError(
            f"data.path {path} is not a file, as data.source=npz needs; "
            "a folder of class folders is data.source=folder"
        )
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = arrays["arr_0"], arrays["labels"]
    except KeyError as error:
        raise UserError(f"{path} must contain arr_0 and labels: {error.args[0]}") from error
    except Exception as error:
        # zipfile and numpy raise many things at bytes that are none.
        reason = one_line(f"{type(error).__name__}: {error}", 200)
        raise UserError(f"{path} is not an npz file of plain arrays: {reason}") from error
    if num_classes is None:
        whole = np.issubdtype(labels.dtype, np.integer)
        num_classes = int(labels.max(initial=0)) + 1 if whole else 1
        if num_classes > MOST_CLASSES:
            raise UserError(f"{path} has label {num_classes - 1}, expected 0…{MOST_CLASSES - 1}")
    return ArrayImages(images, labels, tuple(map(str, range(num_classes))))


def to_model_range(pixels: np.ndarray) -> Tensor:
    """uint8 `[batch, (frames,) height, width, channels]` to float32 in [-1, 1], channels second."""
    return torch.from_numpy(pixels).movedim(-1, 1).float().div_(127.5).sub_(1)
