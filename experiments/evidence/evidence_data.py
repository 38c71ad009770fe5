"""The data of the comparison, created once for all processes."""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from moving_emoji import make_data
from PIL import Image

from mhla_gen.files import write_arrays
from mhla_gen.media.pictures import centre_crop

_SIDE = 64
# One image in sixteen is held out.
_HELD_OUT = 16
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True, eq=False)
class Real:
    """The real images; the first `num_train` are trained on, the others held out."""

    images: np.ndarray
    """uint8 `[images, height, width, channels]`; of clips, mosaics of frames."""
    labels: np.ndarray
    """int64 `[images]`."""
    class_names: tuple[str, ...]
    num_train: int

    def training(self) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels of the training part."""
        return self.images[: self.num_train], self.labels[: self.num_train]

    def held_out(self) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels of the held-out part."""
        return self.images[self.num_train :], self.labels[self.num_train :]

    def save_training(self, path: Path) -> None:
        """Write the training part as `data.source=npz` reads it."""
        images, labels = self.training()
        write_arrays(path, {"arr_0": images, "labels": labels})


def load_real(path: Path) -> Real:
    """Real images with the held-out ones last.

    Args:
        path: An npz file with `arr_0` and `labels`, or a folder with one sub-folder per class.

    Raises:
        FileNotFoundError: If there are no images.
        ValueError: If the file lacks an array.
    """
    if path.is_dir():
        images, labels, names = _read_folder(path)
    elif path.is_file():
        with np.load(path, allow_pickle=False) as arrays:
            missing = {"arr_0", "labels"} - set(arrays)
            if missing:
                raise ValueError(f"{path} lacks {', '.join(sorted(missing))}")
            images, labels = arrays["arr_0"], arrays["labels"]
            names = [str(name) for name in arrays["classes"]] if "classes" in arrays else []
    else:
        raise FileNotFoundError(f"{path} is no npz file and no folder of class folders")
    names = names or [str(c) for c in range(int(labels.max()) + 1)]
    held_out = np.arange(len(images)) % _HELD_OUT == _HELD_OUT - 1
    order = np.argsort(held_out, kind="stable")
    return Real(images[order], labels[order], tuple(names), int((~held_out).sum()))


def load_clips(images: Real, path: Path, num_train: int, num_held_out: int) -> Real:
    """Clips of moving images, made as in moving_emoji.py if the file is missing.

    Args:
        images: Images that move; held-out images are in held-out clips only.
        path: File of the clips, which is written if missing.
        num_train: Number of clips to train on.
        num_held_out: Number of held-out clips.
    """

    def make() -> None:
        held_out = np.arange(len(images.images)) >= images.num_train
        made = make_data(images.images, images.labels, held_out, num_train, num_held_out)
        write_arrays(path, made)

    once(path, make)
    with np.load(path, allow_pickle=False) as arrays:
        return Real(arrays["arr_0"], arrays["labels"], images.class_names, num_train)


def _read_folder(path: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    names = sorted(folder.name for folder in path.iterdir() if folder.is_dir())
    images, labels = [], []
    for label, name in enumerate(names):
        for file in sorted((path / name).iterdir()):
            if file.suffix.lower() in _SUFFIXES:
                with Image.open(file) as image:
                    images.append(np.asarray(centre_crop(image.convert("RGB"), _SIDE)))
                labels.append(label)
    if not images:
        raise FileNotFoundError(f"{path} has no images in sub-folders, one a class")
    order = np.random.default_rng(0).permutation(len(images))
    return np.stack(images)[order], np.asarray(labels, np.int64)[order], names


def once(path: Path, make: Callable[[], None]) -> None:
    """Make a file if it is missing: one of several processes does, and the others wait."""
    with locked(path.with_name(f"{path.name}.lock"), fcntl.LOCK_EX):
        if not path.exists():
            make()


@contextmanager
def locked(path: Path, kind: int) -> Iterator[None]:
    """Wait for a lock on a file, of kind LOCK_SH or LOCK_EX, and hold it."""
    with path.open("a", encoding="utf-8") as file:
        fcntl.flock(file, kind)
        yield


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process has the file to itself; the system unlocks it if a process dies."""
    with path.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
