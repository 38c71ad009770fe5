"""Encoded images with what is known of them: files in class folders, or files that a list names.

Not `datasets`' imagefolder, which puts class 10 before 9, and silently drops all labels where one
image lies deeper than the others.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from mhla_gen.data.lists import known_of, listed_paths, number_classes, read_list
from mhla_gen.errors import MissingError
from mhla_gen.media.folders import by_number, files_below, is_hidden, passed_over
from mhla_gen.media.pictures import IMAGE_SUFFIXES
from mhla_gen.runtime.processes import tell


class ImageStore(Protocol):
    """Images as they are stored, in a fixed order, accessed by number."""

    @property
    def labels(self) -> np.ndarray | None:
        """Class numbers, int64 `[images]`, if there are any."""
        ...

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """One name per class number; None without labels."""
        ...

    @property
    def captions(self) -> tuple[str, ...] | None:
        """One per image, if there are any."""
        ...

    def __len__(self) -> int: ...

    def describe(self, index: int) -> str:
        """The name of an image in messages."""
        ...

    def content(self, index: int) -> bytes:
        """The bytes of an image file.

        Raises:
            OSError: If they cannot be read.
        """
        ...


@dataclass(frozen=True, eq=False)
class FileStore:
    """Image files."""

    paths: tuple[Path, ...]
    labels: np.ndarray | None
    class_names: tuple[str, ...] | None
    captions: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def describe(self, index: int) -> str:
        """See `ImageStore`."""
        return str(self.paths[index])

    def content(self, index: int) -> bytes:
        """See `ImageStore`."""
        return self.paths[index].read_bytes()


def class_folders(root: Path, num_classes: int | None = None) -> FileStore:
    """Image files in one sub-folder per class; classes are numbered in the order of their names.

    Names that are whole numbers, all of them, are in the order of the numbers. Files that are no
    images, and images that lie deeper or beside the class folders, are counted on the terminal.

    Args:
        root: Folder of the class folders.
        num_classes: How many classes there are: folders must be as many, or be named by the numbers
            of theirs. None: as many as there are folders.

    Raises:
        MissingError: If there is no folder, no class folder, or a class without images.
        UserError: If the folders do not go with `num_classes`.
    """
    if not root.is_dir():
        known = ", an npz file is data.source=npz" if root.suffix == ".npz" else ""
        raise MissingError(f"data.path {root} is not a folder{known}")
    names = by_number(d.name for d in root.iterdir() if d.is_dir() and not is_hidden(d.name))
    if not names:
        raise MissingError(
            f"data.path {root} has no sub-folders; put images into one sub-folder per class"
        )
    numbers, class_names = np.arange(len(names)), tuple(names)
    if num_classes is not None:
        places = [f"class folder {root / name}" for name in names]
        numbers, class_names = number_classes(f"data.path {root}", places, names, num_classes)
    paths: list[Path] = []
    labels: list[int] = []
    beside = Counter(p.suffix.lower() for p in root.iterdir() if _is_shown_file(p))
    others = Counter({s: count for s, count in beside.items() if s not in IMAGE_SUFFIXES})
    misplaced = beside.total() - others.total()
    for label, name in zip(numbers.tolist(), names, strict=True):
        images, deeper, more = _images_in(root / name)
        paths += images
        labels += [label] * len(images)
        others, misplaced = others + more, misplaced + deeper
    _tell_left_out(root, others, misplaced)
    return FileStore(tuple(paths), np.array(labels), class_names)


def _is_shown_file(path: Path) -> bool:
    return not is_hidden(path.name) and not path.is_dir()


def _images_in(folder: Path) -> tuple[list[Path], int, Counter[str]]:
    """Images of a class, the number of nested ones, and its other files by suffix."""
    found = files_below(folder, IMAGE_SUFFIXES)
    images = [path for path in found.paths if path.parent == folder]
    deeper = len(found.paths) - len(images)
    if not images and deeper:
        raise MissingError(
            f"{folder} has no images itself, but {deeper} in sub-folders; data.path must be the "
            "folder whose sub-folders hold the images of one class each"
        )
    if not images:
        raise MissingError(f"no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in {folder}")
    return images, deeper, found.others


def _tell_left_out(root: Path, others: Counter[str], misplaced: int) -> None:
    parts = [passed_over(others)] if others else []
    if misplaced:
        what = "image that is" if misplaced == 1 else "images that are"
        parts.append(f"{misplaced} {what} not directly in a class folder")
    if parts:
        tell(f"data.path {root}: ignored {' and '.join(parts)}")


def listed_images(
    path: Path, label_column: str, caption_column: str, num_classes: int | None
) -> FileStore:
    """Image files listed in the column `path` of a CSV or JSONL file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a column or a value is missing, or a label is out of range.
    """
    rows = read_list(path)
    paths = listed_paths(path, rows)
    known = known_of(str(path), rows, label_column, caption_column, num_classes)
    return FileStore(paths, *known)
