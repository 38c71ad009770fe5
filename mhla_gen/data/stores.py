"""Encoded images with what is known of them: files in class folders, or files that a list names."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from mhla_gen.data.lists import known_of, listed_paths, read_list
from mhla_gen.media.pictures import IMAGE_SUFFIXES


class ImageStore(Protocol):
    """Images as they are stored, in a fixed order, each to be had by its number."""

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
        """What messages call an image."""
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


def class_folders(root: Path) -> FileStore:
    """Image files in one sub-folder a class; classes are numbered in the order of their names.

    Raises:
        FileNotFoundError: If there is no folder, no class folder, or a class without images.
    """
    if not root.is_dir():
        known = ", an npz file is data.source=npz" if root.suffix == ".npz" else ""
        raise FileNotFoundError(f"data.path {root} is not a folder{known}")
    folders = sorted(d for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))
    if not folders:
        raise FileNotFoundError(
            f"data.path {root} has no sub-folders; images go into one sub-folder a class"
        )
    paths: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        found = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise FileNotFoundError(f"no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in {folder}")
        paths += found
        labels += [label] * len(found)
    return FileStore(tuple(paths), np.array(labels), tuple(folder.name for folder in folders))


def listed_images(
    path: Path, label_column: str, caption_column: str, num_classes: int | None
) -> FileStore:
    """Image files that a CSV or JSONL file names in its column `path`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a column or a value is missing, or a label is out of range.
    """
    rows = read_list(path)
    paths = listed_paths(path, rows)
    known = known_of(str(path), rows, label_column, caption_column, num_classes)
    return FileStore(paths, *known)
