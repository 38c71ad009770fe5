"""Images with one class label each: arrays in memory, or files in one folder a class."""

import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from mhla_gen.config import DataConfig
from mhla_gen.data.protocol import Batch

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True, eq=False)
class ArrayImages:
    """Images held in memory.

    Raises:
        ValueError: If the arrays are not square uint8 images with one class number each.
    """

    images: np.ndarray
    """uint8 `[images, height, width, channels]`."""
    labels: np.ndarray
    """int64 `[images]`, from 0 on."""
    class_names: tuple[str, ...]

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


@dataclass(frozen=True, eq=False)
class FolderImages:
    """Image files in one sub-folder a class, read when they are needed.

    Raises:
        FileNotFoundError: If there is no folder, no class folder, or a class without images.
    """

    root: Path
    image_size: int
    """Side in pixels after the centre crop."""

    def __post_init__(self):
        if not self.root.is_dir():
            raise FileNotFoundError(f"data.path {self.root} is not a folder")
        if not self.class_names:
            raise FileNotFoundError(
                f"data.path {self.root} has no sub-folders; images go into one sub-folder a class"
            )
        empty = set(self.class_names) - {path.parent.name for path, _ in self.files}
        if empty:
            raise FileNotFoundError(
                f"no images ({', '.join(IMAGE_SUFFIXES)}) in {self.root / min(empty)}"
            )

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the sub-folders, sorted; their positions are the class numbers."""
        return self._class_names

    @cached_property
    def _class_names(self) -> tuple[str, ...]:
        return tuple(
            sorted(
                entry.name
                for entry in self.root.iterdir()
                if entry.is_dir() and not entry.name.startswith(".")
            )
        )

    @cached_property
    def files(self) -> tuple[tuple[Path, int], ...]:
        """Path and class number of every image, sorted."""
        return tuple(
            (path, label)
            for label, name in enumerate(self.class_names)
            for path in sorted((self.root / name).iterdir())
            if path.suffix.lower() in IMAGE_SUFFIXES
        )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(channels, height, width)`: always three channels."""
        return 3, self.image_size, self.image_size

    def __len__(self) -> int:
        return len(self.files)

    @property
    def buckets(self) -> tuple[range]:
        """One: all images have one shape."""
        return (range(len(self)),)

    @property
    def sample_shapes(self) -> tuple[tuple[int, int, int]]:
        """See `TrainingData`."""
        return (self.image_shape,)

    def describe(self, index: int) -> str:
        """See `TrainingData`."""
        return str(self.files[index][0])

    def read(self, indices: Sequence[int]) -> Batch:
        """See `TrainingData`.

        Raises:
            ValueError: If a file is no readable image.
        """
        # Pillow decodes without holding the interpreter lock.
        with ThreadPoolExecutor(8) as readers:
            images = list(readers.map(self._pixels, (self.files[i][0] for i in indices)))
        labels = torch.tensor([self.files[i][1] for i in indices])
        return {"samples": to_model_range(np.stack(images)), "labels": labels}

    def _pixels(self, path: Path) -> np.ndarray:
        try:
            with Image.open(path) as image:
                return np.asarray(centre_crop(image.convert("RGB"), self.image_size))
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{path} is not a readable image: {error}") from error


def load_images(config: DataConfig) -> ArrayImages | FolderImages:
    """Open the data set that a config names.

    Raises:
        ValueError: If the data do not fit their description.
        FileNotFoundError: If they are missing.
    """
    if config.source == "folder":
        assert config.path is not None and config.image_size is not None
        return FolderImages(Path(config.path), config.image_size)
    images = digits() if config.source == "digits" else load_npz(Path(config.path or ""))
    size = images.image_shape[-1]
    if config.image_size not in (None, size):
        raise ValueError(
            f"data.image_size is {config.image_size} but the {config.source} images are "
            f"{size} pixels wide; leave it out or set it to {size}"
        )
    return images


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


def load_npz(path: Path) -> ArrayImages:
    """Images and labels of a file with `arr_0` and `labels`, the layout of ADM's sample sets.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no npz file, or lacks an array.
    """
    if not path.is_file():
        raise FileNotFoundError(f"data.path {path} is not a file")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = arrays["arr_0"], arrays["labels"]
    except KeyError as error:
        raise ValueError(f"{path} must hold arr_0 and labels: {error.args[0]}") from error
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not an npz file of plain arrays: {error}") from error
    num_classes = int(labels.max(initial=0)) + 1 if np.issubdtype(labels.dtype, np.integer) else 1
    return ArrayImages(images, labels, tuple(map(str, range(num_classes))))


def to_model_range(pixels: np.ndarray) -> Tensor:
    """uint8 `[batch, height, width, channels]` to float32 `[batch, channels, …]` in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The largest centred square, resized to `size` pixels.

    Halving by box filter first keeps the final bicubic step from skipping source pixels.

    Source:
        Dhariwal and Nichol 2021, arXiv:2105.05233: ImageNet preprocessing of ADM.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))
