"""Sources of images and clips: folders, npz files, sample sets, or several of these."""

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from mhla_gen.evaluation.errors import EvaluationError
from mhla_gen.evaluation.npz import npz_keys, open_array
from mhla_gen.evaluation.video import ClipRule, read_clip
from mhla_gen.files.digests import file_digest
from mhla_gen.media.folders import by_number, files_below, passed_over
from mhla_gen.media.frames import MOVING_SUFFIXES, VIDEO_SUFFIXES
from mhla_gen.media.patience import read_file_patiently
from mhla_gen.media.pictures import (
    IMAGE_SUFFIXES,
    READING,
    UnreadableImageError,
    crop_array,
)
from mhla_gen.outputs.folders import CONFIG_NAME, WORK_NAME
from mhla_gen.runtime.processes import tell

SAMPLES_NAME = "samples.npz"
MANIFEST_NAME = "manifest.json"

_MEASURED = {
    "images": "metrics of images need another features.extractor, such as inception",
    "videos": "videos are measured by features.extractor=i3d features.weights=FILE metrics=[fvd]",
}
# Images of an array that are hashed together.
_HASHED = 64
# A bar that appears after some seconds, and goes when it is done.
_IF_LONG: Any = {"delay": 3, "leave": False}


class ImageSource(Protocol):
    """Images, or clips, in a fixed order."""

    name: str
    """What messages call it."""
    decodes: bool
    """Whether reading is work for a processor, and not only a copy."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of class folders, in the order of their numbers; None for other sources."""
        ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> np.ndarray:
        """uint8 [height, width, 3], or a clip [frames, height, width, 3].

        Raises:
            UnreadableImageError: If this one cannot be used.
        """
        ...

    def label(self, index: int) -> str:
        """The name of an image in a list of unreadable ones."""
        ...

    def digest(self) -> str:
        """SHA-256 over the content and its order; file names do not count."""
        ...

    def labels(self) -> np.ndarray | None:
        """Class of each image, int64; None where that is not known."""
        ...


def load_images(
    path: str | Path | Sequence[str | Path],
    size: int | None = None,
    clip: ClipRule | None = None,
) -> ImageSource:
    """Open images or clips for reading; nothing is decoded yet.

    Args:
        path: A folder of images (searched recursively, sorted by path), an npz file with `arr_0`,
            a sample set (a folder with `samples.npz`, or images with `manifest.json`), one image,
            or a list of these, which are joined in order.
        size: Side of ADM's centre crop in pixels; None keeps sizes as they are.
        clip: Frame rule, if videos are wanted instead of images.

    Returns:
        The source, with at least one image.

    Raises:
        EvaluationError: If there is nothing there, or it is no set of images.
    """
    if not isinstance(path, str | Path):
        parts = [load_images(part, size, clip) for part in path]
        if not parts:
            raise EvaluationError("expected at least one path to images, found none")
        return parts[0] if len(parts) == 1 else JoinedSource(parts)
    path = Path(path)
    if (path / WORK_NAME).is_dir() and not (path / MANIFEST_NAME).is_file():
        raise EvaluationError(
            f"{path} is an unfinished sample set; finish it: mhla-gen sample {path / CONFIG_NAME}"
        )
    if (path / SAMPLES_NAME).is_file():
        return ArraySource(path / SAMPLES_NAME, size, clip)
    if (path / MANIFEST_NAME).is_file():
        # The picture of a sample set lies beside the folder of its samples.
        kind, other = ("videos", "images") if clip else ("images", "videos")
        if (path / other).is_dir() and not (path / kind).is_dir():
            raise EvaluationError(f"{path} is a set of {other}, not of {kind}; {_MEASURED[other]}")
        path = path / kind if (path / kind).is_dir() else path
    if path.suffix.lower() == ".npz":
        return ArraySource(path, size, clip)
    if not path.exists():
        raise EvaluationError(f"{path} does not exist; expected a folder of images or an npz file")
    return FileSource(path, size, clip)


class FileSource:
    """Image or video files below a folder, or one file."""

    decodes = True

    def __init__(self, path: Path, size: int | None, clip: ClipRule | None):
        suffixes, kind = (MOVING_SUFFIXES, "videos") if clip else (IMAGE_SUFFIXES, "images")
        self.name, self._size, self._clip = str(path), size, clip
        self._root = path if path.is_dir() else path.parent
        found = files_below(path, suffixes)
        self._files, others = found.paths, passed_over(found.others)
        if not self._files:
            videos = clip is None and any(suffix in VIDEO_SUFFIXES for suffix in found.others)
            raise EvaluationError(
                f"{path} has no {kind} ({' '.join(sorted(suffixes))}); found "
                f"{others or 'no other files'}" + (f"; {_MEASURED['videos']}" if videos else "")
            )
        if others:
            tell(f"{path}: ignored {others}")

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> np.ndarray:
        """See `ImageSource`."""
        if self._clip:
            return read_clip(self._files[index], self._clip)
        # A read that fails ends the evaluation: it says nothing about the image.
        return read_file_patiently(self._files[index], self._size)

    def label(self, index: int) -> str:
        """See `ImageSource`."""
        return str(self._files[index].relative_to(self._root))

    def digest(self) -> str:
        """See `ImageSource`."""
        with ThreadPoolExecutor() as pool:
            found = pool.map(_digest_or_reason, self._files)
            digests = tqdm(found, "reading", len(self._files), unit="file", **_IF_LONG)
            return _join_digests(f"files by rules {READING}", digests)

    @property
    def classes(self) -> tuple[str, ...] | None:
        """See `ImageSource`."""
        return self._classes

    @cached_property
    def _classes(self) -> tuple[str, ...] | None:
        """Names of class folders, in the order of training; None for other folders.

        Names that are whole numbers, but not 0, 1, 2, …, are none: `data.num_classes` says in
        training whether they are the class numbers, and here nothing does.
        """
        places = [file.relative_to(self._root).parts for file in self._files]
        if any(len(place) != 2 for place in places):
            return None
        names = by_number({place[0] for place in places})
        of_numbers = all(name.isascii() and name.isdigit() for name in names)
        if of_numbers and list(map(int, names)) != list(range(len(names))):
            return None
        return tuple(names)

    def labels(self) -> np.ndarray | None:
        """See `ImageSource`."""
        if self.classes is None:
            return None
        numbers = {name: number for number, name in enumerate(self.classes)}
        return np.array([numbers[file.parent.name] for file in self._files], np.int64)


class ArraySource:
    """`arr_0` of an npz file."""

    classes = None

    def __init__(self, path: Path, size: int | None, clip: ClipRule | None):
        self.name, self._path, self._size, self._clip = str(path), path, size, clip
        self.decodes = size is not None and clip is None
        axes = "[clips, frames, height, width" if clip else "[images, height, width"
        axes += ", 3 or 1]"
        array, ndim = self._array, 5 if clip else 4
        if array.dtype != np.uint8 or array.ndim != ndim or array.shape[-1] not in (1, 3):
            other = _MEASURED["images" if clip else "videos"]
            meant = f"; {other}" if array.ndim == 9 - ndim else ""
            raise EvaluationError(
                f"{path}: arr_0 must be uint8 {axes}, found {array.dtype} "
                f"{list(array.shape)}{meant}"
            )
        if not len(array):
            raise EvaluationError(f"{path}: arr_0 is empty")

    @cached_property
    def _array(self) -> np.ndarray:
        return open_array(self._path, "arr_0")

    def __getstate__(self) -> dict[str, Any]:
        # A worker process maps the file again instead of receiving its bytes.
        return {key: value for key, value in self.__dict__.items() if key != "_array"}

    def __len__(self) -> int:
        return len(self._array)

    def read(self, index: int) -> np.ndarray:
        """See `ImageSource`."""
        pixels = self._array[index]
        if pixels.shape[-1] == 1:
            # Grey becomes three equal channels, as it does when a file is read.
            pixels = np.repeat(pixels, 3, axis=-1)
        if self._clip:
            return self._clip.choose(pixels)
        return crop_array(pixels, self._size)

    def label(self, index: int) -> str:
        """See `ImageSource`."""
        return f"arr_0[{index}]"

    def digest(self) -> str:
        """See `ImageSource`."""
        # In threads: one core hashes no faster than a GPU takes images.
        starts = range(0, len(self._array), _HASHED)
        with ThreadPoolExecutor() as pool:
            found = pool.map(self._block_digest, starts)
            digests = tqdm(found, "reading", len(starts), unit="block", **_IF_LONG)
            return _join_digests(f"array{self._array.shape}", digests)

    def labels(self) -> np.ndarray | None:
        """See `ImageSource`."""
        if "labels" not in npz_keys(self._path):
            return None
        labels = open_array(self._path, "labels")
        if labels.shape != (len(self),) or not np.issubdtype(labels.dtype, np.integer):
            raise EvaluationError(
                f"{self._path}: labels must be a class number for each of {len(self)} images, "
                f"found {labels.dtype} {list(labels.shape)}"
            )
        return labels.astype(np.int64)

    def _block_digest(self, start: int) -> str:
        block = np.ascontiguousarray(self._array[start : start + _HASHED])
        return hashlib.sha256(block.data).hexdigest()


class JoinedSource:
    """Several sources, one after the other."""

    def __init__(self, parts: Sequence[ImageSource]):
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])
        self.name = " + ".join(part.name for part in parts)
        self.decodes = any(part.decodes for part in parts)

    @property
    def classes(self) -> tuple[str, ...] | None:
        """See `ImageSource`."""
        return next((part.classes for part in self._parts if part.classes is not None), None)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _locate(self, index: int) -> tuple[ImageSource, int]:
        part = int(np.searchsorted(self._ends, index, side="right"))
        start = 0 if part == 0 else int(self._ends[part - 1])
        return self._parts[part], index - start

    def read(self, index: int) -> np.ndarray:
        """See `ImageSource`."""
        part, local = self._locate(index)
        return part.read(local)

    def label(self, index: int) -> str:
        """See `ImageSource`."""
        part, local = self._locate(index)
        return f"{part.name}: {part.label(local)}"

    def digest(self) -> str:
        """See `ImageSource`."""
        return _join_digests("joined", (part.digest() for part in self._parts))

    def labels(self) -> np.ndarray | None:
        """See `ImageSource`."""
        folders = {part.classes for part in self._parts if isinstance(part, FileSource)}
        if len(folders) > 1:
            # One number would mean several classes.
            return None
        found = [part.labels() for part in self._parts]
        known = [labels for labels in found if labels is not None]
        return np.concatenate(known) if len(known) == len(found) else None


def frame_shape(source: ImageSource) -> tuple[int, ...]:
    """Shape of the first readable image, without the colour axis.

    Raises:
        EvaluationError: If none can be read.
    """
    last = "it is empty"
    for index in range(len(source)):
        try:
            return source.read(index).shape[:-1]
        except UnreadableImageError as error:
            last = f"{source.label(index)} {error}"
    raise EvaluationError(f"{source.name}: none of {len(source)} can be read; the last: {last}")


def has_statistics(path: str | Path) -> bool:
    """Whether this is an npz file with `mu` and `sigma` rather than images alone."""
    path = Path(path)
    if path.suffix.lower() != ".npz" or not path.is_file():
        return False
    return bool(npz_keys(path) & {"mu", "sigma", "mu_s", "sigma_s"})


def _digest_or_reason(path: Path) -> str:
    try:
        return file_digest(path)
    except OSError:
        # Reading it as an image says why.
        return "unreadable"


def _join_digests(kind: str, digests: Iterable[str]) -> str:
    return hashlib.sha256("\n".join([kind, *digests]).encode()).hexdigest()
